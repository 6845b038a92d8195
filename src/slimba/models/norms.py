"""RMSNorm and the gated norm of Mamba-2. Normalised in float32, returned in the input's dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["GatedRMSNorm", "RMSNorm", "rms_normalise"]


def rms_normalise(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) over the last dimension, float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """Weighted RMS norm over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_normalise(x, self.eps) * self.weight.float()


class GatedRMSNorm(nn.Module):
    """Gate first, norm second (`norm_before_gate` swaps them); each group of `group_size` channels has its own RMS."""

    def __init__(self, width: int, group_size: int, eps: float, norm_before_gate: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.group_size, self.eps, self.norm_before_gate = group_size, eps, norm_before_gate

    def forward(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        gate = F.silu(z.float())
        if not self.norm_before_gate:
            y = y.float() * gate
        grouped = y.reshape(*y.shape[:-1], -1, self.group_size)
        out = rms_normalise(grouped, self.eps).reshape(y.shape) * self.weight.float()
        return out * gate if self.norm_before_gate else out
