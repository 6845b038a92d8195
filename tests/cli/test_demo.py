"""`slimba demo` end to end with a few seconds of distillation, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimba.checkpoints.packed import read_packed
from slimba.cli.main import main


def test_demo_compresses_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figures = tmp_path / "small", tmp_path / "figures.json"
    assert main(["demo", "--out", str(out), "--minutes", "0.02", "--json", str(figures), "--threads", "1"]) == 0
    record = json.loads(figures.read_text())
    teacher, student = record["teacher"], record["student"]
    assert 5.5 < teacher["file_bytes"] / student["file_bytes"] < 7
    assert student["file_bytes"] == (out / "model.safetensors").stat().st_size
    assert 1 < student["perplexity"] / teacher["perplexity"] < 20
    assert record["run"]["tokens"] == read_packed(out).provenance["tokens"]
    printed = capsys.readouterr().out
    for figure in (f"{student['file_bytes']:,}", f"{student['perplexity']:.2f}", f"{teacher['perplexity']:.2f}"):
        assert figure in printed
    assert student["text"] in printed


def test_demo_refuses_a_foreign_directory_before_it_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert main(["demo", "--out", str(tmp_path / "mine")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_demo_refuses_no_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--minutes", "0"]) == 2
    assert "--minutes" in capsys.readouterr().err
