"""Steps of one sequence by three kernels a layer that leave operands, run on this processor, against the NumPy model.

Run: `pytest tests/runtime/test_cuda_one_step.py`.
"""

from __future__ import annotations

import numpy as np
import pytest

from kernels.cuda_host import host_gpu
from runtime.numpy_reference import NumpyModel, mamba2_spec
from slimba.runtime.measure import random_model

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("state_dtype", ["int8", pytest.param("float32", marks=pytest.mark.slow)])
def test_steps_are_the_recurrence(state_dtype: str) -> None:
    """Past the token that stores the state; two layers with other columns in the second plane."""
    from slimba.runtime.backends.cuda import CudaEngine

    spec = mamba2_spec(d_model=2048, headdim=64, d_inner=2048, d_state=128, n_groups=1, n_layer=2, norm_group_size=2048)
    checkpoint = random_model(spec, "dfssm")
    ids = np.random.default_rng(6).integers(0, 67, (1, 19)).astype(np.int32)
    cuda = CudaEngine(checkpoint, gpu=host_gpu(60, bakes=True), state_dtype=state_dtype)
    state = cuda.new_state()
    cuda.prefill(ids[:, :13], state)
    got = np.concatenate([cuda.step(ids[:, t], state).numpy().copy() for t in range(13, 19)])
    assert type(cuda.stepper(state)).__name__ == "OneStep"
    want = NumpyModel(checkpoint).logits(ids[0])[13:]
    most = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=(5e-3 if state_dtype == "float32" else 3e-2) * most)
