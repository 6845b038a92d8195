"""The one training loop: optimiser steps with progress, a JSON-lines log, checkpoints and exact resume.

A method gives a `Task`: the model, its parameter groups and a loss for one batch of token windows. The loop owns the
step count; everything that changes over time (learning rates, loss weights, phases) is a function of it, and the batch
of a step is too, so a run that is killed and resumed ends in the same weights as one that is not (on one machine).

Started by torchrun, every process takes its share of each batch; `distributed.py` says how.

On a GPU the whole step is captured in a CUDA graph: small models are bound by launches, not by arithmetic.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from slimba.data.batches import WindowBatches
from slimba.errors import UserError
from slimba.models.spec import ModelSpec
from slimba.training import checkpointing, distributed
from slimba.training.interrupt import deferred_interrupt
from slimba.training.optim import Group, make_optimizers
from slimba.training.schedule import lr_factor
from slimba.training.sharding import Shards

__all__ = ["Group", "LoopSettings", "Task", "pick_device", "recomputes", "train"]

LARGE = 1 << 15  # d_model * n_layer: between the 130m size (18432) and the 370m size (49152)


class Task(Protocol):
    """What a method hands to the loop."""

    @property
    def model(self) -> nn.Module: ...

    def groups(self) -> list[Group]: ...

    def at_step(self, step: int, total: int) -> bool:
        """Set what depends on the step (phases, loss weights); True when a captured graph is no longer right."""
        ...

    def loss(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """int64 [B, L + 1] -> {"loss": scalar with gradient, other scalars to log}."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSettings:
    """How to run a task. `micro_batch` windows go through the model at a time, in each process (0: all)."""

    steps: int
    warmup: float = 0.05
    decay: str = "linear"
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    micro_batch: int = 0
    log_every: int = 10
    save_every_s: float = 120.0
    cuda_graph: bool = True
    label: str = "training"


@dataclass(slots=True)
class Progress:
    """Where a run stands; what a checkpoint holds beside weights and optimiser state."""

    step: int = 0
    seconds: float = 0.0
    last: dict[str, float] = field(default_factory=dict)


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. UserError for a GPU that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}, known are auto, cpu and cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: torch sees no GPU here; use --device cpu")
    return torch.device(name)


def recomputes(setting: str, spec: ModelSpec) -> bool:
    """Whether blocks forget their activations: the recipe's `activation_checkpointing` (auto, on or off)."""
    return setting == "on" or (setting == "auto" and spec.d_model * spec.n_layer >= LARGE)


def train(
    task: Task,
    batches: WindowBatches,
    settings: LoopSettings,
    workdir: Path,
    *,
    resume: bool = False,
) -> Progress:
    """Run `settings.steps` optimiser steps; afterwards the task's model is trained in place.

    Writes `workdir/log.jsonl` and `workdir/checkpoint-STEP/`. With `resume` a checkpoint found there is continued.
    Raises UserError when the loss stops being finite (the last good checkpoint stays).
    """
    distributed.share(batches.batch)  # an error now, not after the first step
    run = _Run(task, batches, settings, workdir)
    if resume:
        run.restore()
    distributed.same_as_first(task.model)
    with run.progress_bar() as advance:
        run.steps(advance)
    return run.progress


