"""slimba_sample, run on this processor, against the NumPy reference of sampling.

Run: `pytest tests/kernels/test_cuda_sample.py`.
"""

from __future__ import annotations

import numpy as np
import pytest

from kernels.cuda_host import host_gpu
from runtime.numpy_reference import mamba2_spec, random_checkpoint
from slimba.runtime.engine import SamplingParams
from slimba.runtime.sampling import sample

torch = pytest.importorskip("torch")
ASK = -3


def chosen(logits: np.ndarray, params: list[SamplingParams], first: int) -> np.ndarray:
    """What one launch chooses for logits [B, V]: int32 [B]."""
    from slimba.runtime.backends.cuda import CudaEngine

    batch, vocab = logits.shape
    engine = CudaEngine(random_checkpoint(mamba2_spec(vocab_size=vocab, d_model=8, n_layer=1)), gpu=host_gpu())
    state = engine.new_state(batch)
    step = engine.stepper(state)
    step.sample_by(params)
    step.first_token(first)
    step.logits.copy_(torch.from_numpy(logits))
    step.allow(params[0].n_valid)
    step.after(True)
    assert step.count.tolist() == [1] * batch
    return step.chosen[:, 0].numpy().copy()


SETTINGS = {
    "plain": {}, "hot": {"temperature": 3.0}, "cold": {"temperature": 0.05}, "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.8}, "min-p": {"min_p": 0.05}, "all": {"top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "one": {"top_k": 1}, "tiny-p": {"top_p": 1e-6}, "valid": {"n_valid": 50}, "greedy": {"temperature": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_are_those_of_the_reference(name: str) -> None:
    """Eight tokens of three sequences with seeds of their own; some logits are equal."""
    rng = np.random.default_rng(len(name))
    logits = rng.standard_normal((3, 301)).astype(np.float32) * 3
    logits[:, 100:120] = logits[:, 5:6]
    params = [SamplingParams(**({"temperature": 1.0} | SETTINGS[name] | {"seed": 11 + 2**62 * b})) for b in range(3)]  # type: ignore[arg-type]
    for first in (0, 5, 1000):
        want = [sample(row, (), p, b, first) for b, (row, p) in enumerate(zip(logits, params, strict=True))]
        np.testing.assert_array_equal(chosen(logits, params, first), want)


def test_a_draw_beyond_the_candidates_is_left_to_the_caller() -> None:
    """Ten thousand like ids: no bin fits among the candidates. With one that stands out, it is found."""
    logits = np.zeros((2, 10_000), np.float32)
    logits[1, 77] = 40
    got = chosen(logits, [SamplingParams(temperature=1.0, seed=1)] * 2, 0)
    np.testing.assert_array_equal(got, [ASK, 77])


def test_what_is_not_finite_is_told() -> None:
    logits = np.zeros((2, 40), np.float32)
    logits[0, 3] = np.nan
    logits[1, 4] = -np.inf
    np.testing.assert_array_equal(chosen(logits, [SamplingParams(temperature=1.0)] * 2, 0), [-2, -2])
