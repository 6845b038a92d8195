"""What the trained baselines put in the place of our one-bit matrices; everything else of the harness stays.

Each module holds the n matrices of one name as a stack [n, rows, cols] and has the three methods that
`methods/dfssm/student.py` asks for:

    initialise(i, w, moment) -> None      # matrix i from the teacher's w [rows, cols]; no scale to fold into a norm
    effective(phase) -> [n, rows, cols]   # gradients to the masters, in phase.dtype
    export(i) -> Matrix                   # packed where the format exists, else float32 with the numbers simulated

Latents are in units of a scale of their matrix, so that one learning rate fits every matrix. Parameters called `latent`
and `row_gain` have rates of their own. Tests: `pytest tests/benchmarks/test_student_layers.py`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from slimba.formats import Matrix, MatrixLayout
from slimba.formats.int8 import quantize_rows
from slimba.formats.sign import pack_signs
from slimba.methods import fake_quant

__all__ = ["GROUP", "Fbi", "Levels", "Phase", "Ternary", "published_sign_export"]

GROUP = 128  # columns that share a scale of Ternary


class Phase(Protocol):
    """What the student says about the step; `alpha`, a scalar tensor, goes from 0 to 1."""

    rounding: bool
    frozen: bool
    alpha: torch.Tensor
    dtype: torch.dtype


class Gate(torch.autograd.Function):
    """The identity whose gradient is multiplied by `keep`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(keep)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (keep,) = ctx.saved_tensors
        return grad * keep, None


def thawed(latent: torch.Tensor, phase: Phase) -> torch.Tensor:
    """The latents, without gradient once they are frozen."""
    return latent.detach() if phase.frozen else latent


def int8_rows(t: torch.Tensor) -> torch.Tensor:
    """int8 with a float16 scale for each row of the last dimension: [n, rows, cols]."""
    return fake_quant.int8_rows(t.flatten(0, 1)).view_as(t)


def array(t: torch.Tensor) -> np.ndarray:
    return t.detach().float().cpu().numpy()


def plain_float32(w: np.ndarray) -> Matrix:
    return Matrix.quantize(w, MatrixLayout.plain(*w.shape, "float32"))


