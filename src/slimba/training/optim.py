"""Optimisers of the loop: parameter groups by name, AdamW for most, Muon where a group of matrices asks for it.

    optimizers = make_optimizers(groups, rates, betas, capturable=True)    # rates: one scalar tensor a group

Learning rates are tensors so that a captured CUDA graph reads the value of its step.
Tests: `pytest tests/training/test_optim.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

__all__ = ["Group", "Muon", "make_optimizers"]


@dataclass(slots=True)
class Group:
    """Parameters that share a learning rate, a weight decay and an optimiser."""

    name: str
    params: list[nn.Parameter]
    lr: float
    weight_decay: float = 0.0
    optimizer: Literal["adamw", "muon"] = "adamw"


# a quintic whose iteration takes every singular value in (0, 1] to about 1 (0.7 to 1.2): Keller Jordan's, 2024
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonal(g: torch.Tensor) -> torch.Tensor:
    """[..., rows, cols] -> the nearest matrix with singular values of one, roughly (U V^T of g = U S V^T)."""
    a, b, c = NEWTON_SCHULZ
    x = g.to(torch.bfloat16 if g.is_cuda else g.dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-20)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every direction of a matrix moves alike (Jordan 2024; scale of arXiv 2502.16982).

    Parameters are matrices or stacks of matrices [..., rows, cols]. The update's root mean square is 0.2, as AdamW's
    usually is, so a learning rate serves both. `lr` may be a tensor.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float = 0.95) -> None:
        super().__init__(groups, {"momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                m = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(m, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update * (group["lr"] * (0.2 * max(p.shape[-2:]) ** 0.5)))


def make_optimizers(
    groups: list[Group], rates: list[torch.Tensor], betas: tuple[float, float], capturable: bool
) -> list[torch.optim.Optimizer]:
    """One optimiser of each kind that the groups ask for, over all of its groups. `capturable`: for a CUDA graph."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for g, lr in zip(groups, rates, strict=True):
        if g.params:
            entry = {"params": g.params, "lr": lr, "weight_decay": g.weight_decay}
            kinds.setdefault(g.optimizer, []).append(entry)
    out: list[torch.optim.Optimizer] = []
    if "adamw" in kinds:
        out.append(torch.optim.AdamW(kinds["adamw"], betas=betas, eps=1e-10, fused=True, capturable=capturable))
    if "muon" in kinds:
        out.append(Muon(kinds["muon"]))
    return out
