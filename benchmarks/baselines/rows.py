"""A file of JSON lines, one finished arm a line: what a run has already done survives an interruption.

    rows = Rows(Path("rows.jsonl"))
    if not rows.find(arm="sign", lr=0.01, seed=0): rows.add({...})

Processes that share the work (shards) each write a file of their own and read those of the others.

Tests: `pytest tests/benchmarks/test_ptq.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimba.errors import UserError

__all__ = ["Rows", "read_rows"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every whole line; the last one may be cut (a kill, or another shard at work) and is left out.

    UserError: another line is not a JSON object.
    """
    out: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    for n, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError
        except ValueError:
            if n == len(lines):
                break
            raise UserError(f"{path}, line {n}: not a JSON row; mend or remove the file") from None
        out.append(row)
    return out


class Rows:
    """The rows of `path`, which this process alone writes, and of the files `beside` it, which others write."""

    def __init__(self, path: Path, beside: Sequence[Path] = ()) -> None:
        self.path, self.beside = path, [p for p in beside if p != path]
        self.mine = read_rows(path)
        if path.is_file() and not path.read_bytes().endswith(b"\n"):  # cut by a kill: the cut line goes
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(r) + "\n" for r in self.mine), encoding="utf-8")
            os.replace(partial, path)

    def find(self, **keys: Any) -> list[dict[str, Any]]:
        """The rows, of all files as they are now, that have these values."""
        rows = [*self.mine, *(r for p in self.beside for r in read_rows(p))]
        return [r for r in rows if all(r.get(k) == v for k, v in keys.items())]

    def add(self, *rows: dict[str, Any]) -> None:
        """All in one write: the variants of an arm are there together or not at all."""
        self.mine += rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows))
            f.flush()
            os.fsync(f.fileno())
