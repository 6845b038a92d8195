"""quamba2 on a real model, the bundled teacher: what each mode may cost, measured by the CPU engine on the file.

Half a minute on one core; run it with `pytest -m slow tests/ladder/test_quamba2_teacher.py`.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from slimba import compress
from slimba.evaluation.perplexity import evaluate
from slimba.runtime.load import load

TEXTS = Path(str(files("slimba.assets") / "demo-text"))
MOST = {"w8a8": 1.01, "w4a8": 1.03, "w4a16": 1.02}  # perplexity, in units of the float model's


def perplexity(model: str | Path, **how: str) -> float:
    loaded = load(model, backend="cpu", threads=1, **how)
    return evaluate(loaded, [TEXTS / "heldout.txt"], window=512, max_tokens=16385).perplexity


@pytest.mark.slow
def test_no_mode_costs_more_than_it_may(tmp_path: Path) -> None:
    floats = perplexity("demo-teacher")
    for mode, most in MOST.items():
        out = tmp_path / mode
        record = compress(
            "demo-teacher", out, method="quamba2", data=[TEXTS / "train.txt"], mode=mode, windows=16, device="cpu"
        )
        assert record["tokens"] == 16384
        ratio = perplexity(out) / floats
        assert 0.995 < ratio < most, mode
        assert perplexity(out, state_dtype="int8") / floats < most + 0.005, f"{mode} with an int8 state"
