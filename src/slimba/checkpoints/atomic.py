"""Writing that either finishes or leaves no trace: directories and single files.

    with atomic_directory("model-1bit", overwrite=True) as tmp:
        (tmp / "config.json").write_text(...)
    atomic_write("figures.json", text)

The work goes to `.NAME.tmp-XXXXXXXX` beside the target (same file system), is synced to the disk and moved into place
in one step. The writer holds a lock on its temporary until then, so that one left by a killed process is known by
being unlocked; the next write to the same target removes it. POSIX only.

Run the tests: `pytest tests/checkpoints/test_atomic.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from slimba.errors import UserError

__all__ = ["atomic_directory", "atomic_write", "check_target"]

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fs.h


@contextlib.contextmanager
def atomic_directory(
    out: str | os.PathLike[str], *, overwrite: bool = False, marker: str = "config.json"
) -> Iterator[Path]:
    """Yield an empty directory that becomes `out` if the block ends well and vanishes if it does not.

    An existing `out` is refused unless it is empty or `overwrite` is set; it is then replaced only when it holds a file
    called `marker` (what we write does), so that `--overwrite` never deletes somebody's other files. The old directory
    stays complete until the new one is. UserError: refused target, no rights, no space left.
    """
    target = Path(out).expanduser().resolve()
    with _clear_errors(target):
        _recover(target)
        check_target(target, overwrite=overwrite, marker=marker)
    tmp, lock = _locked(target, directory=True)
    try:
        with _clear_errors(target):
            yield tmp
            _sync_tree(tmp)
            _move_into_place(tmp, target)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)  # after a swap this is the old directory, or nothing
        os.close(lock)


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Replace the file `path` by `data` (text as UTF-8) in one step. UserError: no rights, no space left."""
    target = Path(path).expanduser().resolve()
    if target.is_dir():
        raise UserError(f"{target} is a directory; give a file to write to")
    tmp, lock = _locked(target, directory=False)
    try:
        with _clear_errors(target), open(lock, "wb", closefd=False) as f:
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            os.fsync(lock)
            os.replace(tmp, target)
            _sync(target.parent)
    finally:
        tmp.unlink(missing_ok=True)
        os.close(lock)


def check_target(out: str | os.PathLike[str], *, overwrite: bool = False, marker: str = "config.json") -> None:
    """UserError when `atomic_directory` would refuse `out`: for long work, to be asked before it begins."""
    target = Path(out).expanduser().resolve()
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file; give a directory to write to")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{target} exists already; choose another name or pass --overwrite")
    if not (target / marker).exists():
        raise UserError(f"{target} holds no {marker}, so it is not replaced; choose another name or empty it yourself")


@contextlib.contextmanager
def _clear_errors(target: Path) -> Iterator[None]:
    """A full disk or a missing right becomes a UserError."""
    try:
        yield
    except OSError as e:
        if e.errno in NO_SPACE:
            raise UserError(f"no space left while writing {target}; nothing was kept, free some space first") from e
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"cannot write {e.filename or target}: {e.strerror}; choose another place") from e
        raise


def _locked(target: Path, *, directory: bool) -> tuple[Path, int]:
    """A new temporary beside `target` and the descriptor that holds its lock."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        tmp = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
        if directory:
            tmp.mkdir()
            lock = os.open(tmp, os.O_RDONLY)
        else:
            lock = os.open(tmp, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as e:
        if e.errno in NO_SPACE:
            raise UserError(f"no space left to write {target}; free some or write elsewhere") from e
        raise UserError(f"cannot write {target}: {e.strerror}; choose another place") from e
    return tmp, lock


def _remove_stale(target: Path) -> None:
    """Delete the temporaries of killed writers: those whose lock is free."""
    for path in target.parent.glob(f".{_escaped(target.name)}.tmp-*"):
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its writer lives
        else:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        finally:
            os.close(fd)


def _escaped(name: str) -> str:
    """`name` for a glob pattern."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _recover(target: Path) -> None:
    """Finish what a writer killed in the middle of `_move_into_place` left: the old output back, or away."""
    aside = _aside(target)
    if aside.is_dir():
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(target)


def _move_into_place(tmp: Path, target: Path) -> None:
    """`tmp` becomes `target`; an old directory there is swapped out in one step where the system can."""
    if not target.exists():
        tmp.rename(target)
    elif not _exchange(tmp, target):
        aside = _aside(target)
        target.rename(aside)
        try:
            tmp.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths atomically with Linux's renameat2; False where there is none."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return bool(renameat2 and renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0)


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
