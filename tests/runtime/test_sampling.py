"""The reference sampler against its documented rules, one rule at a time. `pytest tests/runtime/test_sampling.py`."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from slimba.errors import UserError
from slimba.runtime.engine import SamplingParams
from slimba.runtime.sampling import Sampler, sample, uniform

RNG = np.random.default_rng(3)
LOGITS = RNG.standard_normal(50).astype(np.float32) * 2


def draws(logits: np.ndarray, n: int = 4000, **settings) -> Counter:
    params = SamplingParams(temperature=settings.pop("temperature", 1.0), **settings)
    return Counter(sample(logits, (), params, 0, i) for i in range(n))


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x.astype(np.float64) - x.max())
    return p / p.sum()


def test_uniform_is_splitmix64() -> None:
    # The published first outputs of SplitMix64 from state 1234567 are 6457827717110365317 and 3203168211198807973.
    assert uniform(1234567, 0, 0) == (6457827717110365317 >> 11) * 2.0**-53
    assert uniform(1234567, 0, 1) == (3203168211198807973 >> 11) * 2.0**-53
    values = np.array([uniform(s, b, i) for s in (0, 2**64 - 1) for b in range(4) for i in range(500)])
    assert ((values >= 0) & (values < 1)).all() and abs(values.mean() - 0.5) < 0.02
    assert len(set(values.tolist())) == len(values)


def test_greedy_takes_the_lowest_of_equals() -> None:
    x = np.array([0, 3, 1, 3], np.float32)
    assert sample(x, (), SamplingParams()) == 1
    assert sample(x, (), SamplingParams(n_valid=1)) == 0


def test_frequencies_follow_the_softmax_at_a_temperature() -> None:
    for t in (0.7, 1.0, 1.5):
        p = softmax(LOGITS / t)
        counts = draws(LOGITS, temperature=t)
        for i in np.argsort(-p)[:5]:
            assert abs(counts[int(i)] / 4000 - p[i]) < 4 * math.sqrt(p[i] / 4000)


def test_padding_rows_are_never_sampled() -> None:
    x = LOGITS.copy()
    x[40:] = 30
    assert max(draws(x, n_valid=40, n=500)) < 40
    assert max(draws(x, n_valid=4000, n=50)) >= 40, "a tokenizer larger than the head changes nothing"


def test_top_k_top_p_min_p_keep_exactly_their_sets() -> None:
    p = softmax(LOGITS)
    order = np.argsort(-p)
    assert set(draws(LOGITS, top_k=3)) == set(order[:3].tolist())
    nucleus = int(np.argmax(np.cumsum(p[order]) >= 0.8)) + 1
    assert set(draws(LOGITS, top_p=0.8)) == set(order[:nucleus].tolist())
    assert set(draws(LOGITS, min_p=0.2)) == set(np.flatnonzero(p >= 0.2 * p.max()).tolist())
    # top_p looks at the probabilities that top_k left
    two = p[order[:2]] / p[order[:2]].sum()
    assert set(draws(LOGITS, top_k=2, top_p=float(two[0]) * 0.99, n=300)) == {int(order[0])}
    assert set(draws(LOGITS, top_p=1e-9, n=300)) == {int(order[0])}


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    x = np.array([2.0, 1.5, -1.0, -1.5], np.float32)
    greedy = SamplingParams(repetition_penalty=2.0)
    assert sample(x, (), greedy) == 0
    assert sample(x, (0,), greedy) == 1
    assert sample(x - 3, (0,), greedy) == 1
    assert sample(np.array([-1.0, -1.5], np.float32), (0, 99), greedy) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    x = LOGITS.copy()
    x[7] = bad
    with pytest.raises(UserError, match="not finite"):
        sample(x, (), SamplingParams())
    assert sample(x, (), SamplingParams(n_valid=7)) >= 0, "padding rows are not looked at"


def test_batch_stops_each_sequence_and_is_deterministic() -> None:
    params = SamplingParams(temperature=1.0, seed=5, max_new_tokens=30, stop_ids=(1,))
    logits = np.zeros((3, 4), np.float32)

    def run() -> np.ndarray:
        sampler, out = Sampler(params, np.zeros((3, 2), np.int32)), []
        while not sampler.done:
            out.append(sampler.step(logits))
        return np.array(out)

    ids = run()
    assert (ids == run()).all()
    for b in range(3):
        (ends,) = np.nonzero(ids[:, b] == 1)
        assert len(ends) == 1 and (ids[ends[0] + 1 :, b] == -1).all() and (ids[: ends[0], b] != -1).all()
    alone = Sampler(params, np.zeros((1, 2), np.int32))
    assert [int(alone.step(logits[:1])[0]) for _ in range(2)] == ids[:2, 0].tolist(), "batch row 0 draws as if alone"


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}, {"top_k": -1}, {"seed": -1}]
)
def test_bad_settings_are_user_errors(bad: dict) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        SamplingParams(**bad)
