"""Gate and RMS norm after the scan, with gradients. Naive twin: `models/norms.py` (`GatedRMSNorm`).

    out = gated_norm_forward(y, z, weight, group_size, eps)       # norm(y * silu(z)) * weight
    d_weight = gated_norm_backward(d_out, y, z, weight, group_size, eps, dy, dz)

A program does one group of one token at a time; for the weight's gradient each walks over a run of tokens.
Tests: `pytest tests/kernels/test_triton.py`.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl

__all__ = ["gated_norm_backward", "gated_norm_forward"]

RUN = 16  # tokens of one program of the gradient


@triton.jit
def _fwd_kernel(y, z, weight, out, width, s_z, eps, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    token, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUP
    i = tl.arange(0, BLOCK)
    ok = i < GROUP
    v = tl.load(y + token * width + first + i, mask=ok, other=0.0).to(tl.float32)
    gate = tl.load(z + token * s_z + first + i, mask=ok, other=0.0).to(tl.float32)
    v = v * gate / (1.0 + tl.exp(-gate))
    scale = 1.0 / tl.sqrt(tl.sum(v * v, 0) / GROUP + eps)
    w = tl.load(weight + first + i, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + token * width + first + i, (v * scale * w).to(out.dtype.element_ty), mask=ok)


@triton.jit
def _bwd_kernel(
    d_out, y, z, weight, dy, dz, partial, tokens, width, s_z, s_dz, eps,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1) * GROUP
    i = tl.arange(0, BLOCK)
    ok = i < GROUP
    w = tl.load(weight + first + i, mask=ok, other=0.0).to(tl.float32)
    d_w = tl.zeros([BLOCK], tl.float32)
    for r in range(RUN):
        token = tl.program_id(0).to(tl.int64) * RUN + r
        here = ok & (token + 0 * i < tokens)
        v = tl.load(y + token * width + first + i, mask=here, other=0.0).to(tl.float32)
        gate = tl.load(z + token * s_z + first + i, mask=here, other=0.0).to(tl.float32)
        g = tl.load(d_out + token * width + first + i, mask=here, other=0.0).to(tl.float32)
        sig = 1.0 / (1.0 + tl.exp(-gate))
        act = gate * sig
        u = v * act
        scale = 1.0 / tl.sqrt(tl.sum(u * u, 0) / GROUP + eps)
        n = u * scale
        d_w += g * n
        d_n = g * w
        d_u = (d_n - n * (tl.sum(d_n * n, 0) / GROUP)) * scale
        tl.store(dy + token * width + first + i, (d_u * act).to(dy.dtype.element_ty), mask=here)
        d_gate = d_u * v * sig * (1.0 + gate * (1.0 - sig))
        tl.store(dz + token * s_dz + first + i, d_gate.to(dz.dtype.element_ty), mask=here)
    tl.store(partial + tl.program_id(0).to(tl.int64) * width + first + i, d_w, mask=ok)


def _warps(block: int) -> int:
    return min(8, max(1, block // 256))


def gated_norm_forward(
    y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, group_size: int, eps: float
) -> torch.Tensor:
    """y [B, L, width] contiguous, z [B, L, width] with rows at one distance, weight [width] -> [B, L, width]."""
    width = y.shape[-1]
    out, block = torch.empty_like(y), triton.next_power_of_2(group_size)
    grid = (y.numel() // width, width // group_size)
    _fwd_kernel[grid](
        y, z, weight, out, width, z.stride(-2), eps, GROUP=group_size, BLOCK=block, num_warps=_warps(block)
    )
    return out


def gated_norm_backward(
    d_out: torch.Tensor,
    y: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    group_size: int,
    eps: float,
    dy: torch.Tensor,
    dz: torch.Tensor,
) -> torch.Tensor:
    """Writes the gradients of y and z into dy and dz; returns that of the weight, float32 [width]."""
    width = y.shape[-1]
    tokens, block = y.numel() // width, triton.next_power_of_2(group_size)
    runs = triton.cdiv(tokens, RUN)
    partial = y.new_empty(runs, width, dtype=torch.float32)
    _bwd_kernel[(runs, width // group_size)](
        d_out, y, z, weight, dy, dz, partial, tokens, width, z.stride(-2), dz.stride(-2), eps,
        GROUP=group_size, BLOCK=block, RUN=RUN, num_warps=_warps(block),
    )  # fmt: skip
    return partial.sum(0)
