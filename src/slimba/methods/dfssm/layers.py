"""The trainable masters of `dfssm`: all matrices of one shape and layout in one module, stacked [n, rows, cols].

The network code of `models/` never learns that its weights are one-bit: `effective()` makes the weights from the
masters (signs straight-through; int8, int4 and float16 rounding where that phase has begun) and
`torch.func.functional_call` runs them. What is exported is what `effective()` returned, part for part. Stacked, a layer
more costs no launch more.

The column scale c is folded from the first step: the norm before the matrix holds g * c, and the integer rows and the
low-rank input factor are kept divided by c, in the coordinates in which the file stores them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from slimba.formats import FORMATS, Matrix, MatrixLayout
from slimba.formats.int8 import quantize_rows
from slimba.formats.sign import pack_signs
from slimba.methods import fake_quant
from slimba.methods.dfssm.fit import fit_signs
from slimba.methods.dfssm.recipe import DfssmRecipe
from slimba.methods.signs import Estimator, PlaneScale, sign_weights

__all__ = ["Phase", "PlainMatrices", "SignMatrices", "array"]

ROUND = {"int8": fake_quant.int8_rows, "int4": fake_quant.int4_groups, "float16": fake_quant.float16}


@dataclass(slots=True)
class Phase:
    """Where training stands: `rounding` and `frozen` are both on in the deployed numerics.

    `alpha` is the share of the steps done, a scalar tensor, so that a captured graph reads the value of its step.
    """

    rounding: bool = False
    frozen: bool = False
    alpha: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    dtype: torch.dtype = torch.float32


def array(t: torch.Tensor) -> np.ndarray:
    """float32 NumPy copy."""
    return t.detach().float().cpu().numpy()


class PlainMatrices(nn.Module):
    """n matrices in rounded formats without signs: embedding, head, Mamba-1's x_proj and dt_proj."""

    def __init__(self, n: int, layout: MatrixLayout) -> None:
        super().__init__()
        self.layout = layout
        self.weight = nn.Parameter(torch.zeros(n, layout.rows, layout.cols))

    @torch.no_grad()
    def initialise(self, i: int, w: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor | None:
        """Take the teacher's matrix i, w [rows, cols]."""
        self.weight[i] = w
        return None

    def effective(self, phase: Phase) -> torch.Tensor:
        """[n, rows, cols] in the phase's dtype, with gradients."""
        if not phase.rounding:
            return self.weight.to(phase.dtype)
        pieces = self.weight.split([s.rows for s in self.layout.segments], 1)
        rounded = [ROUND[s.format](w) for s, w in zip(self.layout.segments, pieces, strict=True)]
        return (rounded[0] if len(rounded) == 1 else torch.cat(rounded, 1)).to(phase.dtype)

    def export(self, i: int) -> Matrix:
        """Matrix i as it is stored."""
        return Matrix.quantize(array(self.weight[i]), self.layout)


class SignMatrices(nn.Module):
    """n matrices of sign and integer rows; a second sign plane, a low-rank correction, a column scale if asked.

    latent [n, S, cols] holds all sign rows in order, `rest` [n, I, cols] the int8 and int4 rows. `row_base` is the
    first row scale; the trained `row_gain` is relative to it, so that one learning rate fits every matrix; likewise for
    the plane. `columns` [n, 1, cols] is 1 in the columns of the second plane.
    """

    row_base: torch.Tensor
    plane_base: torch.Tensor
    columns: torch.Tensor

    def __init__(self, n: int, layout: MatrixLayout, recipe: DfssmRecipe) -> None:
        super().__init__()
        self.layout, self.recipe = layout, recipe
        signs, cols = sum(s.rows for s in layout.segments if s.format == "sign"), layout.cols
        self.latent = nn.Parameter(torch.zeros(n, signs, cols))
        self.row_gain = nn.Parameter(torch.ones(n, signs))
        self.register_buffer("row_base", torch.ones(n, signs))
        self.rest = nn.Parameter(torch.zeros(n, layout.rows - signs, cols)) if signs < layout.rows else None
        self.a = self.b = self.col = self.plane_gain = None
        if layout.plane:
            self.plane_gain = nn.Parameter(torch.ones(n, signs))
            self.register_buffer("plane_base", torch.zeros(n, signs))
            self.register_buffer("columns", torch.zeros(n, 1, cols))
        if layout.lowrank:
            self.a = nn.Parameter(torch.zeros(n, layout.lowrank.stop - layout.lowrank.start, layout.lowrank.rank))
            self.b = nn.Parameter(torch.zeros(n, layout.lowrank.rank, cols))
        if layout.col_scale:
            self.col = nn.Parameter(torch.ones(n, cols))

    @torch.no_grad()
    def initialise(self, i: int, w: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
        """Fit matrix i to the teacher's, w [rows, cols], weighted by its inputs' mean squares, moment [cols].

        Returns the column scale [cols] that the norm before it takes (the module's own, where it has one).
        """
        is_sign = self.sign_mask().to(w.device)
        lowrank, r = self.layout.lowrank, self.recipe
        rank = lowrank.rank if lowrank else 0
        fit = fit_signs(w[is_sign], moment, rank, r.init_rounds, r.col_floor, plane=self.plane_span())
        self.latent[i], self.row_base[i] = fit.latent, fit.row
        if self.layout.plane:
            self.plane_base[i] = fit.plane
            self.columns[i, 0, fit.columns] = 1
        if self.rest is not None:
            self.rest[i] = w[~is_sign] / fit.col
        if self.a is not None and self.b is not None and lowrank:
            full = w.new_zeros(w.shape[0], rank)
            full[is_sign] = fit.a
            self.a[i], self.b[i] = full[lowrank.start : lowrank.stop], fit.b / fit.col
        if self.col is not None:
            self.col[i] = fit.col
        return fit.col

    def sign_mask(self) -> torch.Tensor:
        """bool [rows]: which rows are signs."""
        return torch.cat([torch.full((s.rows,), s.format == "sign") for s in self.layout.segments])

    def plane_span(self) -> tuple[int, int, int] | None:
        """Columns of the second plane, and its first row and end among the sign rows."""
        p, mask = self.layout.plane, self.sign_mask()
        return (p.cols, int(mask[: p.start].sum()), int(mask[: p.stop].sum())) if p else None

    def scales(self, rounding: bool) -> tuple[torch.Tensor, PlaneScale | None]:
        """Row scale [n, S] and the second plane's, as stored where `rounding`."""
        row, plane = self.row_base * self.row_gain, None
        if self.plane_gain is not None:
            scale = self.plane_base * self.plane_gain
            plane = PlaneScale(fake_quant.float16(scale) if rounding else scale, self.columns)
        return (fake_quant.float16(row) if rounding else row), plane

    def effective(self, phase: Phase) -> torch.Tensor:
        """[n, rows, cols] in the phase's dtype with gradients to every master (none to the latents once frozen)."""
        r, on = self.recipe, phase.rounding
        row, plane = self.scales(on)
        alpha = torch.ones_like(phase.alpha) if phase.frozen else phase.alpha
        latent = self.latent.detach() if phase.frozen else self.latent
        w = sign_weights(latent, row, plane, Estimator(r.estimator, r.ste_clip, alpha), phase.dtype)
        w = self.interleave(w, phase)
        if self.a is not None and self.b is not None and self.layout.lowrank:
            a, b = (fake_quant.int8_rows(self.a), fake_quant.int8_rows(self.b)) if on else (self.a, self.b)
            lr = self.layout.lowrank
            product = a.to(phase.dtype) @ b.to(phase.dtype)
            w = w + nn.functional.pad(product, (0, 0, lr.start, self.layout.rows - lr.stop))
        if self.col is not None:
            w = w * (fake_quant.float16(self.col) if on else self.col)[:, None].to(phase.dtype)
        return w

    def interleave(self, signs: torch.Tensor, phase: Phase) -> torch.Tensor:
        """Sign rows and the others in the matrix's order."""
        if self.rest is None:
            return signs
        pieces, at = [], {True: 0, False: 0}
        for s in self.layout.segments:
            is_sign = s.format == "sign"
            source = signs if is_sign else self.rest
            piece = source[:, at[is_sign] : at[is_sign] + s.rows]
            if phase.rounding and not is_sign:
                piece = ROUND[s.format](piece)
            pieces.append(piece.to(phase.dtype))
            at[is_sign] += s.rows
        return torch.cat(pieces, 1)

    @torch.no_grad()
    def export(self, i: int) -> Matrix:
        """Matrix i as it is stored, computed by the NumPy formats from the float32 masters."""
        out, latent = Matrix(self.layout), array(self.latent[i])
        row, plane = self.scales(False)
        rest, at = (array(self.rest[i]) if self.rest is not None else latent[:0]), {True: 0, False: 0}
        for k, s in enumerate(self.layout.segments):
            is_sign = s.format == "sign"
            rows = slice(at[is_sign], at[is_sign] + s.rows)
            if is_sign:
                parts = {"packed": pack_signs(latent[rows]), "scale": array(row[i])[rows].astype(np.float16)}
            else:
                parts = FORMATS[s.format].pack(rest[rows])
            out.arrays |= {self.layout.part_name(k, p): a for p, a in parts.items()}
            at[is_sign] += s.rows
        if plane is not None:
            self.export_plane(out, i, latent, array(plane.scale[i]))
        if self.a is not None and self.b is not None:
            out.arrays["lowrank_a"], out.arrays["lowrank_a_scale"] = quantize_rows(array(self.a[i]))
            out.arrays["lowrank_b"], out.arrays["lowrank_b_scale"] = quantize_rows(array(self.b[i]))
        if self.col is not None:
            out.arrays["col_scale"] = array(self.col[i]).astype(np.float16)
        return out

    def export_plane(self, out: Matrix, i: int, latent: np.ndarray, scale: np.ndarray) -> None:
        """The second plane's signs: the first one's where |latent| >= 1, else the opposite."""
        span = self.plane_span()
        assert span is not None
        cols, start, stop = span
        index = np.flatnonzero(array(self.columns[i, 0])).astype(np.int32)
        chosen = latent[start:stop, index]
        first = np.where(chosen >= 0, 1.0, -1.0)
        out.arrays["plane_packed"] = pack_signs(np.where(np.abs(chosen) >= 1, first, -first))
        out.arrays["plane_scale"] = scale[start:stop].astype(np.float16)
        if cols < self.layout.cols:
            out.arrays["plane_index"] = index
