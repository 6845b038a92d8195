"""Several processes train one model: the few things that the loop and the methods need of torch.distributed.

    torchrun --nproc_per_node 2 -m slimba compress TEACHER OUT --method dfssm --data corpus.txt.zst

Every process holds the whole model and takes every world-th window of each batch. Gradients are averaged before they
are clipped, so that all take the same step (`sharding.py`); the first process alone logs and exports, all save
(`checkpointing.py`). Without torchrun every function here does nothing. Two processes with `micro_batch` m compute what
one does with 2 m, up to the order of sums.

Neither DistributedDataParallel nor FSDP2 is used: they hook into the forward pass of the module that owns the
parameters, and a student's network runs with weights made from masters it does not own (docs/decisions.md).
Tests: tests/training/test_distributed.py.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from slimba.errors import UserError

__all__ = [
    "any_of",
    "barrier",
    "first",
    "from_first",
    "group",
    "mean",
    "mean_gradients",
    "name_of",
    "rank",
    "require_equal",
    "same_as_first",
    "share",
    "world",
]

LAUNCHED = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # what torchrun tells every process
TIMEOUT = timedelta(hours=2)  # the others wait while the first fits the student or writes a checkpoint
BUCKET_ELEMENTS = 1 << 25  # gradients of one all-reduce; 128 MiB in float32

T = TypeVar("T")


@contextmanager
def group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, once; yields the device of this one.

    The GPU is the one of LOCAL_RANK. At the end of the block everyone waits for everyone. After an error nobody does:
    the process ends, and torchrun ends the others. UserError when a process has no GPU of its own.
    """
    if not os.environ.keys() >= LAUNCHED or int(os.environ["WORLD_SIZE"]) == 1:
        yield device
        return
    if device.type == "cuda":
        local, present = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= present:
            raise UserError(
                f"process {local} of this machine has no GPU of its own, torch sees {present} here;"
                f" use --nproc_per_node {present}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=bound)
        atexit.register(dist.destroy_process_group)  # not before: a process may join only once
    try:
        yield device
    except UserError as e:
        raise (UserError(f"process {rank()}: {e}") if rank() else e) from None
    except RuntimeError as e:  # gloo has no error class of its own
        if isinstance(e, dist.DistBackendError) or "gloo" in str(e):
            raise UserError(f"process {rank()} stops because another one has; that one's message says why") from e
        raise
    dist.barrier()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the process that logs, saves and exports."""
    return rank() == 0


def name_of(device: torch.device) -> str:
    """What all processes ran on, for the record: "2 x NVIDIA H200"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return name if world() == 1 else f"{world()} x {name}"


def share(batch: int) -> int:
    """Windows of each process in a batch of `batch`. UserError when they cannot be shared evenly."""
    if batch % world():
        raise UserError(
            f"a batch of {batch} windows cannot be shared by {world()} processes; set batch to a multiple of {world()}"
        )
    return batch // world()


def from_first(compute: Callable[[], T]) -> T:
    """The result of `compute`, which runs in the first process only."""
    if world() == 1:
        return compute()
    held = [compute() if first() else None]
    dist.broadcast_object_list(held, src=0)
    return held[0]  # type: ignore[return-value]


def require_equal(value: int, otherwise: str) -> None:
    """UserError(otherwise) in every process unless `value` is the same in all."""
    if world() > 1:
        ends = torch.tensor([value, -value], device=device_of_group())
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if int(ends[0]) != -int(ends[1]):
            raise UserError(otherwise)


def barrier() -> None:
    """Everyone waits for everyone."""
    if world() > 1:
        dist.barrier()


def any_of(*flags: bool) -> list[bool]:
    """Of every flag whether it is set in any process; the same answer in all."""
    if world() == 1:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32, device=device_of_group())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [bool(f) for f in found.tolist()]


def device_of_group() -> torch.device:
    """Where tensors that are sent must be."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


@torch.no_grad()
def same_as_first(model: nn.Module) -> None:
    """Every parameter and buffer takes the first process's value."""
    if world() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


@torch.no_grad()
def mean(values: torch.Tensor) -> torch.Tensor:
    """Mean over all processes, elementwise; no gradient."""
    if world() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world()


@torch.no_grad()
def mean_gradients(params: Sequence[nn.Parameter]) -> None:
    """Every gradient becomes its mean over all processes. They travel in flat buckets: few large messages.

    Parameters without a gradient (frozen ones) are left out; they are the same in every process. With NCCL this can be
    captured in a CUDA graph.
    """
    if world() == 1:
        return
    for bucket in buckets([p.grad for p in params if p.grad is not None]):
        flat = torch.cat([g.reshape(-1) for g in bucket])
        dist.all_reduce(flat)
        flat /= world()
        pieces = flat.split([g.numel() for g in bucket])
        torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(pieces, bucket, strict=True)])


def buckets(gradients: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one dtype, together up to BUCKET_ELEMENTS (one that is larger travels alone)."""
    bucket: list[torch.Tensor] = []
    size = 0
    for g in gradients:
        if bucket and (g.dtype != bucket[0].dtype or size + g.numel() > BUCKET_ELEMENTS):
            yield bucket
            bucket, size = [], 0
        bucket.append(g)
        size += g.numel()
    if bucket:
        yield bucket
