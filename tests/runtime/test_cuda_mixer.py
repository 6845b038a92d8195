"""Prompts by warpgroups (kernels/cuda/mixer.cu), run on this processor, against the NumPy recurrence.

Run: `pytest tests/runtime/test_cuda_mixer.py`.
"""

from __future__ import annotations

import numpy as np
import pytest

from kernels.cuda_host import host_gpu
from runtime.numpy_reference import NumpyModel, mamba2_spec, random_checkpoint

torch = pytest.importorskip("torch")


def compared(checkpoint: object, state_dtype: str, splits: tuple[int, ...], after: float) -> None:
    """Prompts in pieces that end at `splits`, and a step after them, against the recurrence."""
    from slimba.runtime.backends.cuda import CudaEngine

    cuda = CudaEngine(checkpoint, gpu=host_gpu(warpgroups=True), state_dtype=state_dtype)  # type: ignore[arg-type]
    ids = np.random.default_rng(6).integers(0, 67, (2, splits[-1] + 1)).astype(np.int32)
    state = cuda.new_state(2)
    want = np.stack([NumpyModel(checkpoint).logits(row) for row in ids])  # type: ignore[arg-type]
    most = np.abs(want).max()
    for a, b in zip((0, *splits), splits, strict=False):
        got = cuda.prefill(ids[:, a:b], state)
        tolerance = 5e-3 if state_dtype == "float32" or not a else after
        np.testing.assert_allclose(got, want[:, b - 1], rtol=0, atol=tolerance * most)
    got = cuda.step(ids[:, -1], state).cpu().numpy()
    np.testing.assert_allclose(got, want[:, -1], rtol=0, atol=after * most)


@pytest.mark.parametrize(("d_state", "groups"), [(64, 2), (128, 1), (128, 2)])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_prompts_are_the_recurrence(d_state: int, groups: int, state_dtype: str) -> None:
    """Whole and partial chunks, from an empty state and from one, with kept tokens and without."""
    spec = mamba2_spec(headdim=64, d_inner=256, d_state=d_state, n_groups=groups, n_layer=1)
    after = {"float32": 5e-3, "bfloat16": 1e-2, "int8": 3e-2}[state_dtype]
    compared(random_checkpoint(spec, 8, "float32"), state_dtype, (70, 169, 180, 272), after)


@pytest.mark.parametrize(
    "change",
    [
        {"norm_group_size": 128},
        {"norm_before_gate": True},
        {"gated_norm": False},
        {"d_has_hdim": True},
        {"conv_bias": False},
    ],
)
def test_other_models(change: dict[str, object]) -> None:
    spec = mamba2_spec(**{"headdim": 64, "d_inner": 256, "d_state": 64, "n_groups": 2, "n_layer": 1, **change})  # type: ignore[arg-type]
    compared(random_checkpoint(spec, 3, "float32"), "float32", (33, 100), 5e-3)


@pytest.mark.parametrize("warpgroups", [False, True])
def test_a_first_prompt_sees_no_rounding(warpgroups: bool) -> None:
    """Which the comparison at the benched shape relies on: however the state is stored, the logits are the same."""
    from slimba.runtime.backends.cuda import CudaEngine

    spec = mamba2_spec(headdim=64, d_inner=128, d_state=64, n_layer=1)
    checkpoint = random_checkpoint(spec, 8, "float32")
    ids = np.random.default_rng(7).integers(0, 67, (2, 90)).astype(np.int32)
    got = []
    for state_dtype in ("float32", "bfloat16", "int8"):
        cuda = CudaEngine(checkpoint, gpu=host_gpu(warpgroups=warpgroups), state_dtype=state_dtype)
        got.append(cuda.prefill(ids, cuda.new_state(2)))
    assert (got[0] == got[1]).all() and (got[0] == got[2]).all()


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
def test_the_check_before_a_bench_passes_and_can_fail(
    state_dtype: str, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimba.errors import UserError
    from slimba.runtime.backends.cuda import CudaEngine
    from slimba.runtime.backends.cuda_speed import gpu_check

    spec = mamba2_spec(d_model=64, headdim=64, d_inner=128, d_state=64)
    checkpoint = random_checkpoint(spec, 8, "mixed")
    cuda = CudaEngine(checkpoint, gpu=host_gpu(warpgroups=True), state_dtype=state_dtype, activations=activations)
    found = gpu_check(cuda, checkpoint, [1, 3])
    assert all(0 < found[k] <= found[f"{k} allowed"] for k in ("steps", "prompt", "continued"))
    prefill = CudaEngine.prefill

    def forgetful(engine: CudaEngine, ids: np.ndarray, state: object) -> np.ndarray:
        out = prefill(engine, ids, state)  # type: ignore[arg-type]
        state.ssm.zero_()  # type: ignore[attr-defined]
        return out

    monkeypatch.setattr(CudaEngine, "prefill", forgetful)
    with pytest.raises(UserError, match=r"differs from the reference by .*continued"):
        gpu_check(cuda, checkpoint, [1, 3])
