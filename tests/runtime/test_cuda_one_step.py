"""Steps of one sequence whose out_proj leaves digits, run on this processor, against the NumPy model.

Run: `pytest tests/runtime/test_cuda_one_step.py`.
"""

from __future__ import annotations

import numpy as np
import pytest

from kernels.cuda_host import host_gpu
from runtime.numpy_reference import NumpyModel, mamba2_spec
from slimba.runtime.measure import random_model

torch = pytest.importorskip("torch")
SPEC = mamba2_spec(d_model=2048, headdim=64, d_inner=2048, d_state=128, n_groups=1, n_layer=2, norm_group_size=2048)


@pytest.mark.parametrize("state_dtype", ["int8", pytest.param("float32", marks=pytest.mark.slow)])
def test_steps_are_the_recurrence(state_dtype: str) -> None:
    """Past the token that stores the state, two layers with other columns in the second plane; then two tokens that
    the steps choose themselves, the second embedded by the head."""
    from slimba.runtime.backends.cuda import CudaEngine

    checkpoint = random_model(SPEC, "dfssm")
    ids = np.random.default_rng(6).integers(0, 67, (1, 17)).astype(np.int32)
    cuda = CudaEngine(checkpoint, gpu=host_gpu(60, bakes=True), state_dtype=state_dtype)
    state = cuda.new_state()
    cuda.prefill(ids[:, :14], state)
    got = [cuda.step(ids[:, t], state).numpy().copy() for t in range(14, 17)]
    step = cuda.stepper(state)
    assert type(step).__name__ == "OneStep"
    step.ids.fill_(5)
    for k in range(2):
        step.work(choose=True, follows=k > 0)
        got.append(step.logits.numpy().copy())
    first, second = step.chosen[0, :2].tolist()
    assert [first, second] == [int(row.argmax()) for row in got[3:]] and int(state.pos[0]) == 19
    want = NumpyModel(checkpoint).logits(np.append(ids[0], [5, first]))[14:]
    np.testing.assert_allclose(
        np.concatenate(got), want, rtol=0, atol=(1e-3 if state_dtype == "float32" else 3e-2) * np.abs(want).max()
    )


def test_a_column_beyond_the_digits_makes_everything_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that generating ends with an error, not with wrong numbers."""
    from slimba.errors import UserError
    from slimba.runtime.backends.cuda import CudaEngine
    from slimba.runtime.engine import SamplingParams

    monkeypatch.setattr("slimba.runtime.backends.cuda_one.HEADROOM", 2.0**-4)
    cuda = CudaEngine(random_model(SPEC, "dfssm"), gpu=host_gpu(60, bakes=True))
    state = cuda.new_state()
    assert np.isnan(cuda.step(np.array([5], np.int32), state).numpy()).all()
    with pytest.raises(UserError, match="NaN"):
        list(cuda.generate(np.array([[5, 6]], np.int32), cuda.new_state(), SamplingParams(max_new_tokens=3)))


def test_what_is_not_taken() -> None:
    from slimba.runtime.backends.cuda import CudaEngine
    from slimba.runtime.backends.cuda_one import OneStep

    gpu = host_gpu(60, bakes=True)
    model = CudaEngine(random_model(SPEC, "dfssm"), gpu=gpu).model
    assert OneStep.fits(model, gpu, 1)
    assert not OneStep.fits(model, gpu, 2) and not OneStep.fits(model, host_gpu(60), 1)
    assert not OneStep.fits(CudaEngine(random_model(SPEC, "dfssm-published"), gpu=gpu).model, gpu, 1)  # low-rank
    assert not OneStep.fits(CudaEngine(random_model(SPEC, "int8"), gpu=gpu).model, gpu, 1)
