"""Tokenizer: text to ids and back over a `tokenizer.json`, exact at the level of bytes. No torch.

    tokenizer = Tokenizer.from_file("tokenizer.json")
    ids = tokenizer.encode("Hello")                  # never adds special tokens
    decoder = StreamDecoder(tokenizer)
    for id in ids:
        print(decoder.feed([id]), end="")            # only whole characters
    print(decoder.finish())

Two families are understood, by the tokenizer's decoder: byte-level BPE (GPT-2's alphabet, where every character of a
token stands for one byte) and SentencePiece style (U+2581 for a space, `<0xE2>` for a byte without a token). Text is
always "the bytes of all tokens, read as UTF-8, with U+FFFD in place of what is not UTF-8": stream and whole agree.

Run the tests: `pytest tests/data/test_tokenizer.py`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from slimba.errors import UserError

__all__ = ["StreamDecoder", "Tokenizer"]

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
SPACE_MARK = "\u2581"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's one printable character per byte: character -> byte. Bytes without a printable form move to 256 + n."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(b): b for b in printable}
    rest = [b for b in range(256) if chr(b) not in alphabet]
    return alphabet | {chr(256 + i): b for i, b in enumerate(rest)}


class Tokenizer:
    """A `tokenizer.json` with the few questions that engines and evaluation ask of it.

    `n_vocab` is the highest id + 1; ids beyond it (padding rows of an embedding) have no text. `special_ids` are the
    ids that `decode` leaves out. Raises UserError for a file that is no tokenizer or of neither family.
    """

    def __init__(self, inner: tokenizers.Tokenizer, path: Path | None = None) -> None:
        self.path = path
        self._inner = inner
        inner.no_truncation()
        inner.no_padding()
        self.n_vocab = max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = inner.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        content = inner.to_str()
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()  # of what it does, not of how its file is written
        self.byte_level, self.strips_first_space = _family(json.loads(content), path)
        self._alphabet = _byte_alphabet()
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`, or the one inside the directory `path`."""
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"tokenizer file {path} does not exist; --tokenizer takes a tokenizer.json")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises plain Exception for every kind of bad file
            raise UserError(f"{path} is not a readable tokenizer.json ({_one_line(e)})") from None
        return cls(inner, path)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens are never added, but their literal spelling in the text is recognised."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, spread over the cores by the library."""
        return [list(e.ids) for e in self._inner.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, continuation: bool = False) -> str:
        """Text of `ids` without special tokens.

        SentencePiece puts a space before the first word, which a text of its own loses again; `continuation` keeps it,
        for ids that follow other text.
        """
        decoder = StreamDecoder(self, continuation=continuation)
        return decoder.feed(ids) + decoder.finish()

    def token_bytes(self, id: int, *, skip_special: bool = True) -> bytes:
        """The bytes that `id` stands for: b"" for a special token (unless kept) and for an id without a token."""
        if skip_special and id in self.special_ids:
            return b""
        if id not in self._bytes:
            self._bytes[id] = self._find_bytes(id)
        return self._bytes[id]

    def id_of(self, token: str) -> int | None:
        """Id of a token by its spelling in the vocabulary, None where there is none."""
        found = self._inner.token_to_id(token)
        return None if found is None else int(found)

    @property
    def eot_id(self) -> int | None:
        """Id of the end-of-text token, by the names in use; None where the vocabulary has none of them."""
        return next((i for i in map(self.id_of, END_OF_TEXT) if i is not None), None)

    def _find_bytes(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id].encode()
        token = self._inner.id_to_token(id) if 0 <= id < self.n_vocab else None
        if token is None:
            return b""
        if self.byte_level:
            if all(c in self._alphabet for c in token):
                return bytes(self._alphabet[c] for c in token)
            return token.encode()
        byte = BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE_MARK, " ").encode()


class StreamDecoder:
    """Ids in, printable text out: a character that is not complete yet stays back until its last byte came.

    The pieces of any splitting of the ids, with `finish()` at the end, join to `tokenizer.decode(ids)`.
    """

    def __init__(self, tokenizer: Tokenizer, *, continuation: bool = True) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.strips_first_space and not continuation

    def feed(self, ids: Iterable[int]) -> str:
        """Text that became certain with these ids, possibly empty."""
        data = b"".join(self._tokenizer.token_bytes(int(i)) for i in ids)
        if self._strip and data:
            data, self._strip = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What was kept back: "" or U+FFFD for a character that never became whole. The decoder is fresh again."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _family(data: dict[str, Any], path: Path | None) -> tuple[bool, bool]:
    """(byte-level?, decoding drops one leading space?) of a tokenizer.json; UserError where it is of neither family."""
    parts = _flatten(data.get("decoder"), "decoders")
    names = {p.get("type") for p in parts}
    if "ByteLevel" in names:
        return True, False
    marks = any(p.get("type") == "Replace" and p.get("pattern", {}).get("String") == SPACE_MARK for p in parts)
    if "Metaspace" in names or "ByteFallback" in names or marks:
        strip = any(p.get("type") == "Strip" and p.get("content") == " " and p.get("start") for p in parts)
        meta = any(p.get("type") == "Metaspace" and p.get("prepend_scheme", "always") != "never" for p in parts)
        return False, strip or meta
    before = _flatten(data.get("pre_tokenizer"), "pretokenizers")
    if not parts and any(p.get("type") == "ByteLevel" for p in before):
        return True, False
    kind = ", ".join(sorted(map(str, names))) or "none"
    raise UserError(
        f"{path or 'tokenizer'}: its decoder ({kind}) is neither byte-level BPE nor SentencePiece style, "
        "whose tokens slimba can turn into bytes; use a tokenizer.json of one of these"
    )


def _flatten(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A decoder or pre-tokenizer, a `Sequence` taken apart."""
    if not part:
        return []
    return [p for inner in part[key] for p in _flatten(inner, key)] if part.get("type") == "Sequence" else [part]


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())[:160]
