"""ZeRO-1 with two processes (gloo): the same steps as one, half the moments, checkpoints for any number of processes.

Run: `pytest tests/training/test_sharding.py`. This file is also the script that torchrun starts.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from slimba.data.batches import WindowBatches
from slimba.training import distributed, sharding
from slimba.training.loop import Group, LoopSettings, _Run, train
from slimba.training.sharding import Shards

STEPS, CUT = 24, 9


class Stack(nn.Module):
    """Four layers of one parameter, a matrix that two processes cannot split, a bias that gets no gradient at first."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.layers = nn.Parameter(torch.randn(4, 8, 8, generator=g) * 0.4)
        self.out = nn.Parameter(torch.randn(5, 8, generator=g) * 0.4)
        self.late = nn.Parameter(torch.zeros(2, 5))


class Task:
    """Regression; `cut` interrupts the last process in that step, as Ctrl-C does."""

    def __init__(self, cut: int | None = None) -> None:
        self.model, self.cut, self.step = Stack(), cut, 0

    def groups(self) -> list[Group]:
        rest = [self.model.out, self.model.late]
        return [Group("layers", [self.model.layers], 0.01, 0.1), Group("rest", rest, 0.02)]

    def at_step(self, step: int, total: int) -> bool:
        self.step = step
        return False

    def loss(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.step == self.cut and distributed.rank() == distributed.world() - 1:
            self.cut = None
            os.kill(os.getpid(), signal.SIGINT)
        x = ids[:, :8].float()
        for w in self.model.layers:
            x = torch.tanh(x @ w) + x
        y = x @ self.model.out.T
        if self.step >= 5:
            y = y + self.model.late.sum(0)
        return {"loss": (y - ids[:, -5:].float()).square().mean()}


def run(work: Path, *, resume: bool = False, cut: int | None = None) -> dict[str, torch.Tensor]:
    """Weights after all steps, or, interrupted, after those up to the next log row."""
    task = Task(cut)
    batches = WindowBatches((np.arange(4000) * 7919 % 11).astype(np.int32), 8, 4)
    settings = LoopSettings(steps=STEPS, log_every=4)
    try:
        train(task, batches, settings, work, resume=resume)
    except KeyboardInterrupt:
        assert cut is not None
    return {k: v.clone() for k, v in task.model.state_dict().items()}


def two(here: Path) -> None:
    """What both processes do."""
    with distributed.group(torch.device("cpu")):
        torch.save(run(here / "whole"), here / f"whole-{distributed.rank()}.pt")
        run(here / "two", cut=CUT)
        distributed.from_first(lambda: shutil.copytree(here / "two", here / "two-then-one") and None)
        torch.save(run(here / "two", resume=True), here / f"two-{distributed.rank()}.pt")
        torch.save(run(here / "one", resume=True), here / f"one-then-two-{distributed.rank()}.pt")
        held = _Run(Task(), WindowBatches(np.zeros(40, np.int32), 8, 4), LoopSettings(steps=1), here / "held")
        held.whole_step(torch.ones(2, 9, dtype=torch.long))
        moments = {str(list(p.shape)): s["exp_avg"].numel() for p, s in held.optimizer.state.items()}
        (here / f"moments-{distributed.rank()}.json").write_text(json.dumps(moments))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    run(folder / "one", cut=CUT)  # one process, interrupted: two go on with it
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, __file__, str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return run(tmp_path_factory.mktemp("alone") / "w")


def weights(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Equal up to the order of float32 sums."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_take_the_steps_of_one(here: Path, alone: dict[str, torch.Tensor]) -> None:
    ours = weights(here / "whole-0.pt")
    assert_close(ours, alone)
    assert all(torch.equal(ours[k], v) for k, v in weights(here / "whole-1.pt").items()), "both hold the same weights"
    assert not torch.equal(Stack().layers, alone["layers"]), "they were trained"


def test_each_process_holds_the_moments_of_its_part(here: Path) -> None:
    for rank in (0, 1):
        moments = json.loads((here / f"moments-{rank}.json").read_text())
        assert moments == {"[2, 8, 8]": 128, "[5, 8]": 40}


def test_two_interrupted_processes_stop_together_and_resume_bit_for_bit(here: Path) -> None:
    rows = [json.loads(row)["step"] for row in (here / "two" / "log.jsonl").read_text().splitlines()]
    assert rows == list(range(4, STEPS + 1, 4))
    whole, resumed = weights(here / "whole-0.pt"), weights(here / "two-0.pt")
    assert all(torch.equal(v, resumed[k]) for k, v in whole.items())


def test_a_run_may_be_resumed_with_another_number_of_processes(here: Path, alone: dict[str, torch.Tensor]) -> None:
    saved = [p.name for p in (here / "two-then-one").glob("checkpoint-*")]
    assert saved == ["checkpoint-00000012"], "the log row after the interrupt"
    assert_close(run(here / "two-then-one", resume=True), alone)
    assert_close(weights(here / "one-then-two-0.pt"), alone)


def test_alone_nothing_is_split() -> None:
    p = nn.Parameter(torch.ones(1 << 15))
    shards = Shards([p])
    assert shards.of([p])[0] is p and not shards.parts
    p.grad = torch.full_like(p, 2.0)
    shards.reduce()
    norm = shards.clip(1.0)
    assert float(norm) == pytest.approx(2 * (1 << 15) ** 0.5)
    assert float(p.grad.norm()) == pytest.approx(1.0, rel=1e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sharding.SMALL = 0
    two(Path(sys.argv[1]))
