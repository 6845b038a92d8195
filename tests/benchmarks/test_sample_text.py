"""Text that a model writes: its statistics are the model's, and it is mixed in by whole windows.

Run: `pytest tests/benchmarks/test_sample_text.py`.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from sample_text import mixed, sample

from helpers.tiny import tiny_checkpoint
from slimba.errors import UserError
from slimba.runtime.backends.cpu import CpuEngine


def test_the_first_token_has_the_models_distribution() -> None:
    model = tiny_checkpoint()
    ids = sample(model, 8000, window=2, batch=4000, seed=1, device="cpu").reshape(-1, 2)
    assert (ids[:, 0] == model.spec.eos_token_id).all()
    engine = CpuEngine(model)
    logits = engine.forward(np.array([[0]], np.int32), engine.new_state())[0, 0].astype(np.float64)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    seen = np.bincount(ids[:, 1], minlength=len(p)) / len(ids)
    assert np.abs(seen - p).max() < 5 * np.sqrt(p.max() / len(ids))
    surprise = -np.log(p[ids[:, 1]]).mean()
    assert surprise == pytest.approx(-(p * np.log(p)).sum(), abs=0.1), "neither greedy nor uniform"


def test_a_seed_gives_the_same_ids_and_another_does_not() -> None:
    model = tiny_checkpoint()
    a, b, c = (sample(model, 60, window=10, batch=3, seed=s, device="cpu") for s in (0, 0, 1))
    assert len(a) == 60 and np.array_equal(a, b) and not np.array_equal(a, c)


def test_windows_are_replaced_evenly_and_the_rest_stays() -> None:
    text = np.arange(105, dtype=np.int32)
    out = mixed(text, np.full(35, -1, np.int32), 10)
    assert len(out) == 105 and (out == -1).sum() == 30
    assert [i for i in range(10) if (out[i * 10 : i * 10 + 10] == -1).all()] == [0, 3, 6]
    assert np.array_equal(out[out != -1], np.delete(text, np.flatnonzero(out == -1)))
    with pytest.raises(UserError, match="11 sampled windows do not fit"):
        mixed(text, np.zeros(110, np.int32), 10)


def test_a_model_without_a_start_is_refused() -> None:
    with pytest.raises(UserError, match="names neither"):
        sample(tiny_checkpoint(eos_token_id=None), 10, window=5, batch=1, seed=0, device="cpu")
