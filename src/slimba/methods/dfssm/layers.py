"""The student of `dfssm`: trainable masters whose `effective()` weights run through the untouched network.

The network code of `models/` never learns that its weights are one-bit: `Student.effective()` builds the canonical
state dict from the masters (signs straight-through, int8 and float16 rounding where that phase has begun) and
`torch.func.functional_call` runs it. What is exported is what `effective()` returned, part for part.

The column scale c is folded from the first step: the norm before the matrix holds g * c, and int8 rows and the low-rank
input factor are kept divided by c, in the coordinates in which the file stores them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from slimba.formats import Matrix, MatrixLayout
from slimba.formats.int8 import quantize_rows
from slimba.formats.sign import pack_signs
from slimba.methods import fake_quant
from slimba.methods.dfssm.fit import SignFit

__all__ = ["PlainMatrix", "SignMatrix", "array"]

ROUND = {"int8": fake_quant.int8_rows, "int4": fake_quant.int4_groups, "float16": fake_quant.float16}


def array(t: torch.Tensor) -> np.ndarray:
    """float32 NumPy copy."""
    return t.detach().float().cpu().numpy()


class PlainMatrix(nn.Module):
    """A matrix in one rounded format: embedding, head, Mamba-1's x_proj and dt_proj."""

    def __init__(self, w: torch.Tensor, layout: MatrixLayout) -> None:
        super().__init__()
        self.layout = layout
        self.weight = nn.Parameter(w.clone())

    def effective(self, rounding: bool, frozen: bool) -> torch.Tensor:
        return ROUND[self.layout.segments[0].format](self.weight) if rounding else self.weight

    def export(self) -> Matrix:
        return Matrix.quantize(array(self.weight), self.layout)


class SignMatrix(nn.Module):
    """Row segments of signs and int8, a low-rank correction, a column scale where no norm can hold it.

    latent [S, cols] holds all sign rows in order, rows8 [I, cols] all int8 rows. `row_base` is the first row scale;
    the trained `row_gain` is relative to it, so that one learning rate fits every matrix.
    """

    row_base: torch.Tensor

    def __init__(self, layout: MatrixLayout, ste_clip: float) -> None:
        super().__init__()
        self.layout, self.ste_clip = layout, ste_clip
        n_sign = sum(s.rows for s in layout.segments if s.format == "sign")
        cols = layout.cols
        self.latent = nn.Parameter(torch.zeros(n_sign, cols))
        self.row_gain = nn.Parameter(torch.ones(n_sign))
        self.register_buffer("row_base", torch.ones(n_sign))
        self.rows8 = nn.Parameter(torch.zeros(layout.rows - n_sign, cols)) if n_sign < layout.rows else None
        self.a = self.b = self.col = None
        if layout.lowrank:
            n = layout.lowrank.stop - layout.lowrank.start
            self.a = nn.Parameter(torch.zeros(n, layout.lowrank.rank))
            self.b = nn.Parameter(torch.zeros(layout.lowrank.rank, cols))
        if layout.col_scale:
            self.col = nn.Parameter(torch.ones(cols))

    def initialise(self, w: torch.Tensor, fit: SignFit) -> None:
        """Masters from the fit of the sign rows; `w` is the teacher's whole matrix [rows, cols]."""
        is_sign = self.sign_mask(w.device)
        with torch.no_grad():
            self.latent.copy_(fit.latent)
            self.row_base.copy_(fit.row)
            if self.rows8 is not None:
                self.rows8.copy_(w[~is_sign] / fit.col)
            if self.a is not None and self.b is not None and self.layout.lowrank:
                lr = self.layout.lowrank
                full = w.new_zeros(w.shape[0], lr.rank)
                full[is_sign] = fit.a
                self.a.copy_(full[lr.start : lr.stop])
                self.b.copy_(fit.b / fit.col)
            if self.col is not None:
                self.col.copy_(fit.col)

    def sign_mask(self, device: torch.device) -> torch.Tensor:
        """bool [rows]: which rows are signs."""
        return torch.cat([torch.full((s.rows,), s.format == "sign", device=device) for s in self.layout.segments])

    def row_scale(self, rounding: bool) -> torch.Tensor:
        scale = self.row_base * self.row_gain
        return fake_quant.float16(scale) if rounding else scale

    def effective(self, rounding: bool, frozen: bool) -> torch.Tensor:
        """float32 [rows, cols] with gradients to every master (none to the latents once frozen)."""
        latent = self.latent.detach() if frozen else self.latent
        w_sign = fake_quant.signs(latent, self.ste_clip) * self.row_scale(rounding)[:, None]
        rows8: torch.Tensor | None = self.rows8
        if rows8 is not None and rounding:
            rows8 = fake_quant.int8_rows(rows8)
        w = self.interleave(w_sign, rows8)
        if self.a is not None and self.b is not None and self.layout.lowrank:
            a, b = (fake_quant.int8_rows(self.a), fake_quant.int8_rows(self.b)) if rounding else (self.a, self.b)
            lr = self.layout.lowrank
            w = w + nn.functional.pad(a @ b, (0, 0, lr.start, self.layout.rows - lr.stop))
        if self.col is not None:
            w = w * (fake_quant.float16(self.col) if rounding else self.col)
        return w

    def interleave(self, w_sign: torch.Tensor, rows8: torch.Tensor | None) -> torch.Tensor:
        """Sign rows and int8 rows in the matrix's order."""
        if rows8 is None:
            return w_sign
        pieces, at = [], {"sign": 0, "int8": 0}
        for s in self.layout.segments:
            source = w_sign if s.format == "sign" else rows8
            pieces.append(source[at[s.format] : at[s.format] + s.rows])
            at[s.format] += s.rows
        return torch.cat(pieces)

    def export(self) -> Matrix:
        """The packed parts, computed by the NumPy formats from the float32 masters."""
        out = Matrix(self.layout)
        latent, scale = array(self.latent), array(self.row_scale(False)).astype(np.float16)
        rows8 = array(self.rows8) if self.rows8 is not None else None
        at = {"sign": 0, "int8": 0}
        for i, s in enumerate(self.layout.segments):
            rows = slice(at[s.format], at[s.format] + s.rows)
            if s.format == "sign":
                parts = {"packed": pack_signs(latent[rows]), "scale": scale[rows]}
            else:
                assert rows8 is not None
                codes, row_scale = quantize_rows(rows8[rows])
                parts = {"weight": codes, "scale": row_scale}
            out.arrays |= {self.layout.part_name(i, p): a for p, a in parts.items()}
            at[s.format] += s.rows
        if self.a is not None and self.b is not None:
            out.arrays["lowrank_a"], out.arrays["lowrank_a_scale"] = quantize_rows(array(self.a))
            out.arrays["lowrank_b"], out.arrays["lowrank_b_scale"] = quantize_rows(array(self.b))
        if self.col is not None:
            out.arrays["col_scale"] = array(self.col).astype(np.float16)
        return out
