"""One token for each of two to eight sequences, three kernels a layer: in_proj, the recurrence, out_proj, each of which
leaves what the next multiplies as that wants to have it (kernels/cuda/eight.cuh, steps.cu).

    step = EightStep(model, gpu, batch=8, state_dtype="int8")     # where EightStep.fits(model, gpu, 8)

Ready to be recorded as a CUDA graph. Run the tests: `pytest tests/kernels/test_cuda_eight.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from slimba.runtime.backends.cuda_batch import RESIDUAL, STATE_HEADS, RecordedStep, Recorder, made, states_fit
from slimba.runtime.backends.cuda_broad_step import steps_bytes
from slimba.runtime.backends.cuda_device import Gpu
from slimba.runtime.backends.cuda_lean import share_of
from slimba.runtime.backends.cuda_mid import Mid
from slimba.runtime.backends.cuda_model import CudaModel, LayerWeights
from slimba.runtime.backends.cuda_state import STATE_CODES
from slimba.runtime.backends.cuda_step import ADD, IN_PROJ, STORE, norm_groups, recurrence
from slimba.runtime.backends.cuda_weights import WARPS, DeviceMatrix, fields_of, float_bits, up_to

__all__ = ["EIGHT", "EightShape", "EightStep", "operand_places", "shape_of"]

EIGHT, TILE, ROOM = 8, 16, 20  # vectors, rows of a tile, EIGHT_ROOM of kernels/cuda/eight.cuh
MASKED_SCALE = 2.0  # of operands that meet masked signs of bit 0: float16 ends at 2^15 times the RMS before
IMAGE_SCALE = 0.0625  # of operands that meet 1 and -1
MOST_SQUARES = 128 * 3  # of a vector: EIGHT_SQUARES of kernels/cuda/eight.cuh
MOST_TILES = 8  # of a block
MASKED_FROM = 2  # tiles, for which the sums of all columns are worth having


@dataclass(frozen=True, slots=True)
class EightShape:
    """Arguments of the template `eight`: warps, words of a lane, tiles and int8 rows of a block, words of the second
    plane of a warp, which tiles may have the plane, whether signs are masked."""

    warps: int
    words: int
    tiles: int
    rows: int
    plane: int
    with_plane: int
    masked: bool

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def name(self) -> str:
        numbers = self.warps, self.words, self.tiles, self.rows, self.plane, self.with_plane, int(self.masked)
        return "slimba_eight_" + "_".join(map(str, numbers))

    def shared_bytes(self, squares: int) -> int:
        """EightShared, and so many sums of squares of each vector."""
        pieces = 4 * self.words + (max(1, self.plane // 4) * min(self.plane, 4))
        own = max(512 * pieces, 4 * self.tiles * EIGHT * ROOM)
        return self.warps * (own + 4 * EIGHT) + 16 * EIGHT + 4 * EIGHT * squares

    @property
    def unit(self) -> float:
        """What a sum is multiplied by."""
        return 2.0**24 / MASKED_SCALE if self.masked else 1 / IMAGE_SCALE


def shape_of(m: DeviceMatrix, blocks: int, warps: int = 16) -> EightShape | None:
    """The kernel for a matrix, or None where it takes none."""
    formats = {s.format for s in m.layout.segments}
    words, odd = divmod(m.cols, 128 * warps)
    if m.turns or m.rank or odd or words not in (1, 2, 4) or not formats <= {"sign", "int8"}:
        return None
    plane = m.plane_kpad // (32 * warps)
    if not m.plane_by_groups or plane not in (0, 1, 2, 4, 8):
        return None
    tiles, rows, with_plane = share_of(m, blocks)
    if not 1 <= tiles <= MOST_TILES or rows > 1:
        return None
    return EightShape(warps, words, tiles, rows, plane, with_plane, tiles >= MASKED_FROM)


def operand_places(m: DeviceMatrix, shape: EightShape, weight: torch.Tensor | None) -> torch.Tensor:
    """The structs Place of a matrix's columns, int32 [cols, 4], whose input is normed with `weight`."""
    by = np.ones(m.cols, np.float32) if weight is None else weight.cpu().numpy().astype(np.float32)
    if m.column_factors is not None:
        by = by * m.column_factors
    column = np.arange(m.cols)
    word, i = np.divmod(column, 32)
    warp, of_warp = np.divmod(word, 4 * shape.words)
    lane, x = np.divmod(of_warp, shape.words)
    at, bit = place_of((warp * shape.words + x) * 4 + i % 16 // 4, lane, i)
    out = np.zeros((m.cols, 4), np.int32)
    out[:, 0], out[:, 2] = at, (by * scales(shape, bit)).view(np.int32)
    out[:, 1] = -1
    there = np.flatnonzero(m.slots >= 0)
    if len(there):
        word, i = np.divmod(there, 32)
        warp, of_warp = np.divmod(word, shape.plane)
        span, each = min(shape.plane, 4), max(1, shape.plane // 4)
        pairs = 4 * span
        lane, x = of_warp // each + span * (i % 16 // pairs), of_warp % each
        at, bit = place_of((warp * each + x) * (pairs // 4) + i % 16 % pairs // 4, lane, i, pairs)
        chosen = m.slots[there]
        out[chosen, 1], out[chosen, 3] = at, (by[chosen] * scales(shape, bit)).astype(np.float32).view(np.int32)
    return torch.from_numpy(out).to(m.device)


def place_of(piece: np.ndarray, lane: np.ndarray, i: np.ndarray, pairs: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Where column i of a word goes, in bytes; and the bit that a masked sign of it is."""
    return (piece * 32 + lane) * 16 + i % 4 * 4 + i // 16 * 2, i % 16 % pairs % 8


def scales(shape: EightShape, bit: np.ndarray) -> np.ndarray:
    return (MASKED_SCALE * 0.5**bit if shape.masked else np.full(len(bit), IMAGE_SCALE)).astype(np.float32)


class EightStep(RecordedStep):
    WARPS_IN, WARPS_OUT = 8, 16  # of a block
    SPREAD = 70  # percent of a multiprocessor's memory that blocks share: the fastest by docs/log.md

    def __init__(self, model: CudaModel, gpu: Gpu, batch: int, state_dtype: str) -> None:
        super().__init__(model, gpu, batch)
        spec, zeros = model.spec, self._zeros
        recorder: Any = Recorder(gpu)
        self._mid = Mid(recorder, batch, [model.head])
        self._u = zeros(batch, spec.d_model)
        self._z, self._dt = zeros(batch, spec.d_inner), zeros(batch, spec.n_heads)
        self._ins = [made_shape(layer.matrices["in_proj"], gpu, self.WARPS_IN) for layer in model.layers]
        self._outs = [made_shape(layer.matrices["out_proj"], gpu, self.WARPS_OUT) for layer in model.layers]
        self._in_places = [
            operand_places(layer.matrices["in_proj"], shape, layer.norm)
            for layer, shape in zip(model.layers, self._ins, strict=True)
        ]
        self._out_places = [
            operand_places(layer.matrices["out_proj"], shape, layer.gated_norm)
            for layer, shape in zip(model.layers, self._outs, strict=True)
        ]
        # Of in_proj and out_proj: operands, those of each layer's second plane, whose gaps stay 0, and squares.
        # Ranges: in turn, a layer each
        self._in = self._operands("in_proj", max(s.tiles for s in self._outs) * gpu.blocks)
        self._out = self._operands("out_proj", spec.n_heads // STATE_HEADS * WARPS)
        self._ranges = [zeros(EIGHT), zeros(EIGHT)]
        self._recurrences = [
            recurrence(spec, layer, self._state(i), batch, state_dtype, self._dt, self._z, self._u)
            for i, layer in enumerate(model.layers)
        ]
        self._recur_name = f"slimba_steps_{STATE_CODES[state_dtype]}_{spec.d_state}"
        self._recur_bytes = steps_bytes(spec.d_state, state_dtype)
        self._layers(recorder)
        self._launches = made(gpu, recorder.launches, "eight")

    @classmethod
    def fits(cls, model: CudaModel, gpu: Gpu, batch: int) -> bool:
        spec = model.spec
        if not gpu.bakes or spec.architecture != "mamba2" or not states_fit(spec) or not 2 <= batch <= EIGHT:
            return False
        normed = spec.gated_norm and not spec.norm_before_gate and norm_groups(spec) == 1
        squares = spec.n_heads // STATE_HEADS * WARPS, -(-spec.d_model // TILE) + gpu.blocks
        return (
            normed
            and max(squares) <= MOST_SQUARES
            and Mid.fits(model.head)
            and all(cls._takes(layer, gpu) for layer in model.layers)
        )

    @classmethod
    def _takes(cls, layer: LayerWeights, gpu: Gpu) -> bool:
        """Whether the kernels take a layer's matrices. Rows of out_proj in int8 would leave no operands."""
        out = shape_of(layer.matrices["out_proj"], gpu.blocks, cls.WARPS_OUT)
        return bool(shape_of(layer.matrices["in_proj"], gpu.blocks, cls.WARPS_IN) and out and not out.rows)

    def _operands(self, name: str, squares: int) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        matrices = [layer.matrices[name] for layer in self._model.layers]
        half: dict[str, Any] = {"dtype": torch.float16}
        return (
            self._zeros(EIGHT * max(m.cols for m in matrices), **half),
            [self._zeros(EIGHT * (m.plane_kpad or 8), **half) for m in matrices],
            self._zeros(self.batch, up_to(squares, 4)),
        )

    def _layers(self, gpu: Recorder) -> None:
        """Everything before the choice of the next ids."""
        model, spec = self._model, self._model.spec
        eps = float_bits(spec.norm_eps)
        inner, ring = spec.d_inner, spec.d_inner + spec.d_conv_channels
        x, x2, squares = self._in
        y, y2, y_squares = self._out
        embed = fields_of(
            model.embedding.fields, self._state(0), self.batch, self.ids.data_ptr(), self._u.data_ptr(),
            self._in_places[0].data_ptr(), x.data_ptr(), x2[0].data_ptr(), squares.data_ptr(), squares.shape[1],
            self._ranges[0].data_ptr(), eps,
        )  # fmt: skip
        gpu.launch("slimba_eight_embed", (self.batch,), embed, 4 * WARPS)
        to_state = [IN_PROJ, self._dt.data_ptr(), spec.n_heads, 0, inner, self._z.data_ptr(), inner, inner, ring, ring]
        to_stream = [ADD, self._u.data_ptr(), spec.d_model, *[0] * 7]
        for i, layer in enumerate(model.layers):
            now, following = (self._ranges[(i + k) % 2].data_ptr() for k in range(2))
            source = [x.data_ptr(), x2[i].data_ptr(), float_bits(self._ins[i].unit)]
            norm = [squares.data_ptr(), squares.shape[1], eps, now, following]
            self._product(gpu, layer.matrices["in_proj"], i, to_state, source, norm, [0] * 6)
            fields = fields_of(
                self._recurrences[i].tolist(), 0, y.data_ptr(), y2[i].data_ptr(), y_squares.data_ptr(), 0, 0, 0,
                self._out_places[i].data_ptr(),
            )  # fmt: skip
            grid = spec.n_heads // STATE_HEADS, self.batch
            gpu.launch(self._recur_name, grid, fields, self._recur_bytes, overlap=True, spread=self.SPREAD)
            leaves = [0] * 6
            if i + 1 < len(model.layers):
                leaves = [
                    self._in_places[i + 1].data_ptr(), x.data_ptr(), x2[i + 1].data_ptr(), following,
                    squares.data_ptr(), squares.shape[1],
                ]  # fmt: skip
            source = [y.data_ptr(), y2[i].data_ptr(), float_bits(self._outs[i].unit)]
            norm = [y_squares.data_ptr(), y_squares.shape[1], eps, 0, 0]
            self._product(gpu, layer.matrices["out_proj"], i, to_stream, source, norm, leaves)
        source = [self._u.data_ptr(), spec.d_model, 0, 0, model.norm_f.data_ptr(), 1, eps]
        self._mid.norm(model.head, source, 1, [RESIDUAL, self._u.data_ptr(), 0, 0])
        self._mid.product(model.head, [STORE, self.logits.data_ptr(), spec.vocab_size, *[0] * 7], self._state(0))

    def _product(
        self,
        gpu: Recorder,
        m: DeviceMatrix,
        i: int,
        output: Sequence[int],
        source: Sequence[int],
        norm: Sequence[int],
        leaves: Sequence[int],
    ) -> None:
        """Launches a product of layer i: what it multiplies, how that was normed, and what it leaves for the next."""
        out = output[0] == ADD
        shape = (self._outs if out else self._ins)[i]
        fields = fields_of(m.fields, list(output), self._state(i), self.batch, list(source), list(norm), list(leaves))
        gpu.launch(
            shape.name, (self._gpu.blocks,), fields, shape.shared_bytes(norm[1]), threads=shape.threads, overlap=True,
            spread=self.SPREAD,
        )  # fmt: skip


def made_shape(m: DeviceMatrix, gpu: Gpu, warps: int) -> EightShape:
    shape = shape_of(m, gpu.blocks, warps)
    assert shape is not None  # EightStep.fits
    return shape
