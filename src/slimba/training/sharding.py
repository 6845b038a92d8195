"""ZeRO stage 1: with several processes, each updates its own part of every large parameter and holds only its moments.

    shards = Shards(params)                    # the same in every process; of one process it is everything
    optimizer = AdamW(shards.of(params))       # parts of the parameters, in their own memory
    loss.backward(); shards.reduce(); shards.clip(1.0); optimizer.step(); shards.gather()

A parameter is split along its first dimension, so the part of a stack [n_layer, rows, cols] is whole matrices and an
optimiser that looks at matrices (Muon) can work on it. Gradients are scattered as they are summed and the new values
gathered: together the bytes of one all-reduce. Method: Rajbhandari et al., arXiv 1910.02054, section 5.
Tests: tests/training/test_distributed.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from slimba.training import distributed

__all__ = ["Shards"]

SMALL = 1 << 14  # numbers; a smaller parameter stays whole: its message costs more than its update

# torch 2.13 renames them; the old names warn
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Shards:
    """Which part of which parameter this process updates."""

    def __init__(self, params: Iterable[nn.Parameter], whole: Iterable[nn.Parameter] = ()) -> None:
        """`whole`: parameters that are never split, such as single matrices whose optimiser must see all of them."""
        self.params, never = list(params), set(whole)
        self.parts: dict[nn.Parameter, nn.Parameter] = {}
        n = distributed.world()
        for p in self.params:
            splits = p.ndim > 0 and p.shape[0] % n == 0 and p.numel() >= SMALL and p.is_contiguous()
            if n > 1 and splits and p not in never:
                part = p.detach().chunk(n)[distributed.rank()]
                self.parts[p] = nn.Parameter(part, requires_grad=p.requires_grad)
        self.whole = [p for p in self.params if p not in self.parts]

    def of(self, params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """What the optimiser of this process updates of `params`: a part, or the parameter where it is not split."""
        return [self.parts.get(p, p) for p in params]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in (*self.params, *self.parts.values()):
            p.grad = None

    @torch.no_grad()
    def reduce(self) -> None:
        """Gradients of `params` become means over all processes, those of split parameters in the parts only.

        With NCCL this can be captured in a CUDA graph. Parameters without a gradient (frozen ones) are left out.
        """
        for p, part in self.parts.items():
            part.grad = None
            if p.grad is not None:
                part.grad = torch.empty_like(part)
                reduce_scatter(part.grad, p.grad.contiguous())
                part.grad /= distributed.world()
                p.grad = None
        distributed.mean_gradients(self.whole)

    @torch.no_grad()
    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale all gradients so that their joint L2 norm is at most `max_norm`; returns the norm before."""
        if not self.parts:
            return nn.utils.clip_grad_norm_(self.params, max_norm, foreach=True)
        parts = [p.grad for p in self.parts.values() if p.grad is not None]
        whole = [p.grad for p in self.whole if p.grad is not None]
        total = torch.zeros((), device=self.params[0].device)
        if parts:  # the same answer in every process
            total = nn.utils.get_total_norm(parts, foreach=True).square()
            dist.all_reduce(total)
        if whole:
            total = total + nn.utils.get_total_norm(whole, foreach=True).square()
        nn.utils.clip_grads_with_norm_(self.of(self.params), max_norm, total.sqrt(), foreach=True)
        return total.sqrt()

    @torch.no_grad()
    def gather(self) -> None:
        """After the update: every process gets the parts of the others."""
        for p, part in self.parts.items():
            if part.grad is not None:
                all_gather(p.data, part.data)
