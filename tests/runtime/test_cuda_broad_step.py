"""Steps of many sequences by warpgroups, run on this processor, against the NumPy model.

Run: `pytest tests/runtime/test_cuda_broad_step.py`.
"""

from __future__ import annotations

import numpy as np
import pytest

from kernels.cuda_host import host_gpu
from runtime.numpy_reference import NumpyModel, mamba2_spec
from slimba.runtime.measure import random_model

torch = pytest.importorskip("torch")


CASES = [  # d_state, groups, type of the states, fours of heads that a block of flow.cu takes, none: steps.cu
    (64, 2, "float32", ()),
    (64, 2, "int8", (2,)),
    (128, 1, "bfloat16", ()),
    (128, 1, "int8", (4,)),
]
STATES = [("float32", ()), ("bfloat16", ()), ("int8", ()), ("int8", (4,)), ("int8", (2,))]
OTHERS = [case for d, g in ((64, 2), (128, 1)) for t, f in STATES if (case := (d, g, t, f)) not in CASES]


@pytest.mark.parametrize(
    ("d_state", "groups", "state_dtype", "fours"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)],
)
def test_steps_are_the_recurrence(
    d_state: int, groups: int, state_dtype: str, fours: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sequence elsewhere in its buffer, past the token that stores the state; batch.cu's too."""
    from slimba.runtime.backends.cuda import CudaEngine

    monkeypatch.setattr("slimba.runtime.backends.cuda_broad_step.BroadStep.FLOW", fours)
    monkeypatch.setattr("slimba.runtime.backends.cuda_broad.Broad.CODES_BY_NORM", range(99 if fours else 0))

    monkeypatch.setattr("slimba.runtime.backends.cuda_broad_step.BroadStep.BROAD_HEAD_FROM", 2 if groups == 1 else 99)
    spec = mamba2_spec(
        d_model=64, headdim=64, d_inner=2048, d_state=d_state, n_groups=groups, n_layer=1, norm_group_size=2048
    )
    checkpoint = random_model(spec, "dfssm")
    ids = np.random.default_rng(6).integers(0, 67, (9, 30)).astype(np.int32)
    got, lengths = [], 11 + np.arange(9) % 5
    for warpgroups in (False, True):
        cuda = CudaEngine(checkpoint, gpu=host_gpu(bakes=True, warpgroups=warpgroups), state_dtype=state_dtype)
        pool = cuda.new_state(9)
        for b in range(9):
            cuda.prefill(ids[b : b + 1, : lengths[b]], pool.view([b]))
        steps = [cuda.step(ids[range(9), lengths + t], pool).numpy().copy() for t in range(6)]
        got.append(np.stack(steps, axis=1))
        assert type(cuda.stepper(pool)).__name__ == ("BroadStep" if warpgroups else "BatchStep")
    most = np.abs(got[0]).max()
    np.testing.assert_allclose(got[1], got[0], rtol=0, atol=(2e-3 if state_dtype == "float32" else 1e-2) * most)
    if state_dtype == "float32":
        for b in range(9):
            want = NumpyModel(checkpoint).logits(ids[b, : lengths[b] + 6])[lengths[b] :]
            np.testing.assert_allclose(got[1][b], want, rtol=0, atol=1e-2 * most)
