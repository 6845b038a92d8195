"""`slimba bench`: the table, the JSON record, and bad input as one line with exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimba.cli.main import main


def test_bench_of_a_shape_prints_and_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    line = (
        f"bench --shape mamba2-130m --format dfssm --batch 1,2 --prompt-len 5 --new-tokens 5 --threads 1 --json {out}"
    )
    assert main(line.split()) == 0
    shown = capsys.readouterr().out
    assert "share of the limit" in shown and "first token" in shown
    record = json.loads(out.read_text())
    assert [row["batch"] for row in record["decode"]] == [1, 2]
    for row in record["decode"]:
        assert row["share"] == pytest.approx(row["bytes"] / record["bandwidth"] / row["time"])
        assert len(row["times"]) >= 5
    assert len(record["bandwidths"]) == 3 and record["bandwidth"] == max(record["bandwidths"])  # before and after each
    assert record["machine"]["threads"] == 1 and record["machine"]["isa"] and record["machine"]["date"]
    assert record["difference_to_naive_kernels"] < 1e-3


@pytest.mark.parametrize(
    "line,words",
    [
        ("bench", "MODEL or --shape"),
        ("bench x --shape mamba2-130m --format dfssm", "MODEL or --shape"),
        ("bench --shape mamba2-130m", "--format"),
        ("bench --shape mamba2-9t --format dfssm", "mamba2-9t"),
        ("bench --shape mamba2-130m --format int3", "int3"),
        ("bench --shape mamba2-130m --format dfssm --batch 1,x", "--batch"),
        ("bench --shape mamba2-130m --format dfssm --batch 0", "--batch"),
        ("bench --shape mamba2-130m --format dfssm --threads 0", "threads"),
        ("bench no-such-model", "no-such-model"),
    ],
)
def test_bad_input(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1
