"""A file of JSON lines, one finished arm a line: what a run has already done survives an interruption.

    rows = Rows(Path("rows.jsonl"))
    if not rows.has(arm="sign", lr=0.01, seed=0): rows.add({...})

Tests: `pytest tests/benchmarks/test_run_baselines.py`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from slimba.errors import UserError

__all__ = ["Rows", "read_rows"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every whole line; the last one may have been cut by a kill and is dropped. UserError: other lines are broken."""
    out: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    for n, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError
        except ValueError:
            if n == len(lines) and not line.endswith("\n"):
                break
            raise UserError(f"{path}, line {n}: not a JSON row; mend or remove the file") from None
        out.append(row)
    return out


class Rows:
    """The rows of a file, and of other files written beside it by other shards."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read_rows(path)
        if path.is_file() and not path.read_bytes().endswith(b"\n"):  # cut by a kill: the cut line goes
            self._write(self.rows)

    def has(self, **keys: Any) -> bool:
        return any(all(row.get(k) == v for k, v in keys.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
            f.flush()
            os.fsync(f.fileno())

    def _write(self, rows: list[dict[str, Any]]) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        os.replace(partial, self.path)
