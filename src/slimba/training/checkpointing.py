"""The checkpoint of a run: weights, optimiser state and step, written by all processes, read by any number of them.

    save(work, model, optimizers, shards, {"step": 120, "seconds": 63.0})
    progress = load(work, model, optimizers, shards)     # None where there is none

`work/checkpoint-00000120/` is a directory of torch.distributed.checkpoint: each process writes the parts it updates,
and one that reads takes what it needs, so a run may be resumed with another number of processes. A directory is written
under another name and renamed when it is complete; then the one before it goes. It is pickle inside, as torch's
checkpoints are: the work directory is trusted like the program. Tests: tests/training/test_checkpointing.py.
"""

from __future__ import annotations

import pickle
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from slimba.errors import UserError
from slimba.training import distributed
from slimba.training.sharding import Shards

__all__ = ["latest", "load", "save"]

NAME = re.compile(r"checkpoint-(\d{8})")
ALONE = "torch.distributed is disabled, unavailable or uninitialized"  # the warning's words; one process is no mistake
BROKEN = (CheckpointException, RuntimeError, KeyError, ValueError, EOFError, OSError, pickle.UnpicklingError)


def latest(work: Path) -> Path | None:
    """The newest complete checkpoint in `work`."""
    found = [p for p in work.glob("checkpoint-*") if NAME.fullmatch(p.name) and (p / ".metadata").is_file()]
    return max(found, default=None)


def save(
    work: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], shards: Shards, progress: dict[str, Any]
) -> None:
    """Write the checkpoint of step `progress["step"]`; every process calls it at the same step."""
    partial = work / "checkpoint.partial"
    if distributed.first():
        shutil.rmtree(partial, ignore_errors=True)
    distributed.barrier()
    mesh = _mesh()
    moments = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
    split = {name: _global(shards.parts[p], mesh) for name, p in model.named_parameters() if p in shards.parts}
    state: dict[str, Any] = {"model." + name: split.get(name, t) for name, t in model.state_dict().items()}
    for name, part, is_split in _updated(model, shards):
        for key, value in moments.get(part, {}).items():
            state[f"optimizer.{name}.{key}"] = _global(value, mesh) if is_split and value.ndim else value
    state |= {"progress." + key: value for key, value in progress.items()}
    target = work / f"checkpoint-{progress['step']:08d}"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ALONE)
            save_parts(state, checkpoint_id=partial, no_dist=distributed.world() == 1)
        if distributed.first():
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            for old in work.glob("checkpoint-*"):
                if old != target:
                    shutil.rmtree(old, ignore_errors=True)
    except (CheckpointException, OSError, RuntimeError) as e:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write the checkpoint {target} ({_reason(e)}); the one before it is kept") from None


def load(
    work: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], shards: Shards
) -> dict[str, Any] | None:
    """Fill model and optimisers from the newest checkpoint of `work`; its progress, None where there is none.

    Every process reads for itself. UserError for a checkpoint that is damaged or of another model.
    """
    path = latest(work)
    if path is None:
        return None
    try:
        return _load(path, model, optimizers, shards)
    except BROKEN as e:
        why = f"the checkpoint {path} cannot be continued ({_reason(e)})"
        raise UserError(f"{why}; start again without --resume") from None


def _load(path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], shards: Shards) -> dict[str, Any]:
    reader = FileSystemReader(path)
    saved = reader.read_metadata().state_dict_metadata
    mesh = _mesh()
    state: dict[str, Any] = {"model." + name: t for name, t in model.state_dict().items()}
    moments: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
    for name, part, is_split in _updated(model, shards):
        prefix = f"optimizer.{name}."
        moments[part] = {}
        for key in (k for k in saved if k.startswith(prefix) and "." not in k.removeprefix(prefix)):
            whole = saved[key]
            assert isinstance(whole, TensorStorageMetadata)
            size = part.shape if len(whole.size) and is_split else whole.size
            mine = torch.empty(size, dtype=whole.properties.dtype, device=part.device)
            moments[part][key.removeprefix(prefix)] = mine
            state[key] = _global(mine, mesh) if is_split and mine.ndim else mine
    state |= {key: None for key in saved if key.startswith("progress.")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ALONE)
        load_parts(state, storage_reader=reader, no_dist=True)
    for optimizer in optimizers:
        _take(optimizer, moments)
    return {key.removeprefix("progress."): state[key] for key in saved if key.startswith("progress.")}


def _take(optimizer: torch.optim.Optimizer, moments: dict[nn.Parameter, dict[str, torch.Tensor]]) -> None:
    """Give the optimiser its state; its settings stay those of this run, learning rates that are tensors the same."""
    rates = [group["lr"] for group in optimizer.param_groups]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(
        {"state": {i: moments[p] for i, p in enumerate(params) if moments[p]}, "param_groups": groups}
    )
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _updated(model: nn.Module, shards: Shards) -> list[tuple[str, nn.Parameter, bool]]:
    """(name, what the optimiser of this process updates of it, whether that is a part) of every trained parameter."""
    trained = set(shards.params)
    return [(n, shards.parts.get(p, p), p in shards.parts) for n, p in model.named_parameters() if p in trained]


def _mesh() -> DeviceMesh | None:
    if distributed.world() == 1:
        return None
    kind = distributed.device_of_group().type
    return DeviceMesh(kind, list(range(distributed.world())))


def _global(part: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """A tensor of all processes of which `part` is this one's, split along the first dimension."""
    assert mesh is not None
    return DTensor.from_local(part.detach(), mesh, [Shard(0)], run_check=False)


def _reason(e: BaseException) -> str:
    """One line; of a CheckpointException the first process's error."""
    if isinstance(e, CheckpointException) and e.failures:
        e = next(iter(e.failures.values()))[0]
    return " ".join(str(e).split())[:300] or type(e).__name__
