"""One layer while it is quantised: its float block, the inputs of its projections, each replaced by its packed twin.

    layer = Layer(spec, tensors, device)              # float
    for short, layout in layouts.items():
        inputs = layer.inputs(short, layout, streams)  # streams: residual streams [B, L, D]
        layer.use(short, quantise(layer, short, layout, inputs, settings))  # what comes later sees the quantised one
    layer.finish(streams, inputs)                      # moves them on in place, from the inputs of out_proj

Inputs are transformed and rounded as the engines do it, so the calibration of a matrix sees what it will meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from slimba.formats import Matrix, MatrixLayout
from slimba.methods.gptq import GROUP, Grid, Quantised, gptq, round_to_nearest
from slimba.methods.quamba2.fold import rotate
from slimba.models.lm import Block
from slimba.models.spec import ModelSpec
from slimba.runtime.backends.reference import ScanRounding, round_fixed, round_int8

__all__ = ["OUT_SCALE", "Layer", "Projection", "Rounding", "magnitude", "quantise", "weights_of"]

BITS = {"int4": 4, "int8": 8}
OUT_SCALE = "mixer.conv1d.out_scale"


@dataclass(frozen=True, slots=True)
class Rounding:
    """How weights are rounded: see the recipe's keys of the same names."""

    gptq: bool
    damping: float
    tensor_scale: bool
    percentile: float


class Projection(nn.Module):
    """A linear layer as an engine computes it: the input transformed and rounded, the weight as the file holds it."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, layout: MatrixLayout | None, int8: bool
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.block = layout.hadamard if layout else 0
        self.int8 = int8 and layout is not None and layout.takes_int8
        self.step: float | None = None  # of a stored scale
        self.seen: list[torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.block:
            x = rotate(x, self.block)
        if self.seen is not None:
            self.seen.append(x)
            raise Seen
        return self.product(x)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Of an input that is transformed already."""
        if self.int8:
            x = round_int8(x) if self.step is None else round_fixed(x, self.step)
        return F.linear(x, self.weight, self.bias)


class Seen(Exception):
    """The input of a projection has been reached; the rest of the layer need not be computed."""


