"""Sign weights from their latents, and the gradients back. Naive twin: `methods/signs.py` (the estimator `clip`).

    w = signs_forward(latent, row, plane, columns, dtype)                       # [n, rows, cols]
    d_row, d_plane = signs_backward(d_w, latent, row, plane, columns, clip, d_latent)

A program does one row. Tests: `pytest tests/kernels/test_triton.py`.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl

__all__ = ["signs_backward", "signs_forward"]


@triton.jit
def _fwd_kernel(latent, row, plane, columns, w, rows, cols, PLANE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = j < cols
    v = tl.load(latent + at * cols + j, mask=ok, other=0.0)
    first = tl.where(v >= 0, 1.0, -1.0)
    out = first * tl.load(row + at)
    if PLANE:
        on = tl.load(columns + (at // rows) * cols + j, mask=ok, other=0.0)
        second = tl.where(tl.abs(v) >= 1, first, -first)
        out += second * on * tl.load(plane + at)
    tl.store(w + at * cols + j, out.to(w.dtype.element_ty), mask=ok)


@triton.jit
def _bwd_kernel(
    d_w, latent, row, plane, columns, d_latent, d_row, d_plane, rows, cols, clip,
    PLANE: tl.constexpr, LATENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    scale = tl.load(row + at)
    i = tl.arange(0, BLOCK)
    sum_row = tl.zeros([BLOCK], tl.float32)
    sum_plane = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        j = start + i
        ok = j < cols
        v = tl.load(latent + at * cols + j, mask=ok, other=0.0)
        g = tl.load(d_w + at * cols + j, mask=ok, other=0.0).to(tl.float32)
        first = tl.where(v >= 0, 1.0, -1.0)
        sum_row += g * first
        limit = clip + 0.0 * v
        if PLANE:
            on = tl.load(columns + (at // rows) * cols + j, mask=ok, other=0.0)
            sum_plane += g * tl.where(tl.abs(v) >= 1, first, -first) * on
            limit += 0.5 * on
        if LATENT:
            tl.store(d_latent + at * cols + j, tl.where(tl.abs(v) <= limit, g * scale, 0.0), mask=ok)
    tl.store(d_row + at, tl.sum(sum_row, 0))
    if PLANE:
        tl.store(d_plane + at, tl.sum(sum_plane, 0))


def signs_forward(
    latent: torch.Tensor,
    row: torch.Tensor,
    plane: torch.Tensor | None,
    columns: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """latent [n, rows, cols], row and plane [n, rows], columns [n, 1, cols], all float32 -> [n, rows, cols]."""
    n, rows, cols = latent.shape
    w = torch.empty(n, rows, cols, dtype=dtype, device=latent.device)
    block = min(1024, triton.next_power_of_2(cols))
    _fwd_kernel[(n * rows, triton.cdiv(cols, block))](
        latent.contiguous(), row.contiguous(), plane.contiguous() if plane is not None else row, columns, w, rows, cols,
        PLANE=plane is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return w


def signs_backward(
    d_w: torch.Tensor,
    latent: torch.Tensor,
    row: torch.Tensor,
    plane: torch.Tensor | None,
    columns: torch.Tensor | None,
    clip: float,
    d_latent: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """d_w [n, rows, cols] contiguous. Writes the latents' gradient into d_latent, if given.

    Returns those of the scales, [n, rows] each.
    """
    n, rows, cols = latent.shape
    d_row = torch.empty(n, rows, dtype=torch.float32, device=latent.device)
    d_plane = torch.empty_like(d_row) if plane is not None else None
    block = min(1024, triton.next_power_of_2(cols))
    _bwd_kernel[(n * rows,)](
        d_w, latent.contiguous(), row.contiguous(), plane.contiguous() if plane is not None else row, columns,
        d_latent, d_row, d_plane, rows, cols, clip,
        PLANE=plane is not None, LATENT=d_latent is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return d_row, d_plane
