"""The protocol of evaluation against sums done by hand. `pytest tests/evaluation/test_perplexity.py`."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

import slimba
from helpers.bigram import BigramEngine
from helpers.tiny import tiny_checkpoint, tiny_tokenizer
from slimba.data.tokenizer import Tokenizer
from slimba.errors import UserError
from slimba.evaluation.perplexity import byte_lengths, read_text
from slimba.runtime.api import LoadedModel
from slimba.runtime.scoring import score, window_starts

V = 304
TABLE = np.random.default_rng(0).standard_normal((V, V))


@pytest.fixture
def engine() -> BigramEngine:
    return BigramEngine(TABLE)


@pytest.fixture
def model(engine: BigramEngine, tmp_path: Path) -> LoadedModel:
    file = tiny_tokenizer(tmp_path / "tokenizer.json")
    return LoadedModel(engine, tiny_checkpoint(tokenizer=file), Tokenizer.from_file(file))


def by_hand(engine: BigramEngine, ids: list[int]) -> list[float]:
    return [-float(engine.log_p[a, b]) for a, b in itertools.pairwise(ids)]


@pytest.mark.parametrize(("n", "window", "scored"), [(9, 4, 8), (10, 4, 8), (8, 4, 4), (5, 4, 4), (7, 1, 6), (9, 8, 8)])
@pytest.mark.parametrize("batch", [1, 3])
def test_windows_without_overlap(engine: BigramEngine, n: int, window: int, scored: int, batch: int) -> None:
    ids = np.arange(n) % 7
    nll = score(engine, ids, window=window, batch=batch)
    np.testing.assert_allclose(nll, by_hand(engine, ids.tolist())[:scored])
    assert [w.tolist() for w in engine.windows] == [ids[i : i + window].tolist() for i in range(0, scored, window)]


def test_overlapping_windows_count_every_target_once(engine: BigramEngine) -> None:
    ids = np.random.default_rng(1).integers(0, V, 23)
    nll = score(engine, ids, window=8, stride=3, batch=2)
    starts = [0, 3, 6, 9, 12]  # 12 + 8 = 20 is the last target's index; a start of 15 would need id 23
    assert [w.tolist() for w in engine.windows] == [ids[s : s + 8].tolist() for s in starts]
    np.testing.assert_allclose(nll, by_hand(engine, ids.tolist())[: 12 + 8])


def test_perplexity_and_bits_per_byte_by_hand(model: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Grüße 世界\n\nthe sea\nand the ship\n\n\nend\n", encoding="utf-8")
    docs = ["Grüße 世界", "the sea\nand the ship", "end"]
    ids = [i for d in docs for i in (0, *model.need_tokenizer().encode(d))]
    window = len(ids) // 2 - 1
    result = slimba.evaluate(model, [file], window=window)
    nll = by_hand(model.engine, ids)[: 2 * window]
    scored = ids[1 : 2 * window + 1]
    size = sum(1 if i == 0 else len(model.need_tokenizer().token_bytes(i)) for i in scored)
    assert result.tokens == 2 * window and result.text_tokens == len(ids) and result.bytes == size
    assert result.perplexity == pytest.approx(math.exp(sum(nll) / len(nll)))
    assert result.bits_per_byte == pytest.approx(sum(nll) / math.log(2) / size)
    assert "id 0 before each" in result.protocol and result.backend == "bigram"


def test_all_bytes_count_when_all_tokens_do(model: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one 世界\n\ntwo 🙂", encoding="utf-8")
    text = read_text(model, [file])
    result = slimba.evaluate(model, text, window=len(text.ids) - 1)
    assert result.bytes == len("one 世界".encode()) + 1 + len("two 🙂".encode())


def test_document_start_and_cut(model: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one\n\ntwo")
    one, two = (model.need_tokenizer().encode(t) for t in ("one", "two"))
    assert read_text(model, [file]).ids.tolist() == [0, *one, 0, *two]
    assert read_text(model, [file], bos_id=None).ids.tolist() == [*one, *two]
    assert read_text(model, [file], bos_id=5).ids.tolist() == [5, *one, 5, *two]
    whole = read_text(model, [file], split_documents="file")
    assert whole.ids.tolist() == [0, *model.need_tokenizer().encode("one\n\ntwo")]
    cut = read_text(model, [file], max_tokens=3)
    assert cut.ids.tolist() == [0, *one, 0, *two][:3] and "first 3 tokens" in cut.protocol
    with pytest.raises(UserError, match="--bos-id 304"):
        read_text(model, [file], bos_id=304)
    with pytest.raises(UserError, match="--max-tokens"):
        read_text(model, [file], max_tokens=0)


def test_byte_lengths_cover_padding_rows(model: LoadedModel) -> None:
    lengths = byte_lengths(model.need_tokenizer(), V, 0)
    assert len(lengths) == V and lengths[0] == 1 and (lengths[300:] == 0).all() and (lengths[1:300] > 0).all()
    assert byte_lengths(model.need_tokenizer(), V, None)[0] == 0


def test_loaded_model_perplexity_is_the_same_arithmetic(model: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("the ship lay at anchor in the bay")
    got = slimba.evaluate(model, [file], window=6)
    assert model.perplexity("the ship lay at anchor in the bay", window=6) == pytest.approx(got.perplexity)
    assert model.perplexity(read_text(model, [file]).ids, window=6) == pytest.approx(got.perplexity)


def test_bad_sizes_and_texts(model: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 8 tokens and a window of 8 needs 9; give --window 7 or less"):
        window_starts(8, 8)
    for n, window, stride, message in [(0, 8, None, "empty"), (9, 0, None, "--window"), (9, 4, 5, "--stride is 5")]:
        with pytest.raises(UserError, match=message):
            window_starts(n, window, stride)
    with pytest.raises(UserError, match="empty"):
        model.perplexity("")
    with pytest.raises(UserError, match="outside the model's vocabulary"):
        model.perplexity([1, 2, 304], window=2)
    with pytest.raises(UserError, match="--batch"):
        score(model.engine, np.arange(9), window=4, batch=0)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(UserError, match="holds no text"):
        slimba.evaluate(model, [empty])


def test_likelihoods_that_are_not_finite_are_refused(engine: BigramEngine) -> None:
    engine.log_p[3] = math.nan
    with pytest.raises(UserError, match="not finite"):
        score(engine, np.arange(9) % 7, window=4)
