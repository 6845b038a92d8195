"""Ctrl-C waits for the end of a step, and the run it stopped continues to the same weights."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from slimba.data.batches import WindowBatches
from slimba.training.interrupt import deferred_interrupt
from slimba.training.loop import Group, LoopSettings, train


class Task:
    """A least-squares fit that is interrupted by Ctrl-C in the middle of the loss of step `at`."""

    def __init__(self, at: int | None = None) -> None:
        self.model = nn.Linear(8, 1)
        nn.init.zeros_(self.model.weight)
        nn.init.zeros_(self.model.bias)
        self.at, self.step = at, 0

    def groups(self) -> list[Group]:
        return [Group("all", list(self.model.parameters()), 0.05)]

    def at_step(self, step: int, total: int) -> bool:
        self.step = step
        return False

    def loss(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.step == self.at:
            self.at = None
            os.kill(os.getpid(), signal.SIGINT)
        x = ids.float()
        return {"loss": (self.model(x[:, :-1]) - x[:, -1:]).square().mean()}


def run(task: Task, work: Path, resume: bool = False) -> torch.Tensor:
    batches = WindowBatches(torch.arange(400).remainder(7).int().numpy(), 8, 4)
    train(task, batches, LoopSettings(steps=20, log_every=1), work, resume=resume)
    return task.model.weight.detach()


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole = run(Task(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Task(at=7), tmp_path / "cut")
    assert (tmp_path / "cut" / "checkpoint-00000008" / ".metadata").is_file(), "the step was finished"
    assert torch.equal(run(Task(), tmp_path / "cut", resume=True), whole)


def test_a_second_interrupt_raises_and_the_old_handler_returns() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_are_left_alone() -> None:
    out = []

    def work() -> None:
        with deferred_interrupt() as interrupted:
            out.append(interrupted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert out == [False]
