"""`slimba compress` and `slimba pretrain` as a user calls them: one good run each, and every bad input of the issue."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from helpers.tiny import TEXT, tiny_directory
from slimba.checkpoints.packed import read_packed
from slimba.cli.main import main
from slimba.runtime.load import load

QUICK = ["--set", "window=32", "--set", "batch=2", "--set", "calibration_windows=2", "--set", "rank=2"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a teacher, text and the inputs that are wrong."""
    monkeypatch.chdir(tmp_path)
    teacher = tiny_directory(tmp_path / "teacher")
    Path("text.txt").write_text(TEXT * 20, "utf-8")
    Path("empty.txt").write_text(" \n\n")
    Path("short.txt").write_text("Too short.")
    tiny_directory(tmp_path / "packed", preset="dfssm")
    shutil.copytree(teacher, "no-tokenizer", ignore=shutil.ignore_patterns("tokenizer.json"))
    tiny_directory(tmp_path / "nan", norm_eps=1e-5)
    spoil(tmp_path / "nan")
    return tmp_path


def spoil(model: Path) -> None:
    """Rewrite a float model with a NaN in a big matrix, checksums and all."""
    from slimba.checkpoints.packed import write_packed

    checkpoint = read_packed(model)
    tensors = {n: np.array(t) for n, t in checkpoint.tensors.items()}
    tensors["backbone.layers.1.mixer.out_proj.weight"][3, 4] = np.nan
    checkpoint.tensors = tensors
    write_packed(checkpoint, model, overwrite=True)


def test_compress_then_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["compress", "teacher", "out", "--data", "text.txt", "--tokens", "1280", "--json", "run.json", *QUICK]
    assert main(line) == 0
    record = json.loads(Path("run.json").read_text())
    assert (record["steps"], record["tokens"], record["recipe"]["rank"]) == (20, 1280, 2)
    assert "slimba inspect out" in capsys.readouterr().out
    assert len(load("out", backend="cpu").generate("The sea", max_new_tokens=5).ids) >= 1
    card = (here / "out" / "README.md").read_text()
    assert "1,280 tokens" in card and "text.txt" in card
    assert not (here / "out.work").exists()
    assert main(line) == 2, "an existing model is not overwritten unasked"
    assert main([*line, "--overwrite"]) == 0


@pytest.mark.parametrize("architecture", ["mamba2", "mamba1"])
def test_pretrain_then_compress(here: Path, architecture: str) -> None:
    sizes = [
        "--set",
        f"architecture={architecture}",
        "--set",
        "d_model=32",
        "--set",
        "n_layer=2",
        "--set",
        "headdim=16",
        "--set",
        "d_state=8",
    ]
    quick = ["--set", "window=32", "--set", "batch=2", "--tokens", "1280"]
    tokenizer = ["--tokenizer", "teacher/tokenizer.json"]
    assert main(["pretrain", "new", "--data", "text.txt", *tokenizer, *sizes, *quick]) == 0
    rows = [json.loads(row) for row in Path("new/training.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"]
    model = load("new", backend="cpu")
    assert (model.spec.architecture, model.spec.d_model) == (architecture, 32) and model.spec.add_bos
    assert main(["compress", "new", "out", "--data", "text.txt", "--tokens", "128", *QUICK]) == 0


BAD = {
    "NaN in the teacher": ("compress nan out --data text.txt", "out_proj.weight holds NaN"),
    "unknown method": ("compress teacher out --data text.txt --method dfsm", "unknown method 'dfsm', known are dfssm"),
    "unknown setting": ("compress teacher out --data text.txt --set rnak=4", "unknown setting 'rnak'"),
    "setting of a wrong type": ("compress teacher out --data text.txt --set rank=big", "setting rank"),
    "rank beyond the matrix": ("compress teacher out --data text.txt --set rank=33", "rank 33"),
    "rows that are not there": ("compress teacher out --data text.txt --set int8_rows=[q]", "'q'"),
    "empty text": ("compress teacher out --data empty.txt", "empty.txt holds no text"),
    "text shorter than a window": ("compress teacher out --data short.txt", "fewer than one window"),
    "missing text": ("compress teacher out --data nowhere.txt", "nowhere.txt is not a file"),
    "no tokens": ("compress teacher out --data text.txt --tokens 0", "tokens must be at least 1"),
    "no tokenizer": ("compress no-tokenizer out --data text.txt", "--tokenizer"),
    "a packed teacher": ("compress packed out --data text.txt", "needs float weights"),
    "no such teacher": ("compress elsewhere out --data text.txt", "elsewhere"),
    "unknown device": ("compress teacher out --data text.txt --device tpu", "unknown device 'tpu'"),
    "missing recipe": ("compress teacher out --data text.txt --recipe none.yaml", "none.yaml is not a file"),
    "pretrain without a tokenizer file": ("pretrain out --data text.txt --tokenizer none.json", "none.json"),
    "pretrain with an odd shape": (
        "pretrain out --data text.txt --tokenizer teacher/tokenizer.json --set headdim=7",
        "headdim 7 does not divide",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    line, message = BAD[name]
    before = sorted(here.rglob("*"))
    assert main(line.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert sorted(here.rglob("*")) == before
