"""Teacher against student with probabilities known by hand. `pytest tests/evaluation/test_compare.py`."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.bigram import BigramEngine
from helpers.tiny import tiny_checkpoint
from slimba.errors import UserError
from slimba.evaluation import compare as module
from slimba.evaluation.compare import compare
from slimba.evaluation.perplexity import TextIds
from slimba.runtime.api import LoadedModel
from slimba.runtime.scoring import score

V = 12
RNG = np.random.default_rng(0)
TEXT = TextIds(RNG.integers(0, V, 41).astype(np.int32), np.ones(V, np.int64), "random ids")


def loaded(table: np.ndarray) -> LoadedModel:
    return LoadedModel(BigramEngine(table), tiny_checkpoint())


@pytest.mark.parametrize("chunk", [64_000_000, 4 * V * 2 * 3])
def test_figures_by_hand(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    a = RNG.standard_normal((V, V))
    b = a + 0.5 * RNG.standard_normal((V, V))
    teacher, student = loaded(a), loaded(b)
    result = compare(teacher, student, TEXT, window=10, batch=2)
    x = TEXT.ids[:40]
    p, q = teacher.engine.log_p[x], student.engine.log_p[x]
    assert result.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), abs=1e-5)
    assert result.agreement == (p.argmax(-1) == q.argmax(-1)).mean()
    for got, model in ((result.teacher, teacher), (result.student, student)):
        assert got.perplexity == pytest.approx(np.exp(score(model.engine, TEXT.ids, window=10).mean()), rel=1e-5)
        assert got.tokens == got.bytes == 40
    assert result.ratio == pytest.approx(result.student.perplexity / result.teacher.perplexity)


def test_a_model_against_itself() -> None:
    model = loaded(RNG.standard_normal((V, V)))
    result = compare(model, model, TEXT, window=10)
    assert (result.ratio, result.agreement) == (1, 1) and abs(result.kl) < 1e-6


def test_different_vocabularies_are_refused() -> None:
    with pytest.raises(UserError, match="different vocabularies, 12 and 13"):
        compare(loaded(np.zeros((V, V))), loaded(np.zeros((V + 1, V + 1))), TEXT, window=10)
