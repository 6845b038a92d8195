"""The quality table: what is chosen, what is averaged, who is on the frontier.

Run: `pytest tests/benchmarks/test_quality_table.py`.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quality_table import baselines, with_frontier

from helpers.tiny import tiny_checkpoint, tiny_directory
from slimba.checkpoints.inventory import inventory_of
from slimba.checkpoints.packed import write_packed
from slimba.checkpoints.reader import open_checkpoint

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "baselines" / "quality_table.py"


def row(variant: str, lr: float, seed: int, budget: int, valid: float, test: float | None, **more: Any) -> dict:
    figures: dict[str, Any] = {"valid": {"perplexity": valid, "bits_per_byte": 1.3}}
    if test is not None:
        figures["test"] = {"perplexity": test, "bits_per_byte": 1.2, "protocol": "p", "tokens": 960}
    return dict(
        arm=variant.split("-")[0], variant=variant, kind="trained", lr=lr, seed=seed, budget=budget, tokens=budget,
        file_bytes=1000, bits_per_projection_weight=1.1, simulated=False, seconds=4.0, device="H100", embedding="int8",
        about="about", curve=[[100, 1.0], [200, 0.5]],
    ) | figures | more  # fmt: skip


def test_the_best_rate_at_the_most_tokens_is_chosen_and_its_seeds_are_averaged() -> None:
    rows = [row("sign", lr, 0, 100, valid, None) for lr, valid in ((0.003, 41.0), (0.01, 40.0), (0.03, 45.0))]
    rows += [row("sign", 0.01, s, 400, 33.0 + s, 30.0 + s) for s in (1, 0, 2)]
    rows += [row("sign", 0.003, 0, 400, 34.9, 29.0)]  # better on test, but test does not choose
    rows += [row("sign", 0.5, 0, 200, 20.0, 20.0)]  # fewer tokens
    rows += [row("sign", 0.01, 0, 400, 50.0, 50.0, embedding="int4")]
    (arm, other), tried = baselines(rows)
    assert arm["name"] == "sign" and arm["lr"] == 0.01 and arm["seeds"] == [0, 1, 2]
    assert arm["test"]["perplexity"] == {"mean": 31.0, "sd": 1.0, "each": [30.0, 31.0, 32.0]}
    assert other["name"] == "sign, int4 embedding" and other["test"]["perplexity"]["sd"] is None
    assert len(tried) == 5 and {t["lr"] for t in tried} == {0.003, 0.01, 0.03, 0.5}


def test_the_better_grid_of_a_family_is_chosen_by_valid() -> None:
    rows = []
    for name, valid, test in (("gptq-int2", 90.0, 80.0), ("gptq-int2-half", 70.0, 81.0)):
        r = row(name, 0, 0, 0, valid, test)
        rows.append({k: v for k, v in r.items() if k not in ("variant", "lr", "budget")})
        rows[-1] |= {"family": "gptq-int2", "arm": name, "kind": "post-training"}
    (arm,), tried = baselines(rows)
    assert arm["test"]["perplexity"]["mean"] == 81.0 and [t["arm"] for t in tried] == ["gptq-int2"]


def arm(name: str, size: int, perplexity: float, family: str = "baseline") -> dict:
    return dict(name=name, family=family, file_bytes=size, test={"perplexity": {"mean": perplexity}})


def test_frontier_and_who_beats_whom() -> None:
    arms = [
        arm("a", 10, 30.0),
        arm("b", 20, 25.0),
        arm("c", 20, 26.0),
        arm("d", 30, 25.0),
        arm("mine", 15, 25.5, "ours"),
    ]
    ranked = with_frontier(arms)
    assert [a["name"] for a in ranked] == ["a", "mine", "b", "c", "d"]
    assert [a["name"] for a in ranked if a["frontier"]] == ["a", "mine", "b"]
    assert {a["name"]: a["beaten_by"] for a in ranked if "beaten_by" in a} == {
        "a": None,
        "b": None,
        "c": "mine",
        "d": None,
    }
    twins = with_frontier([arm("x", 10, 30.0), arm("y", 10, 30.0)])
    assert all(a["frontier"] for a in twins), "equal ones do not beat each other"


def measured(folder: Path, model: Path, perplexity: float) -> Path:
    record = dict(model=str(model), text=["texts/test.txt"], perplexity=perplexity, bits_per_byte=1.25, tokens=900)
    record |= dict(nll=perplexity * 100, bytes=3000, text_tokens=1000, window=64, stride=64, protocol="p")
    file = folder / f"eval-{model.name}.json"
    file.write_text(json.dumps(record | dict(backend="cpu", state_dtype="float32", seconds=0.5)))
    return file


def test_the_script_gathers_everything(tmp_path: Path) -> None:
    teacher = tiny_directory(tmp_path / "teacher", preset="float32")
    files, models = [measured(tmp_path, teacher, 17.0)], []
    for seed, perplexity in ((0, 20.0), (1, 22.0)):
        made = tiny_checkpoint(preset="dfssm", seed=seed)
        made.provenance = {"method": "dfssm", "recipe": {"rank": 4}, "seed": seed, "tokens": 4000, "seconds": 3.0}
        models.append(write_packed(made, tmp_path / f"best-s{seed}"))
        (models[-1] / "training.jsonl").write_text('{"step": 1, "tokens": 9, "kl": 2.5}\n')
        files.append(measured(tmp_path, models[-1], perplexity))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row("sign", 0.01, 0, 400, 33.0, 30.0)) + "\n")
    screens, state, out = tmp_path / "screens.jsonl", tmp_path / "state.json", tmp_path / "table.json"
    ablations: list[dict] = [{"arm": "teacher", "valid_ppl": 27.3}]
    for name, settings in (("base", {"lr": "1"}), ("flat", {"lr": "1", "rank": "0"})):
        for s in (0, 1):
            settings = settings | {"seed": str(s)}
            ablations.append(dict(arm=f"{name}-{s}", settings=settings, seed=s, tokens=800, valid_ppl=30 + s, bits=1.9))
    ablations.append({"arm": "wild", "settings": {"lr": "9"}, "tokens": 800, "error": "the loss is not finite"})
    screens.write_text("".join(json.dumps(r) + "\n" for r in ablations))
    state.write_text('{"rows": []}')
    command = [sys.executable, str(SCRIPT), "--teacher", str(teacher), "--rows", str(rows), "--text", "test.txt"]
    command += ["--models", *map(str, models), "--results", *map(str, files), "--ablations", str(screens)]
    done = subprocess.run([*command, "--state", str(state), "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = json.loads(out.read_text())
    by_name = {a["name"]: a for a in table["arms"]}
    assert by_name.keys() == {"best", "sign"} and table["teacher"]["test"]["perplexity"] == 17.0
    best, inventory = by_name["best"], inventory_of(open_checkpoint(models[0]))
    assert best["seeds"] == [0, 1] and best["test"]["perplexity"]["mean"] == 21.0
    assert best["file_bytes"] == inventory.file_bytes and best["curve"] == [[9.0, 2.5]]
    assert [a["change"] for a in table["ablations"]] == ["as it is", "rank 0", "lr 9 (1 diverged)"]
    assert table["ablations"][1]["valid"]["mean"] == 30.5 and "valid" not in table["ablations"][2]
    assert "**best**" in done.stdout and "21.00 ± 1.41" in done.stdout
    files.pop()
    done = subprocess.run([c for c in command if "eval-best-s1" not in c] + ["--out", str(out)], capture_output=True)
    assert done.returncode != 0 and b"best-s1" in done.stderr, "an arm without its figure is refused"


@pytest.mark.parametrize("missing", ["--rows", "--models"])
def test_an_empty_table_is_refused(tmp_path: Path, missing: str) -> None:
    teacher = tiny_directory(tmp_path / "teacher", preset="float32")
    command = [sys.executable, str(SCRIPT), "--teacher", str(teacher), "--out", str(tmp_path / "t.json"), missing]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "no arm" in done.stderr