class Levels(nn.Module):
    """DF-SSM's scaffold, paper eqs. (1) and (2): `levels` evenly spaced values in -s..s with one scale s a row.

        w = s * ((1 - alpha) v + alpha round(v)),  v = clamp(latent, -1, 1),  s = mean|w| of the teacher's row at first

    17 levels are the published training; 2 are signs. Without `anneal` alpha is 1 throughout. The gradient of clamp and
    rounding is the identity, or cut off beyond |latent| > `ste_clip`. With a rank the scaffold gets (1 / rank) A B,
    A ~ N(0, 0.01^2), B = 0, as published, with int8 factors once rounding has begun; `lora` are the parameters that a
    second stage trains. The thresholds are the paper's even ones, not the random banks of the released code, which
    cost a layer 21 % more error.
    """

    row_base: torch.Tensor

    def __init__(
        self,
        layout: MatrixLayout,
        n: int,
        levels: int,
        *,
        rank: int = 0,
        ste_clip: float = float("inf"),
        anneal: bool = False,
    ) -> None:
        super().__init__()
        self.layout, self.levels, self.rank, self.ste_clip = layout, levels, rank, ste_clip
        self.anneal = anneal
        rows, cols = layout.rows, layout.cols
        self.latent = nn.Parameter(torch.zeros(n, rows, cols))
        self.row_gain = nn.Parameter(torch.ones(n, rows))
        self.register_buffer("row_base", torch.ones(n, rows))
        self.a = nn.Parameter(torch.randn(n, rows, rank) * 0.01) if rank else None
        self.b = nn.Parameter(torch.zeros(n, rank, cols)) if rank else None

    @torch.no_grad()
    def initialise(self, i: int, w: torch.Tensor | np.ndarray, moment: Any = None) -> None:
        w = torch.as_tensor(w, dtype=torch.float32, device=self.latent.device)
        scale = w.abs().mean(1).clamp_min(1e-12)
        self.row_base[i] = scale
        self.latent[i] = (w / scale[:, None]).clamp(-1, 1) if self.levels > 2 else w / scale[:, None]

    def nearest(self, latent: torch.Tensor) -> torch.Tensor:
        """The level of every latent, in -1..1; sign(0) = +1."""
        if self.levels == 2:
            return torch.where(latent >= 0, 1.0, -1.0)
        steps = self.levels - 1
        return ((latent.clamp(-1, 1) + 1) * (steps / 2)).round() * (2 / steps) - 1

    def row_scale(self, rounding: bool) -> torch.Tensor:
        scale = self.row_base * self.row_gain
        return fake_quant.float16(scale) if rounding else scale

    def effective(self, phase: Phase) -> torch.Tensor:
        latent = thawed(self.latent, phase)
        with torch.no_grad():
            value = self.nearest(self.latent)
            if self.anneal:
                value = torch.lerp(self.latent.clamp(-1, 1), value, phase.alpha)
        if self.ste_clip < float("inf"):
            latent = Gate.apply(latent, (self.latent.detach().abs() <= self.ste_clip).to(latent.dtype))
        w = fake_quant.StraightThrough.apply(latent, value) * self.row_scale(phase.rounding)[..., None]
        factors = self.factors(phase.rounding)
        return (w if factors is None else w + factors[0] @ factors[1]).to(phase.dtype)

    def factors(self, rounding: bool) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.a is None or self.b is None:
            return None
        a = self.a / self.rank  # the published factor, folded before A is rounded
        return (int8_rows(a), int8_rows(self.b)) if rounding else (a, self.b)

    def lora(self) -> list[nn.Parameter]:
        return [p for p in (self.a, self.b) if p is not None]

    def scaffold(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Levels in -1..1 [rows, cols] and float16 row scales [rows] of matrix i."""
        return array(self.nearest(self.latent[i])), array(self.row_scale(False)[i]).astype(np.float16)

    def export(self, i: int) -> Matrix:
        values, scale = self.scaffold(i)
        if self.levels == 2:
            out = Matrix(self.layout, {"0.packed": pack_signs(values), "0.scale": scale})
            return self.with_factors(out, i)
        return self.with_factors(plain_float32(values * scale.astype(np.float32)[:, None]), i)

    def with_factors(self, out: Matrix, i: int) -> Matrix:
        """The correction beside packed signs, or added to a simulated matrix, rounded to int8 in both cases."""
        if self.a is None or self.b is None:
            return out
        a, a_scale = quantize_rows(array(self.a[i] / self.rank))
        b, b_scale = quantize_rows(array(self.b[i]))
        if out.layout.lowrank:
            out.arrays |= dict(lowrank_a=a, lowrank_a_scale=a_scale, lowrank_b=b, lowrank_b_scale=b_scale)
            return out
        left = a.astype(np.float32) * a_scale.astype(np.float32)[:, None]
        right = b.astype(np.float32) * b_scale.astype(np.float32)[:, None]
        return plain_float32(out.dequantize() + left @ right)


def published_sign_export(module: Levels, i: int, layout: MatrixLayout, *, keep_latent_sign: bool = False) -> Matrix:
    """The file that DF-SSM writes of its 17-level scaffold: signs, the mean |w| of a row as its scale, A and B kept.

    A weight at level 0 is stored as -1, as published, or gets its latent's sign (`keep_latent_sign`).
    """
    values, scale = module.scaffold(i)
    signs = array(module.latent[i]) if keep_latent_sign else np.where(values > 0, 1.0, -1.0)
    mean = (np.abs(values).mean(1) * scale.astype(np.float32)).astype(np.float16)
    return module.with_factors(Matrix(layout, {"0.packed": pack_signs(signs), "0.scale": mean}), i)


class Ternary(nn.Module):
    """-1, 0, +1 times the mean |w| of 128 columns of a row (BitNet's absmean in groups, as Ternary Mamba has it).

    The scale is computed from the latents in every step, not learnt, because learnt ones are reported to collapse to
    zeros; the gradient of the whole quantiser is the identity.
    """

    base: torch.Tensor

    def __init__(self, layout: MatrixLayout, n: int) -> None:
        super().__init__()
        self.layout = layout
        self.latent = nn.Parameter(torch.zeros(n, layout.rows, layout.cols))
        self.register_buffer("base", torch.ones(n, 1, 1))

    @torch.no_grad()
    def initialise(self, i: int, w: torch.Tensor | np.ndarray, moment: Any = None) -> None:
        w = torch.as_tensor(w, dtype=torch.float32, device=self.latent.device)
        self.base[i] = w.abs().mean().clamp_min(1e-12)
        self.latent[i] = w / self.base[i]

    def quantised(self, w: torch.Tensor) -> torch.Tensor:
        """[n, rows, cols] -> the ternary values with float16 scales."""
        n, rows, cols = w.shape
        groups = -(-cols // GROUP)
        whole = nn.functional.pad(w, (0, groups * GROUP - cols)).view(n, rows, groups, GROUP)
        # padding counts for nothing; made on the device, where a captured graph may not copy from the host
        sizes = (cols - GROUP * torch.arange(groups, device=w.device)).clamp_max(GROUP)
        scale = (whole.abs().sum(-1) / sizes).half().float().clamp_min(fake_quant.SMALLEST_SCALE)[..., None]
        return ((whole / scale).round().clamp(-1, 1) * scale).reshape(n, rows, -1)[..., :cols]

    def effective(self, phase: Phase) -> torch.Tensor:
        w = thawed(self.latent, phase) * self.base
        with torch.no_grad():
            q = self.quantised(w)
        return fake_quant.StraightThrough.apply(w, q).to(phase.dtype)

    def export(self, i: int) -> Matrix:
        return plain_float32(array(self.quantised((self.latent * self.base)[i : i + 1])[0]))


class Fbi(nn.Module):
    """FBI-Linear (FBI-LLM, Bi-Mamba): w[o, i] = alpha[i] sign(latent[o, i]) + beta[i], one scale and shift a column.

    First values: beta = mean over rows of w, alpha = mean over rows of |w - beta|, signs of w (not of w - beta), as
    published; the gradient of the sign is the identity. `gain` and `shift` are alpha and beta in units of the first
    alpha.
    """

    base: torch.Tensor

    def __init__(self, layout: MatrixLayout, n: int) -> None:
        super().__init__()
        self.layout = layout
        self.latent = nn.Parameter(torch.zeros(n, layout.rows, layout.cols))
        self.gain = nn.Parameter(torch.ones(n, 1, layout.cols))
        self.shift = nn.Parameter(torch.zeros(n, 1, layout.cols))
        self.register_buffer("base", torch.ones(n, 1, layout.cols))

    @torch.no_grad()
    def initialise(self, i: int, w: torch.Tensor | np.ndarray, moment: Any = None) -> None:
        w = torch.as_tensor(w, dtype=torch.float32, device=self.latent.device)
        beta = w.mean(0, keepdim=True)
        alpha = (w - beta).abs().mean(0, keepdim=True).clamp_min(1e-12)
        self.base[i], self.shift[i] = alpha, beta / alpha
        self.latent[i] = w / w.abs().mean().clamp_min(1e-12)

    def scales(self, rounding: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and beta [n, 1, cols]."""
        alpha, beta = self.base * self.gain, self.base * self.shift
        return (fake_quant.float16(alpha), fake_quant.float16(beta)) if rounding else (alpha, beta)

    def effective(self, phase: Phase) -> torch.Tensor:
        alpha, beta = self.scales(phase.rounding)
        with torch.no_grad():
            value = torch.where(self.latent >= 0, 1.0, -1.0)
        signs = fake_quant.StraightThrough.apply(thawed(self.latent, phase), value)
        return (signs * alpha + beta).to(phase.dtype)

    def export(self, i: int) -> Matrix:
        alpha, beta = (array(t[i]).astype(np.float16).astype(np.float32) for t in self.scales(False))
        return plain_float32(np.where(array(self.latent[i]) >= 0, 1.0, -1.0).astype(np.float32) * alpha + beta)
