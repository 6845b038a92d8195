"""Tokenizer and StreamDecoder: byte-exact tokens of both families, streaming, bad files. `pytest tests/data`."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models

from helpers.tiny import TEXT, VOCAB, tiny_tokenizer
from slimba.data.tokenizer import StreamDecoder, Tokenizer
from slimba.errors import UserError

HARD = 'Hello, 世界! 🙂🚀 naïve\n\tŁódź  "quoted" 𝔘𝔫𝔦 👩‍👩‍👧'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(tiny_tokenizer(tmp_path_factory.mktemp("tok")))


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """A byte-fallback BPE with the decoder chain that converted SentencePiece models carry."""
    pieces = ["<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", *"Helowrd", "\u2581He"]
    inner = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    inner.add_special_tokens(["<s>", "</s>"])
    inner.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(inner)


def stream(tokenizer: Tokenizer, ids: list[int], sizes: random.Random | None, continuation: bool) -> str:
    decoder, out, at = StreamDecoder(tokenizer, continuation=continuation), "", 0
    while at < len(ids):
        n = sizes.randint(1, 4) if sizes else 1
        piece = decoder.feed(ids[at : at + n])
        assert "\ufffd" not in piece
        out, at = out + piece, at + n
    return out + decoder.finish()


@pytest.mark.parametrize("text", [TEXT, HARD, "", " leading", "a"])
def test_round_trip_whole_and_streamed(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    for seed in range(5):
        assert stream(tokenizer, ids, random.Random(seed), continuation=True) == text


def test_emoji_is_split_across_tokens_and_kept_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("👩")
    assert len(ids) > 1, "the test needs a character of several tokens"
    decoder = StreamDecoder(tokenizer)
    assert [decoder.feed([i]) for i in ids] == [""] * (len(ids) - 1) + ["👩"]
    assert decoder.feed(ids[:-1]) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.feed(ids) == "👩", "finish leaves a fresh decoder"


def test_decode_agrees_with_the_library(tokenizer: Tokenizer, sentencepiece: Tokenizer) -> None:
    for t in (tokenizer, sentencepiece):
        for text in ("Hello world", HARD):
            ids = t.encode(text)
            assert t.decode(ids) == t._inner.decode(ids, skip_special_tokens=True) == text


def test_sentencepiece_bytes_and_leading_space(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("Hello 世")
    assert sentencepiece.decode(ids) == "Hello 世"
    assert sentencepiece.decode(ids, continuation=True) == " Hello 世"
    assert stream(sentencepiece, ids, None, continuation=False) == "Hello 世"
    assert sentencepiece.token_bytes(sentencepiece.id_of("<0xE4>")) == b"\xe4"
    assert sentencepiece.token_bytes(sentencepiece.id_of("\u2581He")) == b" He"


def test_specials_padding_and_names(tokenizer: Tokenizer) -> None:
    assert tokenizer.n_vocab == VOCAB
    assert tokenizer.eot_id == 0 == tokenizer.id_of("<|endoftext|>")
    assert tokenizer.token_bytes(0) == b""
    assert tokenizer.token_bytes(0, skip_special=False) == b"<|endoftext|>"
    assert tokenizer.token_bytes(VOCAB) == tokenizer.token_bytes(10**6) == b""
    assert tokenizer.id_of("no such token") is None
    assert tokenizer.encode("a<|endoftext|>b") == [*tokenizer.encode("a"), 0, *tokenizer.encode("b")]
    assert tokenizer.encode_batch(["a", "bc"]) == [tokenizer.encode("a"), tokenizer.encode("bc")]


def test_invalid_bytes_become_replacement_characters(tokenizer: Tokenizer) -> None:
    by_byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.n_vocab)}
    rng = random.Random(1)
    for _ in range(200):
        raw = bytes(rng.choice([0x41, 0x80, 0xC3, 0xE4, 0xB8, 0x96, 0xF0, 0x9F]) for _ in range(8))
        ids = [by_byte[bytes([b])] for b in raw]
        decoder = StreamDecoder(tokenizer)
        pieces = "".join(decoder.feed([i]) for i in ids) + decoder.finish()
        assert pieces == tokenizer.decode(ids) == raw.decode("utf-8", "replace")


def test_bad_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.from_file(tmp_path / "none.json")
    bad = tmp_path / "bad.json"
    for content in ("", "{", "{}", '{"model": 3}'):
        bad.write_text(content)
        with pytest.raises(UserError, match=r"not a readable tokenizer\.json") as e:
            Tokenizer.from_file(bad)
        assert "\n" not in str(e.value)
    data = json.loads(tiny_tokenizer(tmp_path / "t.json").read_text())
    data["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    bad.write_text(json.dumps(data))
    with pytest.raises(UserError, match="WordPiece"):
        Tokenizer.from_file(bad)