class _Run:
    def __init__(self, task: Task, batches: WindowBatches, settings: LoopSettings, workdir: Path) -> None:
        self.task, self.batches, self.settings, self.workdir = task, batches, settings, workdir
        self.device = next(task.model.parameters()).device
        self.cuda = self.device.type == "cuda"
        self.group_list = task.groups()
        self.shards = Shards(p for g in self.group_list for p in g.params)
        self.lrs = [torch.zeros((), device=self.device) for _ in self.group_list]
        parts = [replace(g, params=self.shards.of(g.params)) for g in self.group_list]
        self.optimizers = make_optimizers(parts, self.lrs, settings.betas, self.cuda)
        self.progress = Progress()
        self.save_seconds = 0.0  # what the last checkpoint took
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager_left = 0
        self.stream = torch.cuda.Stream() if self.cuda else None
        self.static_ids: torch.Tensor | None = None
        self.static_out: dict[str, torch.Tensor] = {}

    # ---------------------------------------------------------------- one step

    def backward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        size = self.settings.micro_batch or ids.shape[0]
        pieces = ids.split(size)
        out: dict[str, torch.Tensor] = {}
        for piece in pieces:
            values = self.task.loss(piece)
            share = piece.shape[0] / ids.shape[0]
            (values["loss"] * share).backward()
            for k, v in values.items():
                out[k] = out.get(k, 0) + v.detach() * share
        return out

    def whole_step(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.backward(ids)
        self.shards.reduce()
        out["grad_norm"] = self.shards.clip(self.settings.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.shards.gather()
        return out

    def step(self, ids: torch.Tensor, changed: bool) -> dict[str, torch.Tensor]:
        if not (self.cuda and self.settings.cuda_graph):
            self.shards.zero_grad()
            return self.whole_step(ids)
        assert self.stream is not None
        if changed or (self.graph is None and self.eager_left == 0):
            self.graph, self.static_out, self.eager_left = None, {}, 3
        if self.eager_left:
            self.eager_left -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.shards.zero_grad()
                out = self.whole_step(ids)
            torch.cuda.current_stream().wait_stream(self.stream)
            if self.eager_left == 0:
                self.capture(ids)
            return out
        assert self.graph is not None and self.static_ids is not None
        self.static_ids.copy_(ids)
        self.graph.replay()
        return self.static_out

    def capture(self, ids: torch.Tensor) -> None:
        """Capturing runs nothing: the next step replays."""
        self.shards.zero_grad()
        self.static_ids = ids.clone()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        # "thread_local": NCCL watches its messages from a thread of its own, which must not spoil the capture
        mode = "thread_local" if distributed.world() > 1 else "global"
        with torch.cuda.graph(self.graph, capture_error_mode=mode):
            self.static_out = self.whole_step(self.static_ids)

    # ---------------------------------------------------------------- all steps

    def steps(self, advance: Callable[[Progress], None]) -> None:
        s, total = self.settings, self.settings.steps
        last_save = time.monotonic()
        self.workdir.mkdir(parents=True, exist_ok=True)
        # phases before the current step must have happened: a resumed run replays their switches
        for past in range(self.progress.step):
            self.task.at_step(past, total)
        started = time.monotonic() - self.progress.seconds
        log_file = self.workdir / "log.jsonl" if distributed.first() else os.devnull
        mine = slice(distributed.rank(), None, distributed.world())
        with open(log_file, "a", encoding="utf-8") as log, deferred_interrupt() as interrupted:
            while self.progress.step < total:
                step = self.progress.step
                changed = self.task.at_step(step, total)
                for group, lr in zip(self.group_list, self.lrs, strict=True):
                    lr.fill_(group.lr * lr_factor(step, total, s.warmup, s.decay))
                ids = torch.from_numpy(self.batches[step][mine]).to(self.device, non_blocking=True).long()
                out = self.step(ids, changed)
                self.progress.step = step + 1
                self.progress.seconds = time.monotonic() - started
                if self.progress.step % s.log_every == 0 or self.progress.step == total:
                    self.log(out, log)
                pause = max(s.save_every_s, 20 * self.save_seconds)  # saving takes 5 % of the time at most
                due = time.monotonic() - last_save > pause and self.progress.step < total
                save, stop = self.agreed(due, interrupted(), out)
                if save:
                    self.save()
                    last_save = time.monotonic()
                if stop:
                    raise KeyboardInterrupt
                advance(self.progress)

    def agreed(self, due: bool, stop: bool, out: dict[str, torch.Tensor]) -> tuple[bool, bool]:
        """(save now?, stop now?), the same in every process; several ask each other only where they log anyway.

        A broken step is never saved: a good checkpoint is not replaced by it.
        """
        if distributed.world() > 1:
            if self.progress.step % self.settings.log_every:
                return False, False
            due, stop, ill = distributed.any_of(due and distributed.first(), stop, not healthy(out))
            return (due or stop) and not ill, stop
        return (due or stop) and healthy(out), stop

    def log(self, out: dict[str, torch.Tensor], log: Any) -> None:
        means = distributed.mean(torch.stack([v.float() for v in out.values()])).tolist()
        values = dict(zip(out, means, strict=True))
        if not math.isfinite(values["loss"]):
            raise UserError(
                f"the loss is {values['loss']} at step {self.progress.step}; lower the learning rates"
                " (the last good checkpoint is kept, --resume continues from it)"
            )
        self.progress.last = values
        row: dict[str, float] = {
            "step": self.progress.step,
            "tokens": self.progress.step * self.batches.tokens_per_step,
        }
        row |= {"seconds": round(self.progress.seconds, 3)}
        log.write(json.dumps(row | {k: round(v, 6) for k, v in values.items()}) + "\n")
        log.flush()

    # ---------------------------------------------------------------- checkpoints

    def save(self) -> None:
        begin = time.monotonic()
        progress = {"step": self.progress.step, "seconds": self.progress.seconds}
        checkpointing.save(self.workdir, self.task.model, self.optimizers, self.shards, progress)
        self.save_seconds = time.monotonic() - begin

    def forget_log_rows(self) -> None:
        """Drop the rows of steps after the checkpoint, which are about to be written again."""
        log = self.workdir / "log.jsonl"
        if log.is_file():
            rows = log.read_text("utf-8").splitlines(keepends=True)
            whole = (row for row in rows if row.endswith("\n"))  # a kill may have cut the last one
            log.write_text("".join(row for row in whole if json.loads(row)["step"] <= self.progress.step), "utf-8")

    def restore(self) -> None:
        """Every process reads the checkpoint, so the work directory must be one that all of them see."""
        found = checkpointing.load(self.workdir, self.task.model, self.optimizers, self.shards)
        if found:
            self.progress = Progress(found["step"], found["seconds"])
            if distributed.first():
                self.forget_log_rows()
        unseen = f"not every process finds the same checkpoint in {self.workdir}; put OUT on a file system that all"
        distributed.require_equal(self.progress.step, f"{unseen} machines share")

    # ---------------------------------------------------------------- progress bar

    def progress_bar(self) -> _Bar:
        return _Bar(self.settings.label, self.settings.steps, self.batches.tokens_per_step)


def healthy(out: dict[str, torch.Tensor]) -> bool:
    """Loss and gradients of the step are finite; the gradients' norm speaks for all processes."""
    return math.isfinite(float(out["loss"])) and math.isfinite(float(out["grad_norm"]))


class _Bar:
    """A rich progress bar with loss and tokens/s; on a terminal only, silent in logs."""

    def __init__(self, label: str, total: int, tokens_per_step: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns: Iterable[Any] = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, transient=True, disable=not distributed.first())
        self.id = self.bar.add_task(label, total=total, note="")
        self.tokens_per_step = tokens_per_step

    def __enter__(self) -> Callable[[Progress], None]:
        self.bar.start()

        def advance(p: Progress) -> None:
            speed = p.step * self.tokens_per_step / max(p.seconds, 1e-9)
            note = f"loss {p.last['loss']:.3f} {speed:,.0f} tok/s" if p.last else ""
            self.bar.update(self.id, completed=p.step, note=note)

        return advance

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
