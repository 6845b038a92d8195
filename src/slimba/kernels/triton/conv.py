"""Depthwise causal convolution followed by SiLU, with gradients. Naive twin: `models/scan.py` (`causal_conv1d`).

    out = conv_forward(x, weight, bias)              # x [B, L, channels], weight [channels, K], bias [channels]
    d_weight, d_bias = conv_backward(d_out, x, weight, bias, dx)

A program does a block of tokens and channels; for the gradient it computes the values before SiLU again.
Tests: `pytest tests/kernels/test_triton.py`.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl

__all__ = ["conv_backward", "conv_forward"]

TOKENS, CHANNELS = 32, 64


@triton.jit
def _pre(x, weight, bias, seq, t, ch, length, channels, s_xb, s_xl, K: tl.constexpr):
    """The convolution at tokens t [T, 1] and channels ch [1, C], float32."""
    ok = ch < channels
    acc = tl.load(bias + ch, mask=ok, other=0.0).to(tl.float32) + tl.zeros_like(t + ch).to(tl.float32)
    for k in tl.static_range(K):
        src = t + (k - (K - 1))
        v = tl.load(x + seq * s_xb + src * s_xl + ch, mask=ok & (src >= 0) & (src < length), other=0.0)
        acc += v.to(tl.float32) * tl.load(weight + ch * K + k, mask=ok, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _conv_fwd_kernel(
    x, weight, bias, out, length, channels, s_xb, s_xl,
    K: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0).to(tl.int64)
    t = (tl.program_id(1) * T + tl.arange(0, T))[:, None]
    ch = (tl.program_id(2) * C + tl.arange(0, C))[None, :]
    pre = _pre(x, weight, bias, seq, t, ch, length, channels, s_xb, s_xl, K)
    value = pre / (1.0 + tl.exp(-pre))
    tl.store(
        out + (seq * length + t) * channels + ch, value.to(out.dtype.element_ty), mask=(t < length) & (ch < channels)
    )


@triton.jit
def _pre_gradient_kernel(
    d_out, x, weight, bias, d_pre, partial, length, channels, s_xb, s_xl,
    K: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradient of the value before SiLU, and the sums over a block of tokens that the taps and the bias need."""
    seq = tl.program_id(0).to(tl.int64)
    t = (tl.program_id(1) * T + tl.arange(0, T))[:, None]
    ch = (tl.program_id(2) * C + tl.arange(0, C))[None, :]
    ok = ch < channels
    pre = _pre(x, weight, bias, seq, t, ch, length, channels, s_xb, s_xl, K)
    at = (seq * length + t) * channels + ch
    g = tl.load(d_out + at, mask=(t < length) & ok, other=0.0).to(tl.float32)
    sig = 1.0 / (1.0 + tl.exp(-pre))
    g = g * sig * (1.0 + pre * (1.0 - sig))
    tl.store(d_pre + at, g, mask=(t < length) & ok)
    block = (seq * tl.num_programs(1) + tl.program_id(1)) * (K + 1)
    for k in tl.static_range(K):
        src = t + (k - (K - 1))
        v = tl.load(x + seq * s_xb + src * s_xl + ch, mask=ok & (src >= 0) & (src < length), other=0.0).to(tl.float32)
        tl.store(partial + (block + k) * channels + ch, tl.sum(v * g, 0)[None, :], mask=ok)
    tl.store(partial + (block + K) * channels + ch, tl.sum(g, 0)[None, :], mask=ok)


@triton.jit
def _input_gradient_kernel(
    d_pre, weight, dx, length, channels, s_ob, s_ol,
    K: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """x_t reaches the outputs t .. t + K - 1."""
    seq = tl.program_id(0).to(tl.int64)
    t = (tl.program_id(1) * T + tl.arange(0, T))[:, None]
    ch = (tl.program_id(2) * C + tl.arange(0, C))[None, :]
    ok = ch < channels
    total = tl.zeros([T, C], tl.float32)
    for j in tl.static_range(K):
        g = tl.load(d_pre + (seq * length + t + j) * channels + ch, mask=ok & (t + j < length), other=0.0)
        total += g * tl.load(weight + ch * K + (K - 1 - j), mask=ok, other=0.0).to(tl.float32)
    tl.store(dx + seq * s_ob + t * s_ol + ch, total.to(dx.dtype.element_ty), mask=(t < length) & ok)


def conv_forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """silu(conv(x)) [B, L, channels], contiguous, in x's dtype; x's last dimension is contiguous."""
    b, length, channels = x.shape
    out = x.new_empty(b, length, channels)
    grid = (b, triton.cdiv(length, TOKENS), triton.cdiv(channels, CHANNELS))
    _conv_fwd_kernel[grid](
        x, weight, bias, out, length, channels, x.stride(0), x.stride(1),
        K=weight.shape[-1], T=TOKENS, C=CHANNELS, num_warps=4,
    )  # fmt: skip
    return out


def conv_backward(
    d_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dx: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes the gradient of x into dx (a view is welcome); returns those of weight [channels, K] and bias, float32."""
    b, length, channels = x.shape
    k, blocks = weight.shape[-1], triton.cdiv(length, TOKENS)
    partial = x.new_empty(b * blocks, k + 1, channels, dtype=torch.float32)
    d_pre = x.new_empty(b, length, channels, dtype=torch.float32)
    grid = (b, blocks, triton.cdiv(channels, CHANNELS))
    _pre_gradient_kernel[grid](
        d_out, x, weight, bias, d_pre, partial, length, channels, x.stride(0), x.stride(1),
        K=k, T=TOKENS, C=CHANNELS, num_warps=4,
    )  # fmt: skip
    _input_gradient_kernel[grid](
        d_pre, weight, dx, length, channels, dx.stride(0), dx.stride(1), K=k, T=TOKENS, C=CHANNELS, num_warps=4
    )
    total = partial.sum(0)
    return total[:k].T.contiguous(), total[k]
