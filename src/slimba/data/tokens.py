"""Training tokens that need not fit into memory: a text that is tokenised in the background, or files of ids.

    with open_tokens(["corpus.txt.zst"], tokenizer, bos_id=0, n_vocab=32000) as tokens:
        tokens.wait(1000)           # at least so many are there now, or all that the text has
        tokens.read(0, 1000)        # int32 [1000]

Ids of a text go to a cache of the user (cache.py) while they are read, so a second run, or a resumed one, finds
them there. `ids.npy` (one dimension, whole numbers) and `ids.bin` (plain uint16, uint32 for a vocabulary beyond 65,536,
little-endian) are used where they lie. Run the tests: `pytest tests/data/test_tokens.py`.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from slimba.data import hub
from slimba.data.cache import CacheEntry, Progress
from slimba.data.text import BATCH_CHARACTERS, TOKEN_FILES, documents_of, encode_batch, text_sources
from slimba.errors import UserError

if TYPE_CHECKING:
    from slimba.data.tokenizer import Tokenizer

__all__ = ["ArrayTokens", "TextTokens", "Tokens", "are_ids", "open_tokens"]

AHEAD = 1 << 25  # ids that are made before anybody asks for them
CHECKED = 1 << 24  # ids of a file that are looked at together
WHOLE = 1 << 30  # bytes; of a larger file only three samples are hashed
SAMPLE = 1 << 20
POLL_S = 0.05  # between looks at what another process makes


class Tokens(Protocol):
    """A long row of ids, of which the beginning may be there before the end."""

    @property
    def origin(self) -> dict[str, Any]:
        """Where the ids come from: equal for equal ids. For the record, and to know a run that is resumed."""
        ...

    def wait(self, n: int | None) -> int:
        """How many ids are there once `n` are, or all (also with None: all)."""
        ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]; `wait` has said that they are there."""
        ...


