"""The cache of token ids: a file per text and tokenizer that grows chunk by chunk and survives a kill.

`~/.cache/slimba/tokens/KEY/` (or `$XDG_CACHE_HOME/slimba`, or `$SLIMBA_CACHE_DIR`) holds `ids.bin`, plain uint16 or
uint32, and `progress.json`, which says how many of them count and from where the text goes on. The ids are on the disk
before the file that counts them is replaced. Anybody may delete an entry that no run uses. No torch.
Run the tests: `pytest tests/data/test_tokens.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from slimba.errors import UserError

__all__ = ["CacheEntry", "Progress", "cache_directory"]

LAYOUT = 1  # of the files of an entry


def cache_directory() -> Path:
    """Where slimba keeps what it can make again."""
    own = os.environ.get("SLIMBA_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimba"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a text is tokenised: ids that count, the highest of them, the source that goes on, its documents done."""

    ids: int = 0
    highest: int = -1
    source: int = 0
    documents: int = 0
    ended: bool = False


class CacheEntry:
    """The ids of what `key` describes, as `dtype`. UserError where the cache cannot be written."""

    def __init__(self, key: dict[str, Any], dtype: np.dtype) -> None:
        text = json.dumps([LAYOUT, dtype.str, key], sort_keys=True)
        self.folder = cache_directory() / "tokens" / hashlib.sha256(text.encode()).hexdigest()[:32]
        self.dtype = dtype
        with self._clear_errors():
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = os.open(self.folder / "ids.bin", os.O_RDWR | os.O_CREAT, 0o600)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)

    def close(self) -> None:
        os.close(self._file)
        os.close(self._lock)

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Whether no other process appends now; if so, none does inside."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as e:
            self._cannot(e)
        try:
            yield True
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def progress(self) -> Progress:
        """What counts. Less than is written where the entry was damaged: it is then made anew from the beginning."""
        try:
            found = Progress(**json.loads((self.folder / "progress.json").read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return Progress()
        whole = os.fstat(self._file).st_size >= found.ids * self.dtype.itemsize
        return found if whole else Progress()

    def append(self, ids: np.ndarray, after: Progress) -> None:
        """Write `ids` so that `after` holds; only inside `locked`."""
        data = memoryview(ids.astype(self.dtype).tobytes())
        at = (after.ids - len(ids)) * self.dtype.itemsize
        with self._clear_errors():
            while data:
                written = os.pwrite(self._file, data, at)
                data, at = data[written:], at + written
            os.fsync(self._file)
            partial = self.folder / "progress.partial"
            partial.write_text(json.dumps(dataclasses.asdict(after)), "utf-8")
            os.replace(partial, self.folder / "progress.json")

    def read(self, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start] of ids that count."""
        size = self.dtype.itemsize
        data = os.pread(self._file, (stop - start) * size, start * size)
        if len(data) != (stop - start) * size:
            raise UserError(f"the token cache {self.folder} was cut while it was used; delete it and begin again")
        return np.frombuffer(data, self.dtype).astype(np.int32)

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            self._cannot(e)

    def _cannot(self, e: OSError) -> NoReturn:
        what = f"the token cache {self.folder} cannot be written ({e.strerror})"
        raise UserError(f"{what}; set SLIMBA_CACHE_DIR to a directory with room") from None
