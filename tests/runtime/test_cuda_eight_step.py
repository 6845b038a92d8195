"""Steps of two to tens of sequences by three kernels a layer, run on this processor, against the NumPy model.

Run: `pytest tests/runtime/test_cuda_eight_step.py`.
"""

from __future__ import annotations

import numpy as np
import pytest

from kernels.cuda_host import host_gpu
from runtime.numpy_reference import NumpyModel, mamba2_spec, random_matrix
from slimba.formats import MatrixLayout, Segment
from slimba.runtime.measure import random_model

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("state_dtype", "batch", "warps", "steps"),
    [
        ("int8", 3, 8, 4),
        ("int8", 9, 8, 1),  # two eights at once
        pytest.param("int8", 19, 8, 6, marks=pytest.mark.slow),  # twice, and flow.cu
        pytest.param("bfloat16", 12, 8, 6, marks=pytest.mark.slow),
        pytest.param("float32", 8, 16, 6, marks=pytest.mark.slow),
        pytest.param("bfloat16", 2, 8, 6, marks=pytest.mark.slow),
    ],
)
def test_steps_are_the_recurrence(
    state_dtype: str, batch: int, warps: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sequence elsewhere in its buffer, past the token that stores the state."""
    from slimba.runtime.backends.cuda import CudaEngine

    monkeypatch.setattr("slimba.runtime.backends.cuda_eight.EightStep.WARPS_IN", warps)
    spec = mamba2_spec(d_model=2048, headdim=64, d_inner=2048, d_state=128, n_groups=1, n_layer=2, norm_group_size=2048)
    checkpoint = random_model(spec, "dfssm")
    ids = np.random.default_rng(6).integers(0, 67, (batch, 22)).astype(np.int32)
    cuda = CudaEngine(checkpoint, gpu=host_gpu(40, bakes=True), state_dtype=state_dtype)
    pool, length = cuda.new_state(batch), 14 + np.arange(batch) % 2
    for n in sorted(set(length)):
        (which,) = np.nonzero(length == n)
        cuda.prefill(ids[which, :n], pool.view(which.tolist()))
    got = np.stack([cuda.step(ids[range(batch), length + t], pool).numpy().copy() for t in range(steps)], axis=1)
    assert type(cuda.stepper(pool)).__name__ == "EightStep"
    for b, n in enumerate(length):
        want = NumpyModel(checkpoint).logits(ids[b, : n + steps])[n:]
        most = np.abs(want).max()
        np.testing.assert_allclose(got[b], want, rtol=0, atol=(5e-3 if state_dtype == "float32" else 3e-2) * most)


@pytest.mark.parametrize("batch", [17, 25])
def test_products_read_whole_groups_of_vectors(batch: int) -> None:
    from slimba.runtime.backends.cuda import CudaEngine
    from slimba.runtime.backends.cuda_eight import EIGHT, EightStep

    spec = mamba2_spec(d_model=2048, headdim=64, d_inner=2048, d_state=128, n_layer=1, norm_group_size=2048)
    gpu = host_gpu(40, bakes=True)
    step = EightStep(CudaEngine(random_model(spec, "dfssm"), gpu=gpu).model, gpu, batch, "int8")
    for matrix, shape, (operands, [second], _) in (
        ("in_proj", step._ins[0], step._in),
        ("out_proj", step._outs[0], step._out),
    ):
        m, vectors = step._model.layers[0].matrices[matrix], EIGHT * shape.eights * shape.groups
        assert vectors >= batch and vectors % (EIGHT * shape.eights * shape.split) == 0
        assert operands.numel() >= vectors * m.cols and second.numel() >= vectors * m.plane_kpad


def test_rows_of_out_proj_in_int8_are_left_to_others() -> None:
    """They would not become operands of the next product."""
    from slimba.runtime.backends.cuda import CudaEngine
    from slimba.runtime.backends.cuda_eight import EightStep
    from slimba.runtime.backends.cuda_weights import DeviceMatrix

    spec = mamba2_spec(d_model=2048, headdim=64, d_inner=2048, d_state=128, n_layer=1, norm_group_size=2048)
    gpu = host_gpu(40, bakes=True)
    model = CudaEngine(random_model(spec, "dfssm"), gpu=gpu).model
    assert EightStep.fits(model, gpu, 8)
    layout = MatrixLayout(2048, (Segment(2040, "sign"), Segment(8, "int8")))
    matrix = random_matrix(np.random.default_rng(0), layout)
    model.layers[0].matrices["out_proj"] = DeviceMatrix(matrix, gpu.device, gpu.blocks)
    assert not EightStep.fits(model, gpu, 8)
