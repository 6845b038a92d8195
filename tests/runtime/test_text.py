"""Stop strings and streams, in every splitting of the ids. `pytest tests/runtime/test_text.py`."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest

from helpers.tiny import tiny_tokenizer
from slimba.data.tokenizer import Tokenizer
from slimba.errors import UserError
from slimba.runtime.text import StopStrings, TextStream


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(tiny_tokenizer(tmp_path_factory.mktemp("tok")))


def cut(pieces: list[str], stop: list[str]) -> tuple[str, bool]:
    matcher = StopStrings(stop)
    out = "".join(map(matcher.feed, pieces)) + matcher.finish()
    return out, matcher.hit


def reference(text: str, stop: list[str]) -> tuple[str, bool]:
    """Letter by letter: the first prefix of the text that ends with a stop string, without the earliest such string."""
    for n in range(len(text) + 1):
        found = [n - len(s) for s in stop if text[:n].endswith(s)]
        if found:
            return text[: min(found)], True
    return text, False


def test_stop_strings_do_not_depend_on_the_pieces() -> None:
    for letters in itertools.product("ab", repeat=7):
        text = "".join(letters)
        for stop in (["aab"], ["abb", "bb"], ["abab", "ba"], ["bbbb"]):
            want = reference(text, stop)
            for seed in range(3):
                rng, pieces, rest = random.Random(seed), [], text
                while rest:
                    n = rng.randint(1, 4)
                    pieces, rest = [*pieces, rest[:n]], rest[n:]
                assert cut(pieces, stop) == want, (text, stop, pieces)


def test_no_part_of_a_stop_string_is_emitted() -> None:
    matcher = StopStrings(["<end>"])
    assert [matcher.feed(c) for c in "ab<en<end>cd"] == ["a", "b", "", "", "", "<en", "", "", "", "", "", ""]
    assert matcher.hit and matcher.finish() == ""


def test_what_only_began_like_a_stop_string_comes_at_the_end() -> None:
    assert cut(["ab", "<en"], ["<end>"]) == ("ab<en", False)
    with pytest.raises(UserError, match="empty stop string"):
        StopStrings(["a", ""])


def pieces_of(ids: list[int], size: int, closed: list[bool] | None = None) -> Iterator[np.ndarray]:
    try:
        for at in range(0, len(ids), size):
            yield np.array([ids[at : at + size]], np.int32)
    finally:
        if closed is not None:
            closed.append(True)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_stream_joins_to_the_text(tokenizer: Tokenizer, size: int) -> None:
    text = "Grüße 👩‍👩‍👧 aus 北京 today"
    stream = TextStream(pieces_of(tokenizer.encode(text), size), tokenizer)
    assert "".join(stream) == text == stream.generation.text
    assert stream.generation.finish_reason == "length"
    assert stream.generation.ids == tokenizer.encode(text)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_stop_string_across_tokens_cuts_text_and_ids(tokenizer: Tokenizer, size: int) -> None:
    ids = tokenizer.encode("one two 世界 three four")
    stream = TextStream(pieces_of(ids, size), tokenizer, stop=["界 th", "never"])
    assert "".join(stream) == "one two 世" == stream.generation.text
    assert stream.generation.finish_reason == "stop"
    assert tokenizer.decode(stream.generation.ids).startswith("one two 世界 th")
    assert not tokenizer.decode(stream.generation.ids[:-1]).startswith("one two 世界 th")


def test_stop_id_and_padding_end_the_stream(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("ab"), 0, -1, -1]
    stream = TextStream(pieces_of(ids, 2), tokenizer, stop_ids=(0,))
    assert "".join(stream) == "ab"
    assert stream.generation.finish_reason == "eos" and stream.generation.ids == ids[:-2]


def test_incomplete_character_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a👩")[:-1]
    assert "".join(TextStream(pieces_of(ids, 1), tokenizer)) == "a\ufffd"


def test_closing_a_stream_stops_the_engine(tokenizer: Tokenizer) -> None:
    closed: list[bool] = []
    stream = TextStream(pieces_of(tokenizer.encode("abcdef"), 1, closed), tokenizer)
    next(stream)
    stream.close()
    assert closed == [True]


def test_without_a_tokenizer_ids_come_and_stop_strings_are_refused() -> None:
    stream = TextStream(pieces_of([5, 6, 7], 2), None)
    assert list(stream) == [] and stream.generation.ids == [5, 6, 7] and stream.generation.text is None
    with pytest.raises(UserError, match="--tokenizer"):
        TextStream(pieces_of([5], 1), None, stop=["a"])
