"""`OUT.work/`: where a run keeps its settings, log and checkpoint until OUT is complete.

Tests: the resume tests of tests/methods/test_dfssm.py and tests/training.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from slimba.errors import UserError

__all__ = ["finish_work", "prepare_work", "work_of"]


def work_of(out: Path) -> Path:
    """The work directory of `out`, beside it."""
    return out.with_name(out.name + ".work")


def prepare_work(work: Path, record: dict[str, Any], resume: bool, kept: str = "checkpoint-*/.metadata") -> bool:
    """Make the work directory; False when the run with the same settings is to be continued there.

    `kept` is what a run that can be continued has left in it, as a pattern.
    Raises UserError for `resume` with other settings than the interrupted run's, naming the first that differs.
    """
    settings_file = work / "settings.json"
    text = json.dumps(record, indent=1, sort_keys=True)
    if resume and settings_file.is_file():
        before, now = json.loads(settings_file.read_text("utf-8")), json.loads(text)
        for k in now:
            if before.get(k) != now[k]:
                was = f"{k} differs from the interrupted run's in {settings_file}"
                raise UserError(f"--resume: {was}; use its settings or start anew")
        if any(work.glob(kept)):
            return False
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    settings_file.write_text(text, "utf-8")
    return True


def finish_work(work: Path, out: Path) -> None:
    """Keep the log beside the finished model and drop the rest."""
    shutil.copy(work / "log.jsonl", out / "training.jsonl")
    shutil.rmtree(work)
