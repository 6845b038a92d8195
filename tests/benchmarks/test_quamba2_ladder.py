"""The ladder of quamba2: every arm is a valid recipe, and one runs from text to a row. See
benchmarks/quamba2_ladder.py.

Run: `pytest tests/benchmarks/test_quamba2_ladder.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import quamba2_ladder as ladder

from helpers.tiny import TEXT, tiny_directory
from slimba.methods.quamba2.recipe import QuambaRecipe
from slimba.training.recipes import load_recipe


@pytest.mark.parametrize("name", ladder.ARMS)
def test_every_arm_is_a_recipe_of_its_own(name: str) -> None:
    recipes = {n: load_recipe(QuambaRecipe, "quamba2.yaml", None, ladder.SHORT | s) for n, s in ladder.ARMS.items()}
    assert [n for n, r in recipes.items() if r == recipes[name]] == [name]


def test_rows_are_measured_once_and_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_directory(tmp_path / "teacher")
    text, out = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text(TEXT * 4)
    monkeypatch.setitem(ladder.ARMS, "w8a8", {"mode": "w8a8", "window": 32, "windows": 4})
    command = ["ladder", "--teacher", str(teacher), "--data", str(text), "--text", str(text), "--out", str(out)]
    command += ["--arms", "float,w8a8", "--window", "64", "--threads", "1", "--keep", str(tmp_path / "models")]
    for state, rows in ((None, 2), (None, 2), ("int8", 4)):
        monkeypatch.setattr(sys, "argv", command + ([] if state is None else ["--state", state]))
        ladder.main()
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(found) == rows
    floats, ours = found[:2]
    assert ours["perplexity"] == pytest.approx(floats["perplexity"], rel=0.02) and ours != floats
    assert ours["file_bytes"] == sum(f.stat().st_size for f in (tmp_path / "models/w8a8").glob("*.safetensors"))
    assert found[3]["state"] == "int8" and found[3]["perplexity"] != ours["perplexity"]
