"""One token for one sequence where out_proj leaves its results as the next in_proj wants to have them
(kernels/cuda/one.cuh): FusedStep, but for in_proj from the second layer on and for what out_proj leaves.

    step = OneStep(model, gpu, batch=1, state_dtype="int8")     # where OneStep.fits(model, gpu, 1)

Ready to be recorded as a CUDA graph. Run the tests: `pytest tests/kernels/test_cuda_one.py
tests/runtime/test_cuda_one_step.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from slimba.runtime.backends.cuda_bake import QUICK_THREADS, Baked
from slimba.runtime.backends.cuda_batch import Recorder, made
from slimba.runtime.backends.cuda_codes import streamed_of
from slimba.runtime.backends.cuda_device import Gpu
from slimba.runtime.backends.cuda_eight import made_shape, shape_of
from slimba.runtime.backends.cuda_lean import Dot, dot_of
from slimba.runtime.backends.cuda_model import CudaModel, LayerWeights
from slimba.runtime.backends.cuda_step import (
    QUICK_BYTES,
    QUICK_SPAN,
    FusedStep,
    in_proj_output,
    normed_behind_gate,
    takes_quick,
)
from slimba.runtime.backends.cuda_weights import DeviceMatrix, fields_of, float_bits, up_to

__all__ = ["OneShape", "OneStep", "Places", "digit_places", "one_shape_of"]

WARP, TILE, SLICES = 32, 16, 4  # the last of kernels/cuda/one.cuh
HEADROOM = 1024.0  # times the RMS of a layer before that a column may have


def threads_of_row(tiles: int, rows: int, threads: int) -> int:
    """That finish a row of a block, in one.cuh and dot.cuh."""
    return 4 if 4 * (tiles * TILE + rows) <= threads else 2


@dataclass(frozen=True, slots=True)
class OneShape:
    """Arguments of the template `one`: warps, words of a lane, tiles and int8 rows of a block, words of the second
    plane of a warp, which tiles may have the plane, blocks; and for how many of them a multiprocessor should have
    registers."""

    warps: int
    words: int
    tiles: int
    rows: int
    plane: int
    with_plane: int
    blocks: int
    resident: int = 2

    @property
    def threads(self) -> int:
        return WARP * self.warps

    @property
    def name(self) -> str:
        numbers = self.warps, self.words, self.tiles, self.rows, self.plane, self.with_plane, self.blocks
        return "slimba_one_" + "_".join(map(str, [*numbers, self.resident]))

    @property
    def span(self) -> int:
        """Lanes that share the plane's words of a warp."""
        return min(self.plane, 4)

    @property
    def shared_bytes(self) -> int:
        """OneShared."""
        rows = self.tiles * TILE
        part = 8 * (rows + 16 // threads_of_row(self.tiles, 1, self.threads))
        return up_to(self.warps * (16 + part) + 8 + (self.warps * part if self.plane else 8), 16)


def one_shape_of(m: DeviceMatrix, blocks: int, warps: int, resident: int = 2) -> OneShape | None:
    """The kernel for a matrix and one vector, or None where it takes none."""
    shape = shape_of(m, blocks, warps)
    if shape is None or 2 * (shape.tiles * TILE + shape.rows) > shape.threads:
        return None
    return OneShape(
        shape.warps, shape.words, shape.tiles, shape.rows, shape.plane, shape.with_plane, blocks, resident
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Places:
    """Where columns go as digits: struct DigitPlace of each, int32 [cols, 4]; bytes from a slice to the next in the
    second plane; of its words the bits that are columns, int32; and what a sum of digits is multiplied by."""

    places: torch.Tensor
    slice2: int
    valid: torch.Tensor
    unit: float


def digit_places(m: DeviceMatrix, shape: OneShape, weight: torch.Tensor | None) -> Places:
    """Of a matrix whose input is normed with `weight`."""
    by = np.ones(m.cols, np.float32) if weight is None else weight.cpu().numpy().astype(np.float32)
    if m.column_factors is not None:
        by = by * m.column_factors
    most = float(np.abs(by).max())
    exponent = 23 - math.ceil(math.log2(HEADROOM * most)) if 0 < most < math.inf else 0
    column = np.arange(m.cols)
    word, bit = np.divmod(column, 32)
    warp, of_warp = np.divmod(word, 4 * shape.words)
    lane, x = np.divmod(of_warp, shape.words)
    out = np.zeros((m.cols, 4), np.int32)
    out[:, 0] = 512 * shape.words * warp + place_of(x, lane, bit, 4)
    out[:, 2] = (by * 2.0 ** (exponent + 7 - bit % 8)).astype(np.float32).view(np.int32)
    out[:, 1] = -1
    there = np.flatnonzero(m.slots >= 0)
    valid = np.zeros(max(1, shape.warps * shape.plane), np.uint32)
    if len(there):
        word, bit = np.divmod(there, 32)
        np.bitwise_or.at(valid, word, np.uint32(1) << bit.astype(np.uint32))
        warp, of_warp = np.divmod(word, shape.plane)
        lane, x = np.divmod(of_warp, max(1, shape.plane // 4))
        chosen = m.slots[there]
        out[chosen, 1] = 128 * shape.plane * warp + place_of(x, lane, bit, shape.span)
        out[chosen, 3] = (by[chosen] * 2.0 ** (exponent + 7 - bit % (2 * shape.span))).astype(np.float32).view(np.int32)
    places, words = (torch.from_numpy(a).to(m.device) for a in (out, valid.view(np.int32)))
    return Places(places, 16 * max(1, shape.span), words, 2.0 ** -(exponent + 7))


def place_of(x: np.ndarray, lane: np.ndarray, bit: np.ndarray, lanes: int) -> np.ndarray:
    """Where the first slice of bit `bit` of word x of a lane lies among those of its warp, in bytes."""
    j = bit % 8
    out: np.ndarray = ((2 * x + j // 4) * SLICES * lanes + lane) * 16 + j % 4 * 4 + bit // 8
    return out


class OneStep(FusedStep):
    """One token of one sequence: the head, the choice and what surrounds them are FusedStep's."""

    arithmetic = "23-bit fixed point of 1024 RMS"
    WARPS_IN, RESIDENT = 8, 2  # of a block of in_proj

    def __init__(self, model: CudaModel, gpu: Gpu, batch: int, state_dtype: str) -> None:
        super().__init__(model, gpu, batch, state_dtype)
        zeros, layers = self._zeros, model.layers[1:]
        digits: dict[str, Any] = {"dtype": torch.uint8}
        self._x = zeros(SLICES * model.spec.d_model, **digits)
        self._x2 = zeros(max(SLICES * layer.matrices["in_proj"].plane_kpad for layer in layers) or 16, **digits)
        outs = [dot_of(layer.matrices["out_proj"], gpu.blocks, 1, False) for layer in model.layers]
        # A vector's power of two, three not used, and its squares; in turn, a layer each
        squares = up_to(max(squares_of(dot) for dot in outs if dot) * gpu.blocks, 4)
        self._left = [zeros(4 + squares), zeros(4 + squares)]
        # Of layer i at i - 1: the first in_proj makes its own digits
        self._ins = [made_shape(self._in_shape(layer, gpu)) for layer in layers]
        self._places = [
            digit_places(layer.matrices["in_proj"], shape, layer.norm)
            for layer, shape in zip(layers, self._ins, strict=True)
        ]
        recorder: Any = Recorder(gpu)
        self._record(recorder)
        self._launches = made(gpu, recorder.launches, "one")

    @classmethod
    def fits(cls, model: CudaModel, gpu: Gpu, batch: int) -> bool:
        spec = model.spec
        if not gpu.bakes or batch != 1 or len(model.layers) < 2 or not FusedStep.fits(model, gpu, batch):
            return False
        head = streamed_of(model.head, gpu.blocks, 1, False)
        return (
            takes_quick(spec)
            and normed_behind_gate(spec)
            and head is not None
            and head.shared_bytes <= gpu.shared
            and all(cls._takes(layer, gpu) for layer in model.layers)
        )

    @classmethod
    def _in_shape(cls, layer: LayerWeights, gpu: Gpu) -> OneShape | None:
        return one_shape_of(layer.matrices["in_proj"], gpu.blocks, cls.WARPS_IN, cls.RESIDENT)

    @classmethod
    def _takes(cls, layer: LayerWeights, gpu: Gpu) -> bool:
        """Whether the kernels take a layer's matrices; a thread adds up to four squares."""
        shape = cls._in_shape(layer, gpu)
        dots = [dot_of(layer.matrices[name], gpu.blocks, 1, False) for name in ("in_proj", "out_proj")]
        if shape is None or not all(dot and not dot.rank and dot.shared_bytes <= gpu.shared for dot in dots):
            return False
        return 4 + squares_of(dots[1]) * gpu.blocks <= 4 * shape.threads  # type: ignore[arg-type]

    def _bake(self) -> tuple[list[str], Any]:
        """The head's kernel alone; those of the layers are made by `_record`."""
        last = len(self.products) - 1
        head = streamed_of(self._model.head, self._gpu.blocks, 1, False)
        assert head is not None  # OneStep.fits
        self._lean, self._quick, self._chooses = {last: head}, True, True
        baked = Baked()
        names = [""] * last + [baked.head(self._choosing, head)]
        return names, self._gpu.module("decode", baked.source)

    def layers(self, overlap: bool, embedded: bool = False) -> None:
        """Launches everything before the head."""
        if not embedded:
            self._embed(overlap)
        for arguments, settings in self._launches:
            self._gpu.launch(*arguments, **(settings | {"overlap": overlap}))  # type: ignore[misc]

    def _record(self, gpu: Recorder) -> None:
        """The layers."""
        model, spread = self._model, self._spread[0]
        units = max(model.spec.d_inner // QUICK_SPAN, gpu.blocks)
        for i, layer in enumerate(model.layers):
            now, before = (self._left[(i - k) % 2] for k in range(2))
            if i == 0:
                self._leaving(gpu, layer.matrices["in_proj"], 0, "in_proj", [0] * 6 + [now.data_ptr()])
            else:
                self._in_proj_of(gpu, layer.matrices["in_proj"], i, before, now)
            room = max(QUICK_BYTES, self._room("recur"))
            gpu.launch("slimba_one_recur", (units,), self.recurrences[i], room, threads=QUICK_THREADS, spread=spread)
            leaves = [0] * 7
            if i + 1 < len(model.layers):
                following = self._places[i]
                leaves = [
                    following.places.data_ptr(), self._x.data_ptr(), self._x2.data_ptr(), following.slice2,
                    now.data_ptr(), now[4:].data_ptr(), 0,
                ]  # fmt: skip
            self._leaving(gpu, layer.matrices["out_proj"], 2 * i + 1, "out_proj", leaves)

    def _in_proj_of(self, gpu: Recorder, m: DeviceMatrix, i: int, before: torch.Tensor, now: torch.Tensor) -> None:
        """Launches in_proj of layer i on what out_proj of the layer before has left."""
        shape, places, spec = self._ins[i - 1], self._places[i - 1], self._model.spec
        fields = fields_of(
            m.fields, in_proj_output(spec, self._dt, self._z), self._state(i), self._x.data_ptr(),
            self._x2.data_ptr(), places.valid.data_ptr(), float_bits(places.unit), before.data_ptr(),
            before.shape[0], float_bits(spec.norm_eps), now.data_ptr(),
        )  # fmt: skip
        room = max(shape.shared_bytes, self._room("in_proj"))
        gpu.launch(shape.name, (gpu.blocks,), fields, room, threads=shape.threads, spread=self._spread[0])

    def _leaving(self, gpu: Recorder, m: DeviceMatrix, number: int, name: str, leaves: list[int]) -> None:
        """Launches a product of dot.cuh that leaves digits or the power of two."""
        dot = dot_of(m, gpu.blocks, 1, False)
        assert dot is not None  # OneStep.fits
        fields = fields_of(self.products[number].tolist(), leaves)
        room = max(dot.shared_bytes, self._room(name))
        numbers = *dot.numbers, gpu.blocks, dot.resident
        gpu.launch(
            "slimba_leaving_" + "_".join(map(str, numbers)), (gpu.blocks,), fields, room, threads=dot.threads,
            spread=self._spread[0],
        )  # fmt: skip


def squares_of(dot: Dot) -> int:
    """Sums of squares that a block leaves: one of each warp that finishes rows."""
    rows = dot.tiles * TILE + dot.rows
    return -(-rows * threads_of_row(dot.tiles, dot.rows, dot.threads) // WARP)