class Layer:
    """A block of the network whose projections can be replaced.

    tensors: by name within the layer; the weights of projections that will be replaced may be missing. int8: whether
    the model's activations are.
    """

    def __init__(self, spec: ModelSpec, tensors: dict[str, torch.Tensor], device: torch.device, *, int8: bool) -> None:
        with torch.device("meta"):
            self.block = Block(spec)
        self.block.to_empty(device=device).requires_grad_(False).eval()
        self.block.load_state_dict(tensors, strict=False)
        self.int8 = int8
        if (scale := tensors.get(OUT_SCALE)) is not None:
            self.round_scan(scale)

    def round_scan(self, scale: torch.Tensor) -> None:
        """x, B and C are rounded from now on: scale [channels]."""
        self.block.mixer.round_scan = ScanRounding(scale)

    def channel_sizes(self, streams: Sequence[torch.Tensor], percentile: float) -> tuple[np.ndarray, float]:
        """Largest |value| of every channel after the convolution [channels], and what a share of those of x stays
        below.
        """
        inner, most, x = self.block.mixer.spec.d_inner, [], []

        def spy(xbc: torch.Tensor) -> torch.Tensor:
            most.append(xbc.abs().flatten(0, -2).amax(0))
            x.append(xbc[..., :inner] if percentile < 1 else most[-1][:inner])
            raise Seen

        self.block.mixer.round_scan = spy
        for u in streams:
            try:
                self.block(u)
            except Seen:
                continue
        self.block.mixer.round_scan = None
        return torch.stack(most).amax(0).cpu().numpy(), magnitude(x, percentile)

    def float_weight(self, short: str) -> torch.Tensor:
        """[rows, cols]"""
        weight = getattr(self.block.mixer, short).weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def use(self, short: str, matrix: Matrix) -> None:
        """Replace the projection by its packed twin."""
        old = getattr(self.block.mixer, short)
        new = Projection(weights_of(matrix, old.weight.device), old.bias, matrix.layout, self.int8)
        if matrix.layout.input_scale:
            new.step = float(matrix.arrays["input_scale"][0])
        setattr(self.block.mixer, short, new)

    def inputs(self, short: str, layout: MatrixLayout, streams: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What enters the projection, transformed but not rounded: [B, L, cols] for each of the streams."""
        mixer = self.block.mixer
        old = getattr(mixer, short)
        spy = Projection(old.weight, None, layout, False)
        spy.seen = []
        setattr(mixer, short, spy)
        for u in streams:
            try:
                self.block(u)
            except Seen:
                continue
        setattr(mixer, short, old)
        return spy.seen

    def advance(self, streams: Sequence[torch.Tensor]) -> None:
        """Each stream u becomes the stream after this block."""
        for u in streams:
            u.copy_(self.block(u))

    def finish(self, streams: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        """The same from what enters out_proj, transformed; all that comes before must be as it was then."""
        out: Any = self.block.mixer.out_proj  # a Projection by now
        for u, x in zip(streams, inputs, strict=True):
            u += out.product(x)


def quantise(layer: Layer, short: str, layout: MatrixLayout, inputs: Sequence[torch.Tensor], how: Rounding) -> Matrix:
    """The packed matrix of a projection, calibrated on what enters it (`Layer.inputs`)."""
    w = layer.float_weight(short)
    if layout.hadamard:
        w = rotate(w, layout.hadamard)
    step = magnitude(inputs, how.percentile) / 127 if layout.input_scale else None
    hessian = None
    if how.gptq:
        int8 = layer.int8 and layout.takes_int8
        hessian = gram(_rounded(inputs, step) if int8 else inputs)
    (segment,) = layout.segments
    return pack(w, layout, round_weights(w, segment.format, hessian, how), step)


def round_weights(w: torch.Tensor, format: str, hessian: torch.Tensor | None, how: Rounding) -> Quantised:
    """By GPTQ where there is a Hessian; int8 with a scale a row, or with one for the whole matrix."""
    grid, group = Grid(BITS[format]), 128 if format == "int4" else None
    if format == "int8" and how.tensor_scale:
        scale = (w.abs().max() / 127).half().float().clamp_min(2.0**-24).expand(len(w), 1)
        if hessian is None:
            return Quantised(grid.nearest(w / scale), scale, w.shape[1])
        return gptq(w, hessian, grid, None, how.damping, scale=scale)
    if hessian is None:
        return round_to_nearest(w, grid, group)
    return gptq(w, hessian, grid, group, how.damping)


def pack(w: torch.Tensor, layout: MatrixLayout, q: Quantised, step: float | None) -> Matrix:
    (segment,) = layout.segments
    matrix = Matrix(layout, {layout.part_name(0, part): a for part, a in q.arrays(segment.format).items()})
    if step is not None:
        matrix.arrays["input_scale"] = np.full(1, max(step, 1e-30), np.float32)
    return matrix


def weights_of(matrix: Matrix, device: torch.device | str = "cpu") -> torch.Tensor:
    """What meets the transformed input, float32 on `device`: the dequantised matrix without its transform."""
    formats = [s.format for s in matrix.layout.segments]
    if formats in (["int8"], ["int4"]):  # there, because that takes NumPy half a second for a large one
        parts = {k: torch.from_numpy(a).to(device) for k, a in matrix.segment_parts(0).items()}
        scale = parts["scale"].float()
        if formats == ["int8"]:
            return parts["weight"].float() * scale[:, None]
        nibbles = torch.stack([parts["packed"] & 15, parts["packed"] >> 4], dim=2).flatten(1)[:, : matrix.layout.cols]
        return (nibbles.float() - 8) * scale.repeat_interleave(GROUP, dim=1)[:, : matrix.layout.cols]
    bare = MatrixLayout(matrix.layout.cols, matrix.layout.segments)
    whole = Matrix(bare, {k: a for k, a in matrix.arrays.items() if k != "input_scale"}).dequantize()
    return torch.from_numpy(whole).to(device)


def gram(inputs: Iterator[torch.Tensor] | Sequence[torch.Tensor]) -> torch.Tensor:
    """sum x x^T: [cols, cols] float32."""
    total: torch.Tensor | None = None
    for x in inputs:
        flat = x.float().flatten(0, -2)
        total = flat.T @ flat if total is None else total.addmm_(flat.T, flat)
    assert total is not None
    return total


def magnitude(inputs: Sequence[torch.Tensor], percentile: float) -> float:
    """The largest |x|, or the value that a share `percentile` of them does not exceed."""
    if percentile == 1:
        return max(float(x.abs().max()) for x in inputs)
    sizes = torch.cat([x.abs().flatten() for x in inputs])
    return float(sizes.kthvalue(max(1, round(percentile * sizes.numel()))).values)


def _rounded(inputs: Sequence[torch.Tensor], step: float | None) -> Iterator[torch.Tensor]:
    for x in inputs:
        yield round_int8(x) if step is None else round_fixed(x, step)
