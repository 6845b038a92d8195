"""One token for each of two to tens of sequences, three kernels a layer: in_proj, the recurrence, out_proj; each leaves
what the next multiplies as that wants to have it (kernels/cuda/eight.cuh, steps.cu, flow.cu).

    step = EightStep(model, gpu, batch=8, state_dtype="int8")     # where EightStep.fits(model, gpu, 8)

Ready to be recorded as a CUDA graph. Run the tests: `pytest tests/kernels/test_cuda_eight.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch

from slimba.runtime.backends.cuda_batch import RESIDUAL, STATE_HEADS, RecordedStep, Recorder, made, states_fit
from slimba.runtime.backends.cuda_broad import Broad
from slimba.runtime.backends.cuda_broad_step import recur_kernel
from slimba.runtime.backends.cuda_device import Gpu
from slimba.runtime.backends.cuda_lean import share_of
from slimba.runtime.backends.cuda_mid import Mid
from slimba.runtime.backends.cuda_model import CudaModel, LayerWeights
from slimba.runtime.backends.cuda_step import ADD, STORE, in_proj_output, normed_behind_gate, recurrence
from slimba.runtime.backends.cuda_weights import WARPS, DeviceMatrix, fields_of, float_bits, up_to

__all__ = ["EIGHT", "EightShape", "EightStep", "made_shape", "operand_places", "shape_of"]

EIGHT, TILE, ROOM = 8, 16, 20  # vectors of a group, rows of a tile, EIGHT_ROOM of kernels/cuda/eight.cuh
MASKED_SCALE = 2.0  # of operands that meet masked signs of bit 0: float16 ends at 2^15 times the RMS before
IMAGE_SCALE = 0.0625  # of operands that meet 1 and -1
MOST_SQUARES = 128 * 3  # of a vector: EIGHT_SQUARES of kernels/cuda/eight.cuh
MOST_TILES = 8  # of a block
Shape = TypeVar("Shape")
MASKED_FROM = 2  # tiles, for which the sums of all columns are worth having


@dataclass(frozen=True, slots=True)
class EightShape:
    """Arguments of the template `eight`: warps, words of a lane, tiles and int8 rows of a block, words of the second
    plane of a warp, which tiles may have the plane, whether signs are masked; then those of a Plan, with `groups` of
    vectors."""

    warps: int
    words: int
    tiles: int
    rows: int
    plane: int
    with_plane: int
    masked: bool
    eights: int = 1
    groups: int = 1
    split: int = 1
    resident: int = 1

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def name(self) -> str:
        numbers = self.warps, self.words, self.tiles, self.rows, self.plane, self.with_plane, int(self.masked)
        return "slimba_eight_" + "_".join(map(str, [*numbers, self.eights, self.groups, self.split, self.resident]))

    def shared_bytes(self, squares: int) -> int:
        """EightShared, and so many sums of squares of each vector."""
        pieces = 4 * self.words + (max(1, self.plane // 4) * min(self.plane, 4))
        vectors, ahead = EIGHT * self.eights, self.groups > self.split
        operands, sums = 512 * pieces * self.eights, 4 * self.tiles * vectors * ROOM
        own = operands + sums if ahead else max(operands, sums)
        return self.warps * (own + 4 * vectors) + (8 + 8 * self.groups) * vectors + 4 * vectors * squares

    @property
    def unit(self) -> float:
        """What a sum is multiplied by."""
        return 2.0**24 / MASKED_SCALE if self.masked else 1 / IMAGE_SCALE


def shape_of(m: DeviceMatrix, blocks: int, warps: int = 16) -> EightShape | None:
    """The kernel for a matrix and eight vectors, or None where it takes none; blocks: of the grid's first dimension."""
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


class Plan(NamedTuple):
    """How a product of many vectors is divided: eights of them at once, blocks that share the groups of so many, of how
    many multiprocessors a block has the tiles, and how many blocks should have registers on one."""

    eights: int
    split: int
    tiles_of: int
    resident: int


class Plans(NamedTuple):
    """Those of a layer's products, and the percentage of a multiprocessor's memory that blocks share."""

    in_proj: Plan
    out_proj: Plan
    shared: int


