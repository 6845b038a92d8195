"""Atomic writing: success, failure at every point, a full disk, kill -9.

Run: pytest tests/checkpoints/test_atomic.py
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from slimba.checkpoints import atomic
from slimba.checkpoints.atomic import atomic_directory, atomic_write, check_target
from slimba.errors import UserError


def write_model(out: Path, text: str, **kwargs: bool) -> None:
    with atomic_directory(out, **kwargs) as tmp:
        (tmp / "config.json").write_text(text)
        (tmp / "sub").mkdir()
        (tmp / "sub" / "data").write_bytes(b"x" * 1000)


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_directory_appears_whole_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "model"
    with atomic_directory(out) as tmp:
        (tmp / "config.json").write_text("new")
        assert not out.exists()
        assert tmp.parent == out.parent
    assert (out / "config.json").read_text() == "new"
    assert names(out.parent) == ["model"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_nothing_and_keeps_the_old(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "model"
    with pytest.raises(error), atomic_directory(out) as tmp:
        (tmp / "config.json").write_text("half")
        raise error
    assert names(tmp_path) == []
    write_model(out, "old")
    with pytest.raises(error), atomic_directory(out, overwrite=True) as tmp:
        (tmp / "config.json").write_text("half")
        raise error
    assert names(tmp_path) == ["model"]
    assert (out / "config.json").read_text() == "old"


def test_existing_targets(tmp_path: Path) -> None:
    out = tmp_path / "model"
    out.mkdir()
    write_model(out, "one")  # empty: nothing to lose
    with pytest.raises(UserError, match="--overwrite"):
        write_model(out, "two")
    with pytest.raises(UserError, match="--overwrite"):
        check_target(out)
    check_target(out, overwrite=True)
    write_model(out, "two", overwrite=True)
    assert (out / "config.json").read_text() == "two"
    assert names(tmp_path) == ["model"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        write_model(tmp_path / "file", "three", overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        write_model(tmp_path / "photos", "three", overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "cat"


@pytest.mark.parametrize("fail_second", [False, True])
def test_swap_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_second: bool) -> None:
    """Where the system cannot swap two names at once: two renames, rolled back when the second fails."""
    out = tmp_path / "model"
    write_model(out, "old")
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    rename, calls = Path.rename, []

    def counted(self: Path, target: Path) -> Path:
        calls.append(self.name)
        if fail_second and len(calls) == 2:
            raise OSError(errno.EIO, "broken disk")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", counted)
    if fail_second:
        with pytest.raises(OSError, match="broken disk"):
            write_model(out, "new", overwrite=True)
    else:
        write_model(out, "new", overwrite=True)
    assert (out / "config.json").read_text() == ("old" if fail_second else "new")
    assert names(tmp_path) == ["model"]


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    """The old output was aside and nothing in its place: the next write first puts it back."""
    out = tmp_path / "model"
    write_model(out, "old")
    out.rename(tmp_path / ".model.old")
    with pytest.raises(UserError, match="exists already"):
        write_model(out, "new")
    assert (out / "config.json").read_text() == "old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_is_one_clear_line(tmp_path: Path, code: int) -> None:
    out = tmp_path / "model"
    write_model(out, "old")
    with pytest.raises(UserError, match="no space left"), atomic_directory(out, overwrite=True) as tmp:
        (tmp / "config.json").write_text("half")
        raise OSError(code, os.strerror(code))
    assert (out / "config.json").read_text() == "old"
    assert names(tmp_path) == ["model"]


def run_child(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_kill_during_writing(tmp_path: Path) -> None:
    """kill -9 in the middle: the old output is intact, and the next write removes what was left."""
    out = tmp_path / "model"
    write_model(out, "old")
    child = run_child(
        """
        import sys, time
        from slimba.checkpoints.atomic import atomic_directory
        with atomic_directory(sys.argv[1], overwrite=True) as tmp:
            (tmp / "config.json").write_text("half")
            print("writing", flush=True)
            time.sleep(60)
        """,
        out,
    )
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "writing"
    (left,) = [n for n in names(tmp_path) if n != "model"]
    assert left.startswith(".model.tmp-")
    write_model(tmp_path / "other", "x")  # another target does not touch it
    assert left in names(tmp_path)
    write_model(out, "newer", overwrite=True)  # nor does a second writer while the first one lives
    assert left in names(tmp_path)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert (out / "config.json").read_text() == "newer"
    write_model(out, "newest", overwrite=True)
    assert names(tmp_path) == ["model", "other"]


def test_file_size_limit(tmp_path: Path) -> None:
    """A real refusal by the system, in the middle of a file."""
    atomic_write(tmp_path / "a.txt", "old")
    child = run_child(
        """
        import resource, sys
        from slimba.checkpoints.atomic import atomic_write
        from slimba.errors import UserError
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            atomic_write(sys.argv[1], b"x" * 5000)
        except UserError as e:
            print(e)
        """,
        tmp_path / "a.txt",
    )
    assert "no space left" in child.communicate()[0]
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_file(tmp_path: Path) -> None:
    atomic_write(tmp_path / "new" / "a.txt", "één")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "één".encode()
    atomic_write(tmp_path / "new" / "a.txt", b"two")
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"two"
    assert names(tmp_path / "new") == ["a.txt"]
    with pytest.raises(UserError, match="is a directory"):
        atomic_write(tmp_path / "new", "x")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        atomic_write(tmp_path / "file" / "a.txt", "x")
    with pytest.raises(UserError, match="cannot write"):
        write_model(tmp_path / "file" / "model", "x")
