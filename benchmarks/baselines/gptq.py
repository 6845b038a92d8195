"""Round-to-nearest and GPTQ (arXiv 2210.17323) of one matrix, in groups of 128 columns. Torch, CPU or GPU.

    q = round_to_nearest(w, Grid(bits=4))
    q = gptq(w, hessian, Grid(bits=3, half=True))
    q.weight()                       # dequantised [rows, cols]; q.codes, q.scale

Symmetric, no zero point, columns in their order (act-order off). A group's scale is the one of 60 fractions of its
largest weight with the least squared error, which for 2 and 3 bits is far better than the largest weight itself. GPTQ
takes it from the weights as they stand when the group's turn comes. Tests: `pytest tests/benchmarks/test_gptq.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["GROUP", "Grid", "Quantised", "gptq", "round_to_nearest"]

GROUP = 128
FRACTIONS = 60
DAMPING = 0.01  # of the Hessian's mean diagonal, as published


@dataclass(frozen=True, slots=True)
class Grid:
    """The levels in units of the scale: integers -2^(b-1) .. 2^(b-1) - 1, or with `half` the odd halves, symmetric.

    4 bits without `half` are -7..7, what our int4 format holds.
    """

    bits: int
    half: bool = False

    @property
    def low(self) -> float:
        if self.half:
            return -(2 ** (self.bits - 1)) + 0.5
        return -7.0 if self.bits == 4 else -float(2 ** (self.bits - 1))

    @property
    def high(self) -> float:
        return 2 ** (self.bits - 1) - (0.5 if self.half else 1.0)

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest level of x, both in units of the scale."""
        return ((x - 0.5).round() + 0.5 if self.half else x.round()).clamp(self.low, self.high)

    def scale(self, w: torch.Tensor) -> torch.Tensor:
        """[rows, n] -> [rows, 1]: the best scale of each row, a float16 number held in float32."""
        top = w.abs().amax(1, keepdim=True)
        best = torch.full_like(top, float("inf"))
        out = torch.zeros_like(top)
        for k in range(1, FRACTIONS + 1):
            # up to where the farthest level reaches the largest weight, on the side that reaches less far
            scale = (top * (k / FRACTIONS) / min(self.high, -self.low)).half().float().clamp_min(2.0**-24)
            error = (self.nearest(w / scale) * scale - w).square().sum(1, keepdim=True)
            out, best = torch.where(error < best, scale, out), torch.minimum(error, best)
        return out


@dataclass(slots=True)
class Quantised:
    """codes float32 [rows, cols] (levels in units of the scale), scale float32 [rows, groups] that float16 holds."""

    codes: torch.Tensor
    scale: torch.Tensor

    def weight(self) -> torch.Tensor:
        return self.codes * self.scale.repeat_interleave(GROUP, dim=1)[:, : self.codes.shape[1]]


def round_to_nearest(w: torch.Tensor, grid: Grid) -> Quantised:
    """w float32 [rows, cols]."""
    codes, scales = torch.empty_like(w), []
    for at in range(0, w.shape[1], GROUP):
        part = w[:, at : at + GROUP]
        scales.append(grid.scale(part))
        codes[:, at : at + GROUP] = grid.nearest(part / scales[-1])
    return Quantised(codes, torch.cat(scales, dim=1))


def gptq(w: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> Quantised:
    """w float32 [rows, cols], hessian [cols, cols] = sum of x x^T over the calibration inputs (any factor).

    Columns one by one; the error of each is taken up by those that follow, weighted by the inverse Hessian's Cholesky
    factor. A column that is never active is set to zero first.
    """
    w, h = w.clone(), hessian.double().clone()
    dead = h.diagonal() <= 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    codes, scales = torch.empty_like(w), []
    for at in range(0, w.shape[1], GROUP):
        end = min(at + GROUP, w.shape[1])
        scale = grid.scale(w[:, at:end])
        errors = torch.empty_like(w[:, at:end])
        for j in range(at, end):
            codes[:, j] = grid.nearest(w[:, j] / scale[:, 0])
            error = (w[:, j] - codes[:, j] * scale[:, 0]) / upper[j, j]
            w[:, j:end] -= error[:, None] * upper[j, j:end]
            errors[:, j - at] = error
        w[:, end:] -= errors @ upper[at:end, end:]
        scales.append(scale)
    return Quantised(codes, torch.cat(scales, dim=1))
