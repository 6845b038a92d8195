"""The inside of a Mamba-1 mixer as functions with gradients on a GPU; x_proj and dt_proj, between them, are PyTorch's.

    if usable(spec):
        x = conv_silu(raw, conv_weight, conv_bias)
        out = scan(x, raw, B, C, z, dt_bias, A_log, D)

Naive twin: `models/mamba1.py`. Tests: `pytest tests/kernels/test_triton_selective.py`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from slimba.kernels.triton.conv import conv_backward, conv_forward
from slimba.kernels.triton.selective import Kept, scan_backward, scan_forward

__all__ = ["conv_silu", "scan", "usable"]


class Sizes(Protocol):
    """What is read of a ModelSpec, a room above."""

    d_state: int
    conv_bias: bool


def usable(spec: Sizes) -> bool:
    """Whether the kernels compute this mixer: a convolution with bias, and states that fit the registers."""
    return spec.conv_bias and spec.d_state <= 64


class ConvSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        return conv_forward(x, weight.reshape(x.shape[-1], -1), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, weight, bias = ctx.saved_tensors
        dx = x.new_empty(x.shape)
        taps = weight.reshape(x.shape[-1], -1)
        d_taps, d_bias = conv_backward(grads[0].to(x.dtype).contiguous(), x, taps, bias, dx)
        return dx, d_taps.view(weight.shape), d_bias


class Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        raw: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        z: torch.Tensor,
        dt_bias: torch.Tensor,
        A_log: torch.Tensor,
        D: torch.Tensor,
    ) -> torch.Tensor:
        out, kept = scan_forward(x, raw, dt_bias, A_log, B, C, D, z)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, B, C, z, A_log, D, kept.dt, kept.y, kept.starts, kept.totals)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, B, C, z, A_log, D, *kept = ctx.saved_tensors
        d_out, d_z = grads[0].to(x.dtype).contiguous(), z.new_empty(z.shape)
        dx, d_raw, d_bias, d_a, d_b, d_c, d_d = scan_backward(d_out, x, A_log, B, C, D, z, Kept(*kept), d_z)
        return dx, d_raw, d_b.to(B.dtype), d_c.to(C.dtype), d_z, d_bias, d_a, d_d


def conv_silu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """silu(conv(x)): x [B, L, I] (a slice of in_proj's output is welcome), weight [I, 1, K], bias [I]."""
    out = ConvSilu.apply(x, weight, bias)
    assert isinstance(out, torch.Tensor)
    return out


def scan(
    x: torch.Tensor,
    raw: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    z: torch.Tensor,
    dt_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
) -> torch.Tensor:
    """What goes into out_proj, [B, L, I] in x's dtype, from an empty state.

    x, z and raw (dt_proj's output without its bias) [B, L, I]; B and C [B, L, N]; dt_bias and D [I], A_log [I, N].
    """
    out = Scan.apply(x.contiguous(), raw.contiguous(), B, C, z, dt_bias, A_log, D)
    assert isinstance(out, torch.Tensor)
    return out
