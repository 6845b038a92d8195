"""Rounding inside training with a straight-through gradient: the torch twins of the NumPy formats, equal bit for bit.

    w_q = int8_rows(w)   # forward: what the packed file will hold; backward: identity

tests/methods/test_fake_quant.py holds each against its NumPy format.
"""

from __future__ import annotations

import torch

from slimba.formats.int4 import GROUP

__all__ = ["float16", "int4_groups", "int8_rows"]

SMALLEST_SCALE = 2.0**-24


def _through(w: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Value of q, gradient of w. The detached difference would round; a swap of the data would not track gradients."""
    return StraightThrough.apply(w, q)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w: torch.Tensor, q: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return q

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[no-untyped-def]
        return grad, None


def float16(w: torch.Tensor) -> torch.Tensor:
    """Rounded to float16, kept in float32."""
    return _through(w, w.detach().to(torch.float16).to(torch.float32))


def rounded_scale(absmax: torch.Tensor, top: float) -> torch.Tensor:
    """float16(absmax / top), kept in float32.

    The divisor is a tensor: torch's CUDA division by a Python number multiplies by the reciprocal, one ulp off.
    """
    return (absmax / absmax.new_full((), top)).to(torch.float16).float().clamp_min(SMALLEST_SCALE)


def int8_rows(w: torch.Tensor) -> torch.Tensor:
    """int8 with a float16 scale per row, dequantised: [..., cols] -> the same shape."""
    with torch.no_grad():
        scale = rounded_scale(w.abs().amax(dim=-1, keepdim=True), 127.0)
        q = torch.clamp(torch.round(w / scale), -127, 127) * scale
    return _through(w, q)


def int4_groups(w: torch.Tensor) -> torch.Tensor:
    """int4 in groups of 128 columns, dequantised: [..., cols] -> the same shape."""
    with torch.no_grad():
        cols = w.shape[-1]
        groups = -(-cols // GROUP)
        padded = torch.nn.functional.pad(w, (0, groups * GROUP - cols)).unflatten(-1, (groups, GROUP))
        scale = rounded_scale(padded.abs().amax(dim=-1, keepdim=True), 7.0)
        q = (torch.clamp(torch.round(padded / scale), -7, 7) * scale).flatten(-2)[..., :cols]
    return _through(w, q)
