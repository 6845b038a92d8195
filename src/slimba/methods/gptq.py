"""Round-to-nearest and GPTQ (arXiv 2210.17323) of one matrix, a scale a row or a group of 128 columns. Torch.

    q = round_to_nearest(w, Grid(bits=4))
    q = gptq(w, hessian, Grid(bits=3, half=True))
    q = gptq(w, hessian, Grid(bits=8), group=None)   # one scale a row
    q.weight()                                       # dequantised [rows, cols]; q.codes, q.scale
    q.arrays("int8")                                 # the parts of our format

Symmetric, no zero point, columns in their order (act-order off). A group's scale is the one of 60 fractions of its
largest weight with the least squared error, which for 2 and 3 bits is far better than the largest weight itself. GPTQ
takes it from the weights as they stand when the group's turn comes. Tests: `pytest tests/methods/test_gptq.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from slimba.formats.int4 import GROUP

__all__ = ["DAMPING", "GROUP", "Grid", "Quantised", "gptq", "round_to_nearest"]

FRACTIONS = 60
DAMPING = 0.01  # of the Hessian's mean diagonal, as published


@dataclass(frozen=True, slots=True)
class Grid:
    """The levels in units of the scale: integers -2^(b-1) .. 2^(b-1) - 1, or with `half` the odd halves, symmetric.

    4 and 8 bits without `half` are -7..7 and -127..127, what our int4 and int8 formats hold.
    """

    bits: int
    half: bool = False

    @property
    def low(self) -> float:
        if self.half:
            return -(2 ** (self.bits - 1)) + 0.5
        return 1.0 - 2 ** (self.bits - 1) if self.bits in (4, 8) else -float(2 ** (self.bits - 1))

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
    """codes float32 [rows, cols] (levels in units of the scale), scale float32 [rows, groups] that float16 holds.

    `group` columns share a scale.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    group: int = GROUP

    def weight(self) -> torch.Tensor:
        return self.codes * self.scale.repeat_interleave(self.group, dim=1)[:, : self.codes.shape[1]]

    def arrays(self, format: str) -> dict[str, np.ndarray]:
        """The parts of a segment of `format`: int4 (groups of 128) or int8 (a scale a row)."""
        codes = self.codes.cpu().numpy().astype(np.int8)
        scale = self.scale.cpu().numpy().astype(np.float16)
        if format == "int8":
            return {"weight": codes, "scale": scale[:, 0]}
        nibbles = np.full((len(codes), codes.shape[1] + codes.shape[1] % 2), 8, np.uint8)
        nibbles[:, : codes.shape[1]] = codes + 8
        return {"packed": nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), "scale": scale}


def round_to_nearest(w: torch.Tensor, grid: Grid, group: int | None = GROUP) -> Quantised:
    """w float32 [rows, cols]; `group` columns share a scale, None: all of a row."""
    group = group or w.shape[1]
    codes, scales = torch.empty_like(w), []
    for at in range(0, w.shape[1], group):
        part = w[:, at : at + group]
        scales.append(grid.scale(part))
        codes[:, at : at + group] = grid.nearest(part / scales[-1])
    return Quantised(codes, torch.cat(scales, dim=1), group)


def gptq(
    w: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    group: int | None = GROUP,
    damping: float = DAMPING,
    scale: torch.Tensor | None = None,
) -> Quantised:
    """w float32 [rows, cols], hessian [cols, cols] = sum of x x^T over the calibration inputs (any factor).

    Columns one by one; the error of each is taken up by those that follow, weighted by the inverse Hessian's Cholesky
    factor. A column that is never active is set to zero first. `group` columns share a scale, GROUP or None: all of a
    row. damping: added to the Hessian's diagonal, as a part of its mean. scale [rows, 1]: given, not searched.
    """
    w, h = w.clone(), hessian.double().clone()
    dead = h.diagonal() <= 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(damping * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    codes, scales = torch.empty_like(w), [] if scale is None else [scale]
    for at in range(0, w.shape[1], GROUP):
        end = min(at + GROUP, w.shape[1])
        if group or not scales:
            scales.append(grid.scale(w[:, at:end] if group else w))
        scale = scales[-1]
        errors = torch.empty_like(w[:, at:end])
        for j in range(at, end):
            codes[:, j] = grid.nearest(w[:, j] / scale[:, 0])
            error = (w[:, j] - codes[:, j] * scale[:, 0]) / upper[j, j]
            w[:, j:end] -= error[:, None] * upper[j, j:end]
            errors[:, j - at] = error
        w[:, end:] -= errors @ upper[at:end, end:]
    return Quantised(codes, torch.cat(scales, dim=1), group or w.shape[1])
