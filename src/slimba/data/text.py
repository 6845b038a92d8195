"""Text sources: plain text, Zstandard, JSON lines and Parquet files become documents, documents become token ids.

    ids = encode_documents(tokenizer, documents(["train.txt.zst"], "blank-line"), bos_id=0)

Run the tests: `pytest tests/data`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from slimba.errors import UserError

if TYPE_CHECKING:
    from slimba.data.tokenizer import Tokenizer

__all__ = ["Split", "documents", "encode_documents"]

Split = Literal["blank-line", "file"]
SPLITS = ("blank-line", "file")
BLANK_LINE = re.compile(r"\n[ \t]*\n+")
BATCH_CHARACTERS = 4_000_000  # one call of the tokenizer; it spreads a call over the cores


def documents(sources: Sequence[str | Path], split: Split = "blank-line") -> Iterator[str]:
    """Documents of all `sources` in order.

    `blank-line`: a text file is cut at blank lines. `file`: a text file is one document. A row of a .jsonl or .parquet
    file (its `text` field) is always one document. Raises UserError for a missing, empty, non-UTF-8 or unknown file.
    """
    if split not in SPLITS:
        raise UserError(f"unknown way to split documents {split!r}, known are {', '.join(SPLITS)}")
    if not sources:
        raise UserError("no text given; name at least one file")
    for source in sources:
        path = Path(source)
        if not path.is_file():
            raise UserError(f"{path} is not a file; give a .txt, .zst, .jsonl or .parquet file")
        some = False
        for document in _documents_of(path, split):
            if document.strip():
                some = True
                yield document
        if not some:
            raise UserError(f"{path} holds no text")


def _documents_of(path: Path, split: Split) -> Iterator[str]:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes[-1:] == [".parquet"]:
        yield from _parquet(path)
    elif ".jsonl" in suffixes[-2:]:
        yield from _json_lines(path)
    else:
        text = _read(path)
        yield from BLANK_LINE.split(text.strip("\n")) if split == "blank-line" else [text]


def _read(path: Path) -> str:
    raw = path.read_bytes()
    if path.suffix.lower() == ".zst":
        raw = _unzstd(raw, path)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}); convert it first") from None


def _unzstd(raw: bytes, path: Path) -> bytes:
    """All frames of a Zstandard file; a frame that is cut short is an error, not a shorter text."""
    import zstandard

    out = []
    while raw:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            out.append(frame.decompress(raw))
        except zstandard.ZstdError as e:
            raise UserError(f"{path} is not a whole Zstandard file ({e})") from None
        if not frame.eof:
            raise UserError(f"{path} is not a whole Zstandard file (it is cut short)")
        raw = frame.unused_data
    return b"".join(out)


def _json_lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UserError(f'{path}, line {number}: not a JSON object with a string under "text"')
        yield text


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
        for batch in table.iter_batches(columns=["text"]):
            yield from (str(t) for t in batch.column(0).to_pylist() if t)
    except pyarrow.ArrowException as e:
        raise UserError(f"{path} is not a readable Parquet file ({e})") from None


def encode_documents(tokenizer: Tokenizer, docs: Iterable[str], bos_id: int | None) -> np.ndarray:
    """Ids of all documents end to end, int32 [n]; `bos_id`, where given, stands before every document."""
    pieces: list[np.ndarray] = []
    batch: list[str] = []
    size = 0

    def flush() -> None:
        for ids in tokenizer.encode_batch(batch):
            head = [] if bos_id is None else [bos_id]
            pieces.append(np.asarray(head + ids, np.int32))
        batch.clear()

    for doc in docs:
        batch.append(doc)
        size += len(doc)
        if size >= BATCH_CHARACTERS:
            flush()
            size = 0
    flush()
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
