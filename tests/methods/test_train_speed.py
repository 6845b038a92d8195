"""benchmarks/train_speed.py runs, and a teacher with bfloat16 projections gives the numbers of autocast.

Run: `pytest tests/methods/test_train_speed.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.tiny import tiny_checkpoint
from slimba.data.batches import WindowBatches
from slimba.methods.dfssm.recipe import DfssmRecipe
from slimba.methods.dfssm.run import build, narrow_projections
from slimba.training.recipes import load_recipe

ROOT = Path(__file__).resolve().parents[2]
IDS = np.random.default_rng(0).integers(0, 300, 400).astype(np.int32)


@pytest.mark.parametrize("architecture", ["mamba2", "mamba1"])
def test_a_teacher_with_narrow_projections_gives_the_same_loss(architecture: str) -> None:
    """Under bfloat16 autocast, which a GPU trains in and a CPU also has: loss and gradients bit for bit."""
    rows = ["dt"] if architecture == "mamba2" else []
    settings = {"window": 16, "batch": 2, "rank": 2, "init_rounds": 2, "int8_rows": rows}
    recipe = load_recipe(DfssmRecipe, "dfssm.yaml", None, settings)
    batches = WindowBatches(IDS, 16, 2)
    results = []
    for narrow in (False, True):
        student, task = build(tiny_checkpoint(architecture), recipe, batches, torch.device("cpu"), True)
        if narrow:
            narrow_projections(task.teacher)
            kinds = {p.dtype for p in task.teacher.parameters()}
            assert kinds == {torch.float32, torch.bfloat16}
        task.dtype = torch.bfloat16
        task.at_step(0, 10)
        out = task.loss(torch.from_numpy(batches[0]).long())
        out["loss"].backward()
        results.append((out["loss"].detach(), [p.grad for p in student.parameters() if p.grad is not None]))
    (loss, gradients), (narrow_loss, narrow_gradients) = results
    assert torch.isfinite(loss) and loss > 0
    assert torch.equal(loss, narrow_loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, narrow_gradients, strict=True))


def test_the_benchmark_of_training_runs(tmp_path: Path) -> None:
    line = ["--shape", "tiny", "--window", "16", "--batch", "2", "--micro-batch", "1", "--steps", "3", "--warmup", "2"]
    line += ["--activation-checkpointing", "on", "--device", "cpu", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "train_speed.py"), *line],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures == json.loads((tmp_path / "figures.json").read_text())
    assert (figures["shape"], figures["processes"], figures["activation_checkpointing"]) == ("tiny", 1, True)
    assert figures["measured_steps"] == 3
    assert figures["tokens_per_second"] == pytest.approx(32 / figures["step_seconds"])
    assert figures["hours_for_32M_tokens"] == pytest.approx(32e6 / figures["tokens_per_second"] / 3600)
    assert figures["memory"]["process_resident"] > 1e7
    assert np.isfinite(figures["loss"]["last"])


def test_two_processes_are_measured_beside_one(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(ROOT / "benchmarks" / "train_speed.py"), "--smoke", "--alone-first"]
    done = subprocess.run(
        [sys.executable, *torchrun, *script, "--json", str(tmp_path / "two.json")],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "two.json").read_text())
    assert (figures["processes"], figures["batch"], figures["alone"]["batch"]) == (2, 4, 2)
    assert figures["trained_numbers"] == figures["alone"]["trained_numbers"] > 0
    ratio = figures["tokens_per_second"] / figures["alone"]["tokens_per_second"]
    assert figures["speed_up"] == pytest.approx(ratio)