class EightStep(RecordedStep):
    WARPS_IN, WARPS_OUT = 8, 16  # of a block
    MOST = 32  # sequences
    BROAD_HEAD_FROM = 24  # from which broad.cu takes an int4 head
    FLOW_FILLS = 1.0  # of BroadStep, here
    PLANS: ClassVar = {  # by eights of sequences: the fastest by docs/log.md
        1: Plans(Plan(1, 1, 1, 1), Plan(1, 1, 1, 1), 70),
        2: Plans(Plan(2, 1, 1, 2), Plan(2, 1, 1, 2), 50),
        3: Plans(Plan(2, 1, 1, 1), Plan(2, 2, 2, 1), 85),
        4: Plans(Plan(2, 1, 1, 1), Plan(2, 2, 2, 1), 85),
    }

    def __init__(self, model: CudaModel, gpu: Gpu, batch: int, state_dtype: str) -> None:
        super().__init__(model, gpu, batch)
        spec, zeros = model.spec, self._zeros
        recorder: Any = Recorder(gpu)
        broad = batch >= self.BROAD_HEAD_FROM and gpu.warpgroups and Broad.fits(model.head)
        last: Any = Recorder(gpu) if broad else recorder
        self._u = zeros(batch, spec.d_model)
        self._z, self._dt = zeros(batch, spec.d_inner), zeros(batch, spec.n_heads)
        self._plans = self.PLANS[-(-batch // EIGHT)]
        self._spread = self._plans.shared
        shapes = [shapes_of(layer, gpu, batch) for layer in model.layers]
        self._ins, self._outs = ([made_shape(pair[k]) for pair in shapes] for k in range(2))
        # Products read whole groups, the last one too
        self._vectors = EIGHT * max(s.eights * s.groups for s in (*self._ins, *self._outs))
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
        self._in = self._operands(
            "in_proj", max(s.tiles for s in self._outs) * gpu.blocks // self._plans.out_proj.tiles_of
        )
        self._out = self._operands("out_proj", spec.n_heads // STATE_HEADS * WARPS)
        self._ranges = [zeros(self._vectors), zeros(self._vectors)]
        self._recurrences = [
            recurrence(spec, layer, self._state(i), batch, state_dtype, self._dt, self._z, self._u)
            for i, layer in enumerate(model.layers)
        ]
        self._recur_name, self._recur_fours, self._recur_bytes = recur_kernel(
            spec, gpu, batch, state_dtype, self.FLOW_FILLS
        )
        self._layers(recorder)
        self._head = (Broad if broad else Mid)(last, batch, [model.head])
        self._last(self._head)
        self._launches = made(gpu, recorder.launches, "eight")
        if broad:
            self._launches += made(gpu, last.launches, "broad")

    @classmethod
    def fits(cls, model: CudaModel, gpu: Gpu, batch: int) -> bool:
        spec = model.spec
        if not gpu.bakes or spec.architecture != "mamba2" or not states_fit(spec) or not 2 <= batch <= cls.MOST:
            return False
        squares = spec.n_heads // STATE_HEADS * WARPS, -(-spec.d_model // TILE) + gpu.blocks
        return (
            normed_behind_gate(spec)
            and max(squares) <= MOST_SQUARES
            and Mid.fits(model.head)
            and all(cls._takes(layer, gpu, batch) for layer in model.layers)
        )

    @classmethod
    def _takes(cls, layer: LayerWeights, gpu: Gpu, batch: int) -> bool:
        """Whether the kernels take a layer's matrices. Rows of out_proj in int8 would leave no operands."""
        into, out = shapes_of(layer, gpu, batch)
        return bool(into and out and not out.rows)

    def _operands(self, name: str, squares: int) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        matrices = [layer.matrices[name] for layer in self._model.layers]
        half: dict[str, Any] = {"dtype": torch.float16}
        return (
            self._zeros(self._vectors * max(m.cols for m in matrices), **half),
            [self._zeros(self._vectors * (m.plane_kpad or 8), **half) for m in matrices],
            self._zeros(self.batch, up_to(squares, 4)),
        )

    def _layers(self, gpu: Recorder) -> None:
        """Everything before the choice of the next ids."""
        model, spec = self._model, self._model.spec
        eps = float_bits(spec.norm_eps)
        x, x2, squares = self._in
        y, y2, y_squares = self._out
        embed = fields_of(
            model.embedding.fields, self._state(0), self.batch, self.ids.data_ptr(), self._u.data_ptr(),
            self._in_places[0].data_ptr(), x.data_ptr(), x2[0].data_ptr(), squares.data_ptr(), squares.shape[1],
            self._ranges[0].data_ptr(), eps, group_bytes(model.layers[0].matrices["in_proj"]),
        )  # fmt: skip
        gpu.launch("slimba_eight_embed", (self.batch,), embed, 4 * WARPS)
        to_state = in_proj_output(spec, self._dt, self._z)
        to_stream = [ADD, self._u.data_ptr(), spec.d_model, *[0] * 7]
        for i, layer in enumerate(model.layers):
            out = layer.matrices["out_proj"]
            now, following = (self._ranges[(i + k) % 2].data_ptr() for k in range(2))
            source = [x.data_ptr(), x2[i].data_ptr(), float_bits(self._ins[i].unit)]
            norm = [squares.data_ptr(), squares.shape[1], eps, now, following]
            self._product(gpu, layer.matrices["in_proj"], i, to_state, source, norm, [0] * 8)
            fields = fields_of(
                self._recurrences[i].tolist(), 0, y.data_ptr(), y2[i].data_ptr(), y_squares.data_ptr(), 0, 0, 0,
                group_bytes(out), self._out_places[i].data_ptr(),
            )  # fmt: skip
            grid = spec.n_heads // STATE_HEADS // self._recur_fours, self.batch
            gpu.launch(self._recur_name, grid, fields, self._recur_bytes, overlap=True, spread=self._spread)
            leaves = [0] * 8
            if i + 1 < len(model.layers):
                leaves = [
                    self._in_places[i + 1].data_ptr(), x.data_ptr(), x2[i + 1].data_ptr(), following,
                    squares.data_ptr(), squares.shape[1], *group_bytes(model.layers[i + 1].matrices["in_proj"]),
                ]  # fmt: skip
            source = [y.data_ptr(), y2[i].data_ptr(), float_bits(self._outs[i].unit)]
            norm = [y_squares.data_ptr(), y_squares.shape[1], eps, 0, 0]
            self._product(gpu, out, i, to_stream, source, norm, leaves)

    def _last(self, head: Broad | Mid) -> None:
        """The norm after the layers and the head."""
        model, spec = self._model, self._model.spec
        source = [self._u.data_ptr(), spec.d_model, 0, 0, model.norm_f.data_ptr(), 1, float_bits(spec.norm_eps)]
        if isinstance(head, Broad):
            head.norm(model.head, source, [0] * 4)
        else:
            head.norm(model.head, source, 1, [RESIDUAL, self._u.data_ptr(), 0, 0])
        head.product(model.head, [STORE, self.logits.data_ptr(), spec.vocab_size, *[0] * 7], self._state(0))

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
        out, plans = output[0] == ADD, self._plans
        shape = (self._outs if out else self._ins)[i]
        fields = fields_of(m.fields, list(output), self._state(i), self.batch, list(source), list(norm), list(leaves))
        grid = (self._gpu.blocks // (plans.out_proj if out else plans.in_proj).tiles_of, shape.split)
        gpu.launch(
            shape.name, grid, fields, shape.shared_bytes(norm[1]), threads=shape.threads, overlap=True,
            spread=self._spread,
        )  # fmt: skip


def group_bytes(m: DeviceMatrix) -> list[int]:
    """Of the operands of a group of vectors: all columns and those of the second plane."""
    return [2 * EIGHT * m.cols, 2 * EIGHT * m.plane_kpad]


def shapes_of(layer: LayerWeights, gpu: Gpu, batch: int) -> list[EightShape | None]:
    """The kernels of a layer's in_proj and out_proj."""
    eights, warps = -(-batch // EIGHT), {"in_proj": EightStep.WARPS_IN, "out_proj": EightStep.WARPS_OUT}
    found = []
    for name, plan in zip(warps, EightStep.PLANS[eights][:2], strict=True):
        shape = shape_of(layer.matrices[name], gpu.blocks // plan.tiles_of, warps[name])
        groups = -(-eights // plan.eights)
        if shape:
            shape = dataclasses.replace(
                shape, eights=plan.eights, groups=groups, split=plan.split, resident=plan.resident
            )
        found.append(shape)
    return found


def made_shape(shape: Shape | None) -> Shape:
    assert shape is not None  # `fits` of the step
    return shape
