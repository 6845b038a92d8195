"""One token for one sequence, three kernels a layer that leave what the next multiplies as that wants to have it
(kernels/cuda/one.cuh, quick.cuh).

    step = OneStep(model, gpu, state_dtype="int8")     # where OneStep.fits(model, gpu)

Ready to be recorded as a CUDA graph. Run the tests: `pytest tests/kernels/test_cuda_one.py
tests/runtime/test_cuda_one_step.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from slimba.runtime.backends.cuda_bake import QUICK_THREADS, Baked
from slimba.runtime.backends.cuda_batch import Recorder, made
from slimba.runtime.backends.cuda_device import Gpu
from slimba.runtime.backends.cuda_eight import EightShape, operand_places, shape_of
from slimba.runtime.backends.cuda_model import CudaModel, LayerWeights, span_of
from slimba.runtime.backends.cuda_step import (
    ADD,
    IN_PROJ,
    QUICK_BYTES,
    QUICK_SPAN,
    QUICK_STATE,
    FusedStep,
    norm_groups,
    streamed_of,
)
from slimba.runtime.backends.cuda_weights import WARPS, DeviceMatrix, fields_of, float_bits, up_to

__all__ = ["OneShape", "OneStep", "one_shape_of"]

WARP, TILE, LANES = 32, 16, 8  # ONE_LANES of kernels/cuda/one.cuh
HALVES = 2  # of an entry


@dataclass(frozen=True, slots=True)
class OneShape(EightShape):
    """Arguments of the template `one`: those of EightShape up to `masked`, and for how many blocks a multiprocessor
    should have registers."""

    LANES: ClassVar = LANES
    MASKED: ClassVar = 16.0  # float16 ends at 2^12 times the RMS before, and second halves are small

    @property
    def name(self) -> str:
        numbers = self.warps, self.words, self.tiles, self.rows, self.plane, self.with_plane, int(self.masked)
        return "slimba_one_" + "_".join(map(str, [*numbers, self.resident]))

    @property
    def by(self) -> int:
        """Threads that finish a row."""
        return 4 if 4 * (self.tiles * TILE + self.rows) <= self.threads else 2

    @property
    def squares(self) -> int:
        """Sums of squares that a block leaves."""
        return self.tiles * TILE * self.by // WARP

    def shared_bytes(self, squares: int = 0) -> int:
        """OneShared."""
        pieces = 4 * self.words + (max(1, self.plane // 4) * min(self.plane, 4))
        stride = up_to(self.tiles * TILE + self.rows, WARP) + WARP // self.by
        return self.warps * (16 * LANES * pieces + 4 * stride + 4)


def one_shape_of(m: DeviceMatrix, blocks: int, warps: int, resident: int = 1) -> OneShape | None:
    """The kernel for a matrix and one vector, or None where it takes none."""
    shape = shape_of(m, blocks, warps)
    if shape is None or 2 * (shape.tiles * TILE + shape.rows) > shape.threads:
        return None
    return OneShape(
        shape.warps, shape.words, shape.tiles, shape.rows, shape.plane, shape.with_plane, shape.masked,
        resident=resident,
    )  # fmt: skip


class OneStep(FusedStep):
    """One token of one sequence: the head, the choice and what surrounds them are FusedStep's."""

    arithmetic = "pairs of float16"
    WARPS_IN, WARPS_OUT = 8, 16  # of a block
    RESIDENT: ClassVar = {"in_proj": 1, "out_proj": 1}

    def __init__(self, model: CudaModel, gpu: Gpu, batch: int, state_dtype: str) -> None:
        super().__init__(model, gpu, batch, state_dtype)
        spec, zeros = model.spec, self._zeros
        ins, outs = zip(*(self._shapes(layer, gpu) for layer in model.layers), strict=True)
        self._ins: tuple[Any, ...] = ins
        self._outs: tuple[Any, ...] = outs
        half: dict[str, Any] = {"dtype": torch.float16}

        def operands(name: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
            """Entries of in_proj or out_proj, and those of each layer's second plane, whose gaps stay 0."""
            matrices = [layer.matrices[name] for layer in model.layers]
            whole = zeros(HALVES * max(m.cols for m in matrices), **half)
            return whole, [zeros(HALVES * (m.plane_kpad or 8), **half) for m in matrices]

        self._in, self._out = operands("in_proj"), operands("out_proj")
        self._in_squares = zeros(up_to(max(s.squares for s in outs) * gpu.blocks, 4))
        self._out_squares = zeros(spec.d_inner // QUICK_SPAN * WARPS)
        self._ranges = [zeros(1), zeros(1)]  # in turn, a layer each
        self._in_places = [
            operand_places(layer.matrices["in_proj"], shape, layer.norm)
            for layer, shape in zip(model.layers, ins, strict=True)
        ]
        self._out_places = [
            operand_places(layer.matrices["out_proj"], shape, layer.gated_norm)
            for layer, shape in zip(model.layers, outs, strict=True)
        ]
        recorder: Any = Recorder(gpu)
        self._record(recorder)
        self._launches = made(gpu, recorder.launches, "one")

    @classmethod
    def fits(cls, model: CudaModel, gpu: Gpu, batch: int) -> bool:
        spec = model.spec
        if not gpu.bakes or batch != 1 or not FusedStep.fits(model, gpu, batch):
            return False
        quick = spec.d_state == QUICK_STATE and span_of(spec.headdim) == QUICK_SPAN
        normed = spec.gated_norm and not spec.norm_before_gate and norm_groups(spec) == 1
        head = streamed_of(model.head, gpu.blocks, 1, False)
        return (
            quick
            and normed
            and head is not None
            and head.shared_bytes <= gpu.shared
            and all(cls._takes(spec.d_inner, layer, gpu) for layer in model.layers)
        )

    @classmethod
    def _shapes(cls, layer: LayerWeights, gpu: Gpu) -> tuple[OneShape | None, OneShape | None]:
        into, out = (
            one_shape_of(layer.matrices[name], gpu.blocks, warps, cls.RESIDENT[name])
            for name, warps in (("in_proj", cls.WARPS_IN), ("out_proj", cls.WARPS_OUT))
        )
        return into, out

    @classmethod
    def _takes(cls, d_inner: int, layer: LayerWeights, gpu: Gpu) -> bool:
        """Whether the kernels take a layer's matrices. Rows of out_proj in int8 would leave no operands, and a thread
        adds up to four squares."""
        into, out = cls._shapes(layer, gpu)
        if not into or not out or out.rows:
            return False
        return out.squares * gpu.blocks <= 4 * into.threads and d_inner // QUICK_SPAN * WARPS <= 4 * out.threads

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
        for arguments, settings in self._launches:
            self._gpu.launch(*arguments, **(settings | {"overlap": overlap}))  # type: ignore[misc]

    def _record(self, gpu: Recorder) -> None:
        """Everything before the head."""
        model, spec = self._model, self._model.spec
        eps = float_bits(spec.norm_eps)
        inner, ring = spec.d_inner, spec.d_inner + spec.d_conv_channels
        (x, x2), (y, y2) = self._in, self._out
        squares, y_squares = self._in_squares, self._out_squares
        spread = self._spread[0]
        gpu.launch(
            "slimba_one_embed", (1,),
            fields_of(
                self.embed.tolist(), self._in_places[0].data_ptr(), x.data_ptr(), x2[0].data_ptr(),
                squares.data_ptr(), squares.shape[0], self._ranges[0].data_ptr(), eps,
            ),
            4 * WARPS, spread=spread,
        )  # fmt: skip
        to_state = [IN_PROJ, self._dt.data_ptr(), spec.n_heads, 0, inner, self._z.data_ptr(), inner, inner, ring, ring]
        to_stream = [ADD, self.u.data_ptr(), spec.d_model, *[0] * 7]
        for i, layer in enumerate(model.layers):
            into, out = self._ins[i], self._outs[i]
            now, following = (self._ranges[(i + k) % 2].data_ptr() for k in range(2))
            fields = fields_of(
                layer.matrices["in_proj"].fields, to_state, self._state(i), x.data_ptr(), x2[i].data_ptr(),
                float_bits(into.unit), squares.data_ptr(), squares.shape[0], eps, now, following, [0] * 5,
            )  # fmt: skip
            room = max(into.shared_bytes(), self._room("in_proj"))
            gpu.launch(into.name, (gpu.blocks,), fields, room, threads=into.threads, spread=spread)
            fields = fields_of(
                self.recurrences[i].tolist(), self._out_places[i].data_ptr(), y.data_ptr(), y2[i].data_ptr(),
                y_squares.data_ptr(),
            )  # fmt: skip
            room = max(QUICK_BYTES, self._room("recur"))
            grid = (max(inner // QUICK_SPAN, gpu.blocks),)
            gpu.launch("slimba_one_recur", grid, fields, room, threads=QUICK_THREADS, spread=spread)
            leaves = [0] * 5
            if i + 1 < len(model.layers):
                leaves = [
                    self._in_places[i + 1].data_ptr(), x.data_ptr(), x2[i + 1].data_ptr(), following,
                    squares.data_ptr(),
                ]  # fmt: skip
            fields = fields_of(
                layer.matrices["out_proj"].fields, to_stream, self._state(i), y.data_ptr(), y2[i].data_ptr(),
                float_bits(out.unit), y_squares.data_ptr(), y_squares.shape[0], eps, 0, 0, leaves,
            )  # fmt: skip
            room = max(out.shared_bytes(), self._room("out_proj"))
            gpu.launch(out.name, (gpu.blocks,), fields, room, threads=out.threads, spread=spread)
