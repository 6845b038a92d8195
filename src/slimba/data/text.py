"""Text sources: files of plain text, JSON lines or Parquet, and `datasets`, become documents, one at a time.

    for document in documents(["train.txt.zst", "more.jsonl", "datasets:roneneldan/TinyStories"], "blank-line"): ...
    ids = encode_documents(tokenizer, documents(["valid.txt"]), bos_id=0)

Everything is read in blocks: a source may be larger than memory, a single document may not. Run the tests:
`pytest tests/data`.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from slimba.data import hub
from slimba.errors import UserError

if TYPE_CHECKING:
    from slimba.data.tokenizer import Tokenizer

__all__ = ["Split", "documents", "documents_of", "encode_batch", "encode_documents", "text_sources"]

Split = Literal["blank-line", "file"]
SPLITS = ("blank-line", "file")
BLANK_LINE = re.compile(r"\n[ \t]*\n+")
BATCH_CHARACTERS = 4_000_000  # one call of the tokenizer; it spreads a call over the cores
BLOCK = 1 << 20  # bytes of a file, or characters of a text, at a time
ZSTD_INPUT = 1 << 10  # bytes at a time; at the best compression that the format knows 32 MiB of text
TOKEN_FILES = (".npy", ".bin")


def documents(sources: Sequence[str | Path], split: Split = "blank-line") -> Iterator[str]:
    """Documents of all `sources` in order.

    A source is a file or `datasets:NAME` (hub.py). `blank-line`: a text file is cut at blank lines. `file`: a text file
    is one document. A row of a .jsonl or .parquet file (its `text` field) or of a data set is always one document.
    Raises UserError for a missing, empty, non-UTF-8 or unknown file.
    """
    for source in text_sources(sources, split):
        yield from documents_of(source, split)


def text_sources(sources: Sequence[str | Path], split: str) -> list[str]:
    """`sources` as they are opened, each checked to be there; UserError otherwise."""
    if split not in SPLITS:
        raise UserError(f"unknown way to split documents {split!r}, known are {', '.join(SPLITS)}")
    if not sources:
        raise UserError("no text given; name at least one file")
    for source in map(str, sources):
        if not hub.is_dataset(source) and not Path(source).is_file():
            raise UserError(
                f"{source} is not a file; give a .txt, .zst, .gz, .jsonl or .parquet file, or datasets:NAME"
            )
        if Path(source).suffix.lower() in TOKEN_FILES:
            raise UserError(f"{source} holds token ids and text is needed here; give the text that they were made from")
    return [str(source) for source in sources]


def documents_of(source: str, split: str) -> Iterator[str]:
    """Documents of one source that hold more than white space; UserError where there are none."""
    some = False
    for document in _all_documents(source, split):
        if document.strip():
            some = True
            yield document
    if not some:
        raise UserError(f"{source} holds no text")


def _all_documents(source: str, split: str) -> Iterator[str]:
    if hub.is_dataset(source):
        return hub.dataset_texts(source)
    path = Path(source)
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes[-1:] == [".parquet"]:
        return _parquet(path)
    if ".jsonl" in suffixes[-2:]:
        return _json_lines(path)
    pieces = _decoded(path)
    return _split_at_blank_lines(pieces) if split == "blank-line" else iter(["".join(pieces)])


def _blocks(path: Path) -> Iterator[bytes]:
    """The file's bytes, decompressed where its name says so."""
    with open(path, "rb") as f:
        if path.suffix.lower() == ".zst":
            yield from _gathered(_unzstd(iter(lambda: f.read(ZSTD_INPUT), b""), path))
        elif path.suffix.lower() == ".gz":
            try:
                with gzip.open(f) as plain:
                    yield from iter(lambda: plain.read(BLOCK), b"")
            except (OSError, EOFError, zlib.error) as e:
                raise UserError(f"{path} is not a whole gzip file ({e})") from None
        else:
            yield from iter(lambda: f.read(BLOCK), b"")


