"""The trained baselines on a tiny model: deployed student = exported model, screens then full runs, resume, shards.

Run: `pytest tests/benchmarks/test_run_baselines.py`.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from arms import ARMS, RANK, arm_layouts
from harness import BaselineStudent, Bench, Later
from measure import read_split
from rows import Rows, read_rows
from run_baselines import best_baseline, plan

from helpers.tiny import TEXT, tiny_checkpoint, tiny_directory
from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.packed import read_packed
from slimba.checkpoints.reader import open_checkpoint
from slimba.data.batches import WindowBatches
from slimba.evaluation.perplexity import TextIds
from slimba.runtime.backends.reference import ReferenceEngine

CPU = torch.device("cpu")
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "baselines" / "run_baselines.py"
IDS = np.random.default_rng(0).integers(0, 300, 4000).astype(np.int32)
SMALL = {"window": 16, "batch": 4}


def bench_of(teacher: Checkpoint, **more: object) -> Bench:
    text = TextIds(IDS[:201], np.ones(304, np.int64), "random")
    texts = {"valid": text, "test": text}
    return Bench(teacher, IDS, texts, CPU, settings=SMALL, eval_window=32, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_trains_and_its_export_is_the_deployed_student(name: str, tmp_path: Path) -> None:
    teacher = tiny_checkpoint(preset="float32")
    bench = bench_of(teacher, keep=tmp_path)
    kept: list[BaselineStudent] = []
    measure = bench.measure

    def spy(student: BaselineStudent, *rest: object) -> dict:
        kept.append(student)
        return measure(student, *rest)  # type: ignore[arg-type]

    bench.measure = spy  # type: ignore[method-assign]
    rows = bench.run(name, ARMS[name].lrs[1], 0, 16 * 4 * 20, ("valid", "test"))
    assert [r["variant"] for r in rows] == [v.name for v in ARMS[name].variants]
    assert rows[0]["tokens"] == 16 * 4 * 20 and len(rows[0]["curve"]) >= 2
    assert all(np.isfinite(r["test"]["perplexity"]) and r["file_bytes"] > 0 for r in rows)
    student, first = kept[0], ARMS[name].variants[0]
    tensors, layouts = student.export_as(first)
    made = Checkpoint(teacher.spec, layouts, tensors)
    with student.deployed(torch.float32), torch.no_grad():
        student.phase.alpha = torch.ones(())
        for full, w in student.effective().items():
            if full.endswith("_proj.weight") or "embeddings" in full:
                stored = made.matrix(full.removesuffix(".weight")).dequantize()
                np.testing.assert_allclose(stored, w.numpy(), rtol=1e-5, atol=1e-6, err_msg=full)
    for row, v in zip(rows, ARMS[name].variants, strict=True):
        if v.stated is None:  # the figures came from the file that --keep keeps
            (path,) = tmp_path.glob(f"{v.name}-lr*")
            assert (path / "model.safetensors").stat().st_size == row["file_bytes"]
            engine = ReferenceEngine(read_packed(path))
            nll = engine.nll(IDS[None, :32], IDS[None, 1:33], engine.new_state(1))
            assert np.isfinite(nll).all()


def test_a_second_stage_trains_the_correction_only() -> None:
    """Everything else is as the first stage left it; the correction is not what it was."""
    arm, spec = ARMS["sign-lora"], tiny_checkpoint().spec
    bench = bench_of(tiny_checkpoint(preset="float32"))
    recipe = bench.recipe(arm.stages[0], 1e-2)
    student = BaselineStudent(spec, arm_layouts(spec, arm, "int8"), recipe, arm.make)
    whole = WindowBatches(IDS, recipe.window, recipe.batch, 0)
    student.initialise(bench.first, torch.from_numpy(whole[0][:1, :-1]).long())
    states = []
    import harness

    original = harness.train

    def watched(task, *rest):
        states.append({k: v.clone() for k, v in student.state_dict().items()})
        return original(task, *rest)

    harness.train = watched  # type: ignore[assignment]
    try:
        bench.train(student, arm, whole, 1e-2, 16 * 4 * 30)
    finally:
        harness.train = original
    before, after = states[1], student.state_dict()
    moved = {k for k in after if not torch.equal(before[k], after[k])}
    assert {k.rpartition(".")[2] for k in moved} == {"a", "b"} and len(moved) == 4
    assert len(student.loras()) == 4 and student.loras()[0].shape[-1] == RANK
    assert any(not torch.equal(states[0][k], before[k]) for k in before if k.endswith("latent"))


def test_the_second_stage_goes_on_in_the_text() -> None:
    whole, later = WindowBatches(IDS, 16, 4, 3), Later(IDS, 16, 4, 3, skip=5)
    np.testing.assert_array_equal(later[2], whole[7])
    assert later.tokens_per_step == whole.tokens_per_step


def test_the_same_seed_gives_the_same_row() -> None:
    rows = [bench_of(tiny_checkpoint(preset="float32")).run("dfssm", 1e-3, s, 1280, ("valid",))[0] for s in (0, 0, 1)]
    figures = [r["valid"]["perplexity"] for r in rows]
    assert figures[0] == figures[1] != figures[2]


def row_of(arm: str, variant: str, lr: float, budget: int, perplexity: float, bits: float, seed: int = 0) -> dict:
    figures = {"perplexity": perplexity}
    return dict(arm=arm, variant=variant, lr=lr, budget=budget, seed=seed, bits_per_projection_weight=bits) | {
        "valid": figures
    }


def test_the_plan_screens_then_trains_the_best_and_gives_seeds_to_the_best_small_one(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl")
    jobs = plan(rows, ["dfssm", "sign"], [0, 1, 2], 4000, (0, 1))
    quality = {"dfssm": 20.0, "sign": 30.0}
    bits = {"dfssm": 4.4, "sign": 1.04}
    seen = []
    for job in jobs:
        seen.append((job.arm, job.lr, job.seed, job.tokens, job.splits))
        best = ARMS[job.arm].lrs[2]
        perplexity = quality[job.arm] + (0 if job.lr == best else 1)
        variant = ARMS[job.arm].variants[0].name
        rows.add(row_of(job.arm, variant, job.lr, job.tokens, perplexity, bits[job.arm], job.seed))
    both = ("valid", "test")
    expected = []
    for arm in ("dfssm", "sign"):
        expected += [(arm, lr, 0, 1000, ("valid",)) for lr in ARMS[arm].lrs]
        expected.append((arm, ARMS[arm].lrs[2], 0, 4000, both))
    expected += [("sign", ARMS["sign"].lrs[2], s, 4000, both) for s in (1, 2)]
    assert seen == expected
    assert best_baseline(rows, ["dfssm"], 0, 4000)[0] == "dfssm", "none is small: the best of all"


def test_the_script_resumes_and_shards_share_the_work(tmp_path: Path) -> None:
    teacher = tiny_directory(tmp_path / "teacher", preset="float32")
    text, ids = tmp_path / "t.txt", tmp_path / "ids.npy"
    text.write_text(TEXT * 5)
    np.save(ids, IDS.astype(np.uint16))
    command = [sys.executable, str(SCRIPT), "--teacher", str(teacher), "--ids", str(ids), "--valid", str(text)]
    command += ["--test", str(text), "--tokens", "640", "--device", "cpu", "--eval-window", "32", "--eval-tokens", "99"]
    command += ["--set", "window=16", "--set", "batch=4", "--out", str(tmp_path / "rows.jsonl")]
    command += ["--arms", "sign,ternary", "--seeds", "0,1"]
    processes = [
        subprocess.Popen([*command, "--shard", f"{i}/2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in (0, 1)
    ]
    for p in processes:
        _, errors = p.communicate(timeout=300)
        assert p.returncode == 0, errors
    files = [tmp_path / f"rows-{i}.jsonl" for i in (0, 1)]
    first, second = map(read_rows, files)
    assert {r["arm"] for r in first if r["seed"] == 0} == {"sign"} and {r["arm"] for r in second} == {"ternary"}
    assert len([r for r in first + second if not r["screen"]]) == 3, "each arm at all tokens, one of them again"
    assert len([r for r in first + second if r["screen"]]) == 6
    before = files[0].read_text()
    done = subprocess.run([*command, "--shard", "0/2"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert files[0].read_text() == before, "nothing is done twice"
    cut = before.splitlines(keepends=True)
    files[0].write_text("".join(cut[:-1]) + cut[-1][:40])
    late = subprocess.run([*command, "--shard", "0/2", "--seconds", "0"], capture_output=True, text=True, timeout=300)
    assert late.returncode == 0 and "time is up before" in late.stdout
    assert len(read_rows(files[0])) == len(cut) - 1
    done = subprocess.run([*command, "--shard", "0/2"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    again = read_rows(files[0])
    assert [r["test" if not r["screen"] else "valid"] for r in again] == [
        json.loads(line)["test" if not json.loads(line)["screen"] else "valid"] for line in cut
    ]


def test_splits_are_measured_by_the_protocol_of_eval(tmp_path: Path) -> None:
    import slimba

    teacher = tiny_directory(tmp_path / "teacher", preset="int8")
    text = tmp_path / "t.txt"
    text.write_text(TEXT * 4)
    checkpoint = open_checkpoint(teacher)
    from measure import figures

    ours = figures(checkpoint, {"t": read_split(text, checkpoint)}, CPU, 32)["t"]
    theirs = slimba.evaluate(slimba.load(teacher), [text], window=32, split_documents="blank-line")
    for key in ("perplexity", "bits_per_byte", "nll", "tokens", "bytes", "protocol"):
        assert ours[key] == getattr(theirs, key), key
