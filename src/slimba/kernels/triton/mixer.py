"""The inside of a Mamba-2 mixer, between in_proj and out_proj, as one function with gradients on a GPU.

    if usable(spec): out = inner(zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, spec)

z, x, B, C and dt are read where in_proj left them, and their gradients are written side by side, as in_proj's backward
wants them: no slice is ever copied. Naive twin: `models/mamba2.py`. Tests: `pytest tests/kernels/test_triton.py`.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch

from slimba.kernels.triton.conv import conv_backward, conv_forward
from slimba.kernels.triton.gated_norm import gated_norm_backward, gated_norm_forward
from slimba.kernels.triton.ssd import Shape, ssd_backward, ssd_forward

__all__ = ["inner", "usable"]


class Sizes(Protocol):
    """What is read of a ModelSpec, a room above."""

    architecture: str
    n_heads: int
    headdim: int
    n_groups: int
    d_state: int
    d_conv: int
    conv_bias: bool
    d_has_hdim: bool
    gated_norm: bool
    norm_before_gate: bool
    norm_group_size: int
    norm_eps: float
    dt_limit: tuple[float, float]


def usable(spec: Sizes) -> bool:
    """Whether the kernels compute this mixer: powers of two, a state that fits the registers, no odd options."""
    sizes = (spec.headdim, spec.d_state)
    return (
        all(s >= 16 and s & (s - 1) == 0 for s in sizes)
        and math.prod(sizes) <= 128 * 64
        and spec.conv_bias
        and spec.gated_norm
        and not spec.norm_before_gate
        and not spec.d_has_hdim
        and spec.dt_limit == (0.0, math.inf)
    )


class Inner(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        zxbcdt: torch.Tensor,
        conv_weight: torch.Tensor,
        conv_bias: torch.Tensor,
        dt_bias: torch.Tensor,
        A_log: torch.Tensor,
        D: torch.Tensor,
        norm_weight: torch.Tensor,
        spec: Sizes,
    ) -> torch.Tensor:
        shape = Shape(spec.n_heads, spec.headdim, spec.n_groups, spec.d_state)
        i, channels = shape.d_inner, shape.channels
        z, raw, dt_raw = zxbcdt.split([i, channels, shape.heads], dim=-1)
        taps = conv_weight.reshape(channels, -1)
        xbc = conv_forward(raw, taps, conv_bias)
        y, states = ssd_forward(xbc, dt_raw, dt_bias, A_log, D, shape)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(zxbcdt, taps, conv_bias, dt_bias, A_log, D, norm_weight, xbc, y, *states)
            ctx.shape, ctx.group, ctx.eps = shape, spec.norm_group_size, spec.norm_eps
            ctx.conv_shape = conv_weight.shape
        return gated_norm_forward(y, z, norm_weight, spec.norm_group_size, spec.norm_eps)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        zxbcdt, taps, conv_bias, dt_bias, A_log, D, norm_weight, xbc, y, *states = ctx.saved_tensors
        shape: Shape = ctx.shape
        sizes = [shape.d_inner, shape.channels, shape.heads]
        z, raw, dt_raw = zxbcdt.split(sizes, dim=-1)
        d_all = torch.empty_like(zxbcdt)
        d_z, d_raw, d_dt = d_all.split(sizes, dim=-1)
        d_y, d_xbc = torch.empty_like(y), torch.empty_like(xbc)
        d_out = grads[0].to(y.dtype).contiguous()
        d_norm = gated_norm_backward(d_out, y, z, norm_weight, ctx.group, ctx.eps, d_y, d_z)
        d_bias, d_a, d_d = ssd_backward(d_y, xbc, dt_raw, dt_bias, A_log, D, (states[0], states[1]), shape, d_xbc, d_dt)
        d_taps, d_conv_bias = conv_backward(d_xbc, raw, taps, conv_bias, d_raw)
        return d_all, d_taps.view(ctx.conv_shape), d_conv_bias, d_bias, d_a, d_d, d_norm, None


def inner(
    zxbcdt: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    dt_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    norm_weight: torch.Tensor,
    spec: Sizes,
) -> torch.Tensor:
    """zxbcdt [B, L, 2 I + 2 G N + H] contiguous, from an empty state -> [B, L, I] in its dtype; parameters float32."""
    out = Inner.apply(zxbcdt.contiguous(), conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, spec)
    assert isinstance(out, torch.Tensor)
    return out
