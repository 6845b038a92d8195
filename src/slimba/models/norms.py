"""RMSNorm and the gated norm of Mamba-2 (arXiv 2405.21060, section 7), computed in float32.

Tests: `pytest tests/models`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["GatedRMSNorm", "RMSNorm", "rms_normalise"]


def rms_normalise(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, float32."""
    return F.rms_norm(x.float(), x.shape[-1:], None, eps)


class RMSNorm(nn.Module):
    """[..., width] -> the same shape, in the dtype of the weight (float32 under autocast)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(self.weight.dtype)


class GatedRMSNorm(nn.Module):
    """y, z [..., width] -> norm(y * silu(z)), or norm(y) * silu(z) with `norm_before_gate`; in z's dtype.

    Every `group_size` consecutive channels share one RMS.
    """

    def __init__(self, width: int, group_size: int, eps: float, norm_before_gate: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.group_size, self.eps, self.norm_before_gate = group_size, eps, norm_before_gate

    def forward(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        gate = F.silu(z.float())
        if self.norm_before_gate:
            return (self.normalise(y.float()) * gate).to(z.dtype)
        return self.normalise(y.float() * gate).to(z.dtype)

    def normalise(self, y: torch.Tensor) -> torch.Tensor:
        groups = y.reshape(*y.shape[:-1], -1, self.group_size)
        return rms_normalise(groups, self.eps).reshape(y.shape) * self.weight.float()