class ArrayTokens:
    """Ids in arrays, which may be mapped files, one after the other."""

    def __init__(self, *pieces: np.ndarray, origin: dict[str, Any] | None = None) -> None:
        self.pieces = pieces
        self.ends = np.cumsum([len(p) for p in pieces])
        self._origin = origin

    @property
    def origin(self) -> dict[str, Any]:
        if self._origin is None:
            digest = hashlib.sha256()
            for piece in self.pieces:
                digest.update(np.ascontiguousarray(piece, np.int32).tobytes())
            self._origin = {"token_sha256": digest.hexdigest()}
        return self._origin

    def wait(self, n: int | None) -> int:
        return int(self.ends[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        out = []
        for piece, end in zip(self.pieces, self.ends.tolist(), strict=True):
            first = end - len(piece)
            out.append(np.asarray(piece[max(start - first, 0) : max(stop - first, 0)], np.int32))
        return np.concatenate(out)

    def __enter__(self) -> ArrayTokens:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def are_ids(sources: Sequence[str | Path]) -> bool:
    """Whether the sources are files of ids, which need no tokenizer. UserError for a mixture with text."""
    kinds = [Path(s).suffix.lower() in TOKEN_FILES for s in sources]
    if any(kinds) and not all(kinds):
        ids, text = sources[kinds.index(True)], sources[kinds.index(False)]
        raise UserError(f"{ids} holds token ids and {text} text; give one kind")
    return any(kinds)


def open_tokens(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer | None,
    *,
    bos_id: int | None,
    n_vocab: int,
    split: str = "blank-line",
) -> ArrayTokens | TextTokens:
    """The ids of all sources end to end; a context manager, at whose end the work in the background stops.

    bos_id: stands before every document of a text. n_vocab: ids must be below it. UserError for sources that are not
    there, ids that do not fit, a text without a tokenizer.
    """
    if are_ids(sources):
        files = [_id_file(Path(s), n_vocab) for s in sources]
        return ArrayTokens(*files, origin={"ids": [_identity(str(s)) for s in sources]})
    if tokenizer is None:
        raise UserError("the text must be tokenised and there is no tokenizer; name one with --tokenizer")
    return TextTokens(text_sources(sources, split), tokenizer, bos_id, n_vocab, split)


def _id_file(path: Path, n_vocab: int) -> np.ndarray:
    """The ids in a .npy or .bin file, mapped; UserError for a file that is cut, of another kind, or out of range."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; give a .npy or .bin file of token ids")
    if path.suffix.lower() == ".npy":
        try:
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as e:
            raise UserError(f"{path} is not a whole .npy file ({' '.join(str(e).split())[:200]})") from None
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise UserError(f"{path} holds {ids.dtype} {list(ids.shape)}; ids are whole numbers in one dimension")
    else:
        dtype = _id_type(n_vocab)
        if path.stat().st_size % dtype.itemsize:
            wide = f"{dtype.itemsize} bytes each for a vocabulary of {n_vocab}"
            raise UserError(f"{path} is cut short or of another type: {path.stat().st_size} bytes are no ids of {wide}")
        ids = np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
    if not len(ids):
        raise UserError(f"{path} holds no ids")
    for at in range(0, len(ids), CHECKED):
        part = ids[at : at + CHECKED]
        low, high = int(part.min()), int(part.max())
        if low < 0 or high >= n_vocab:
            bad = low if low < 0 else high
            where = at + int(np.argmax(part == bad))
            raise UserError(f"{path} holds id {bad} (number {where}), outside the model's vocabulary of {n_vocab}")
    return np.asarray(ids)


def _id_type(n_vocab: int) -> np.dtype:
    """The smaller of uint16 and uint32 that holds ids below `n_vocab`."""
    return np.dtype("<u2" if n_vocab <= 1 << 16 else "<u4")


def _identity(source: str) -> dict[str, Any]:
    """What a source is, whatever its place and date: name, size, hash. A data set of the hub is its name."""
    if hub.is_dataset(source):
        return {"name": source, "files": [[name, size] for name, size, _ in hub.local_files(source)]}
    path = Path(source)
    size = path.stat().st_size
    with open(path, "rb") as f:
        if size <= WHOLE:
            return {"name": path.name, "bytes": size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}
        digest = hashlib.sha256()
        for at in (0, size // 2, size - SAMPLE):
            f.seek(at)
            digest.update(f.read(SAMPLE))
        return {"name": path.name, "bytes": size, "sample_sha256": digest.hexdigest()}


def _dates(source: str) -> list[list[Any]]:
    """What else the cache must know of a source whose identity does not see every byte."""
    if hub.is_dataset(source):
        return [list(file) for file in hub.local_files(source)]
    stat = Path(source).stat()
    return [[str(Path(source).resolve()), stat.st_mtime_ns]] if stat.st_size > WHOLE else []


class TextTokens:
    """The ids of a text, made in a thread of their own, up to AHEAD further than asked for.

    The library of tokenizers works outside Python's lock and on all cores, so a thread is as good as a process and ends
    with it. Several processes (torchrun's, or two runs on one text) take turns at one cache entry, a chunk each: who
    has the lock makes the next one, the others find it.
    """

    def __init__(self, sources: list[str], tokenizer: Tokenizer, bos_id: int | None, n_vocab: int, split: str) -> None:
        self.sources, self.tokenizer, self.bos_id, self.n_vocab, self.split = sources, tokenizer, bos_id, n_vocab, split
        self._origin = {
            "text": [_identity(s) for s in sources],
            "tokenizer_sha256": tokenizer.sha256,
            "split_documents": split,
            "bos_id": bos_id,
        }
        widest = max(tokenizer.n_vocab, (bos_id or 0) + 1)
        self.cache = CacheEntry(self._origin | {"dates": [_dates(s) for s in sources]}, _id_type(widest))
        self._at = self.cache.progress()
        self._texts: Iterator[tuple[int, int, str]] | None = None  # from where this process reads on
        self._read = Progress()  # what it has read to
        self._wanted: float = 0
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def origin(self) -> dict[str, Any]:
        return self._origin

    def wait(self, n: int | None) -> int:
        wanted = float("inf") if n is None else n
        with self._changed:
            if not self._enough(wanted):
                self._wanted = max(self._wanted, wanted)
                self._start()
                with _spinner(lambda: self._at.ids):
                    self._changed.wait_for(lambda: self._error is not None or self._enough(wanted))
                if self._error is not None:
                    raise self._error
            elif not self._at.ended and wanted > self._wanted:
                self._wanted = wanted  # there already, but the thread may go on ahead
                self._start()
            if self._at.highest >= self.n_vocab:
                raise UserError(
                    f"the tokenizer makes id {self._at.highest} of the text, outside the model's vocabulary of"
                    f" {self.n_vocab}; --tokenizer must name the one that the model was trained with"
                )
            return self._at.ids

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.cache.read(start, stop)

    def __enter__(self) -> TextTokens:
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=30)
            if self._thread.is_alive():  # waiting for a disk or a network; it ends with the process
                return
        self.cache.close()

    # ---------------------------------------------------------------- the thread

    def _enough(self, wanted: float) -> bool:
        return self._at.ended or self._at.ids >= wanted

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="tokenising", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._at.ids < self._wanted + AHEAD)
                    if self._closed:
                        return
                at = self._next()
                with self._changed:
                    self._at = at
                    self._changed.notify_all()
                    if at.ended:
                        return
        except BaseException as e:
            with self._changed:
                self._error = e
                self._changed.notify_all()

    def _next(self) -> Progress:
        """What is in the cache after one more chunk, by this process or another."""
        while not self._closed:
            with self.cache.locked() as mine:
                at = self.cache.progress()
                if at.ended or at.ids > self._at.ids:
                    return at
                if mine:
                    return self._make(at)
            time.sleep(POLL_S)
        return self._at

    def _make(self, at: Progress) -> Progress:
        """Tokenise the next chunk of text after `at` into the cache."""
        if self._texts is None or at != self._read:
            self._texts = self._texts_from(at)
        chunk: list[str] = []
        size, source, number = 0, at.source, at.documents
        while size < BATCH_CHARACTERS and (found := next(self._texts, None)):
            source, number, text = found
            chunk.append(text)
            size += len(text)
        ids = encode_batch(self.tokenizer, chunk, self.bos_id)
        highest = max(at.highest, int(ids.max(initial=-1)))
        self._read = Progress(at.ids + len(ids), highest, source, number, size < BATCH_CHARACTERS)
        self.cache.append(ids, self._read)
        return self._read

    def _texts_from(self, at: Progress) -> Iterator[tuple[int, int, str]]:
        """(number of the source, documents of it up to here, the document) from a place on."""
        for i in range(at.source, len(self.sources)):
            skip = at.documents if i == at.source else 0
            texts = documents_of(self.sources[i], self.split)
            for number, text in enumerate(islice(texts, skip, None), skip + 1):
                yield i, number, text


class _spinner:
    """`tokenising: 12,345,678 tokens` on a terminal while somebody waits."""

    def __init__(self, count: Callable[[], int]) -> None:
        self.count = count
        self.done = threading.Event()

    def __enter__(self) -> None:
        if sys.stderr.isatty():
            threading.Thread(target=self._show, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.done.set()

    def _show(self) -> None:
        from rich.console import Console

        with Console(stderr=True).status("tokenising") as status:
            while not self.done.wait(0.2):
                status.update(f"tokenising: {self.count():,} tokens")
