"""Sign weights inside training: forward the values of the packed file, backward a straight-through gradient.

    w = sign_weights(latent, row, Plane(scale, columns), estimator)        # [n, rows, cols]

    w = row * S1                      S1 = sign(latent), sign(0) = +1
      + plane * S2 on the columns of the second plane,   S2 = S1 where |latent| >= 1, else -S1

One latent carries both signs: it is the weight in units of the row scale, and the value is its nearest level among
+-(row - plane), +-(row + plane), whose border is |latent| = 1.
Latents are trained as if w were row * latent (the straight-through estimator, arXiv 1308.3432); `Estimator` has the
variants. On a GPU one kernel does each direction: kernels/triton/signs.py. Tests: `pytest tests/methods/test_signs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from slimba.kernels import triton

__all__ = ["Estimator", "Kind", "PlaneScale", "sign_weights"]

Kind = Literal["clip", "tanh", "blend"]


@dataclass(frozen=True, slots=True)
class Estimator:
    """How a gradient passes the sign.

    clip: unchanged where |latent| <= clip, 0 beyond. tanh: times 1 - tanh(k latent)^2, k from 1 to 4 as alpha goes from
    0 to 1 (SmoothSign). blend: as clip, but forward (1 - alpha) clamp(latent) + alpha sign(latent), so that the network
    turns binary slowly. `alpha` is a scalar tensor. The second plane's columns clip half a unit later, where its levels
    end.
    """

    kind: Kind
    clip: float
    alpha: torch.Tensor


@dataclass(frozen=True, slots=True)
class PlaneScale:
    """The second plane: its scale [n, rows] (0 in rows without), and 1.0 in its columns, else 0.0: [n, 1, cols]."""

    scale: torch.Tensor
    columns: torch.Tensor


def fused(latent: torch.Tensor, estimator: Estimator) -> Any:
    """The module with the Triton kernels where they can run."""
    return triton.optional("signs") if latent.is_cuda and estimator.kind == "clip" else None


def _values(
    latent: torch.Tensor, columns: torch.Tensor | None, estimator: Estimator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the row scale and the plane's scale multiply."""
    first = torch.where(latent >= 0, 1.0, -1.0).to(latent.dtype)
    second = None if columns is None else torch.where(latent.abs() >= 1, first, -first) * columns
    if estimator.kind == "blend":
        soft = latent.clamp(-estimator.clip, estimator.clip)
        first = soft + estimator.alpha * (first - soft)
        second = None if second is None else second * estimator.alpha
    return first, second


class SignWeights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        latent: torch.Tensor,
        row: torch.Tensor,
        scale: torch.Tensor | None,
        columns: torch.Tensor | None,
        estimator: Estimator,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(latent, row, scale, columns)
        ctx.estimator, ctx.kernel = estimator, fused(latent, estimator)
        if ctx.kernel is not None:
            out: torch.Tensor = ctx.kernel.signs_forward(latent, row, scale, columns, dtype)
            return out
        first, second = _values(latent, columns, estimator)
        w = first * row[..., None]
        if scale is not None and second is not None:
            w = w + second * scale[..., None]
        return w.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        latent, row, scale, columns = ctx.saved_tensors
        if ctx.kernel is not None:
            d_latent = torch.empty_like(latent) if ctx.needs_input_grad[0] else None
            clip = ctx.estimator.clip
            d_row, d_scale = ctx.kernel.signs_backward(
                grads[0].contiguous(), latent, row, scale, columns, clip, d_latent
            )
            return d_latent, d_row, d_scale, None, None, None
        grad, e = grads[0].float(), ctx.estimator
        first, second = _values(latent, columns, e)
        d_row = (grad * first).sum(-1)
        d_scale = (grad * second).sum(-1) if second is not None else None
        limit = e.clip if columns is None else e.clip + 0.5 * columns
        d_latent = None
        if ctx.needs_input_grad[0]:
            d_latent = grad * row[..., None]
            if e.kind == "tanh":
                d_latent = d_latent * (1 - torch.tanh(latent * (1 + 3 * e.alpha)).square())
            else:
                d_latent = torch.where(latent.abs() <= limit, d_latent, torch.zeros_like(d_latent))
        return d_latent, d_row, d_scale, None, None, None


def sign_weights(
    latent: torch.Tensor,
    row: torch.Tensor,
    plane: PlaneScale | None,
    estimator: Estimator,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """latent [n, rows, cols], row [n, rows] -> weights [n, rows, cols] in `dtype`, gradients to latent and scales."""
    scale, columns = (plane.scale, plane.columns) if plane else (None, None)
    w = SignWeights.apply(latent, row, scale, columns, estimator, dtype)
    assert isinstance(w, torch.Tensor)
    return w