def _gathered(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of at least BLOCK."""
    held: list[bytes] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= BLOCK:
            yield b"".join(held)
            held, size = [], 0
    yield b"".join(held)


def _unzstd(blocks: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """All frames of a Zstandard file; a frame that is cut short is an error, not a shorter text."""
    import zstandard

    frame = None
    for raw in blocks:
        while raw:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(raw)
            except zstandard.ZstdError as e:
                raise UserError(f"{path} is not a whole Zstandard file ({e})") from None
            raw = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise UserError(f"{path} is not a whole Zstandard file (it is cut short)")


def _decoded(path: Path) -> Iterator[str]:
    """The text of a file, block by block."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = 0  # bytes before this block
    for block in _blocks(path):
        yield _utf8(decoder, block, at, path)
        at += len(block)
    yield _utf8(decoder, b"", at, path)


def _utf8(decoder: codecs.IncrementalDecoder, block: bytes, at: int, path: Path) -> str:
    """Text of `block`; an empty one is the end."""
    waiting = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {at - waiting + e.start}); convert it first") from None


def _split_at_blank_lines(pieces: Iterable[str]) -> Iterator[str]:
    """What BLANK_LINE.split makes of the whole text without the line breaks at its ends."""
    held: list[str] = []  # the beginning of a document, in which no blank line can be any more
    rest = ""
    begun = False
    for piece in pieces:
        rest += piece if begun else piece.lstrip("\n")
        begun = begun or bool(rest)
        start = 0
        for match in BLANK_LINE.finditer(rest):
            if match.end() == len(rest):
                break  # the next piece may go on with it
            held.append(rest[start : match.start()])
            yield "".join(held)
            held.clear()
            start = match.end()
        # a blank line that is not complete begins in the white space at the end
        safe = max(start, len(rest.rstrip(" \t\n")))
        held.append(rest[start:safe])
        rest = rest[safe:]
    held.append(rest.rstrip("\n"))
    yield "".join(held)


def _json_lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UserError(f'{path}, line {number}: not a JSON object with a string under "text"')
        yield text


def _lines(path: Path) -> Iterator[str]:
    held: list[str] = []
    for piece in _decoded(path):
        *whole, last = piece.split("\n")
        for line in whole:
            yield "".join([*held, line])
            held.clear()
        held.append(last)
    yield "".join(held)


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f'{path}: reading Parquet needs pyarrow; pip install "slimba[train]"') from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        if "text" not in table.schema_arrow.names:
            raise UserError(f"{path} has no column `text`, its columns are {', '.join(table.schema_arrow.names)}")
        for batch in table.iter_batches(columns=["text"], batch_size=1024):
            yield from (str(t) for t in batch.column(0).to_pylist() if t)
    except pyarrow.ArrowException as e:
        raise UserError(f"{path} is not a readable Parquet file ({e})") from None


def encode_batch(tokenizer: Tokenizer, docs: Sequence[str], bos_id: int | None) -> np.ndarray:
    """Ids of `docs` end to end, int32 [n]; `bos_id`, where given, stands before every document."""
    head = [] if bos_id is None else [bos_id]
    pieces = [np.asarray(head + ids, np.int32) for ids in tokenizer.encode_batch(docs)]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int32)


def encode_documents(tokenizer: Tokenizer, docs: Iterable[str], bos_id: int | None) -> np.ndarray:
    """`encode_batch` of any number of documents. For training text, which may be large, see tokens.py."""
    pieces: list[np.ndarray] = []
    batch: list[str] = []
    size = 0
    for doc in docs:
        batch.append(doc)
        size += len(doc)
        if size >= BATCH_CHARACTERS:
            pieces.append(encode_batch(tokenizer, batch, bos_id))
            batch, size = [], 0
    pieces.append(encode_batch(tokenizer, batch, bos_id))
    return np.concatenate(pieces)
