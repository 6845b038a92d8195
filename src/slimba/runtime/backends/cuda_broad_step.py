"""One token for each of eight to hundreds of sequences on sm_90, ready to be recorded as a CUDA graph: a norm, in_proj,
the recurrence with the gated norm, and out_proj, a kernel each (kernels/cuda/broad.cu, steps.cu).

    step = BroadStep(model, gpu, batch=128, state_dtype="int8", bulk=bulk)     # where BroadStep.fits(model, gpu)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slimba.models.spec import ModelSpec
from slimba.runtime.backends.cuda_batch import RESIDUAL, STATE_HEADS, RecordedStep, Recorder, made, states_fit
from slimba.runtime.backends.cuda_broad import Broad
from slimba.runtime.backends.cuda_bulk import Bulk
from slimba.runtime.backends.cuda_device import Gpu
from slimba.runtime.backends.cuda_mid import Mid
from slimba.runtime.backends.cuda_model import CudaModel
from slimba.runtime.backends.cuda_state import KEPT, STATE_CODES
from slimba.runtime.backends.cuda_step import STORE, in_proj_output, normed_behind_gate, recurrence
from slimba.runtime.backends.cuda_weights import DeviceMatrix, fields_of, float_bits

__all__ = ["BroadStep"]

CHANNELS = 64 * STATE_HEADS  # of a block of slimba_steps
FLOW_TAPS = 4  # for which the registers of flow.cu do


class BroadStep(RecordedStep):
    FEWEST = 2  # sequences
    BROAD_HEAD_FROM = 64  # sequences from which broad.cu takes an int4 head
    FLOW = (
        16,
        8,
        4,
        2,
    )  # fours of heads of a block of flow.cu, where there are FLOW_FILLS such blocks a multiprocessor
    FLOW_FILLS = 1.8
    WIDE_HEAD_FROM = 256  # and from which another is expanded for cuBLAS

    def __init__(self, model: CudaModel, gpu: Gpu, batch: int, state_dtype: str, bulk: Bulk) -> None:
        super().__init__(model, gpu, batch)
        self._bulk = bulk
        spec, zeros = model.spec, self._zeros
        matrices = [m for layer in model.layers for m in layer.matrices.values()]
        recorder: Any = Recorder(gpu)
        self._broad_head = batch >= self.BROAD_HEAD_FROM and Broad.fits(model.head)
        self._broad = Broad(recorder, batch, [*matrices, model.head] if self._broad_head else matrices)
        self._mid = Mid(recorder, batch, [model.head])
        parts = max(self._broad.shape(layer.matrices["out_proj"]).parts for layer in model.layers)
        self._u, self._other_u = zeros(batch, spec.d_model), zeros(batch, spec.d_model)  # in turn, a layer each
        self._z, self._dt = zeros(batch, spec.d_inner), zeros(batch, spec.n_heads)
        self._parts = zeros(parts, batch, spec.d_model)  # results of out_proj, each of some of its columns
        self._squares = zeros(batch, spec.d_inner // CHANNELS)
        self._embed = fields_of(
            model.embedding.fields, self._state(0), batch, self.ids.data_ptr(), self._u.data_ptr()
        )  # fmt: skip
        self._recurrences = [
            recurrence(spec, layer, self._state(i), batch, state_dtype, self._dt, self._z, self._u)
            for i, layer in enumerate(model.layers)
        ]
        self._recur_name, self._recur_fours, self._recur_bytes = self._recur_kernel(state_dtype)
        self._layers(recorder)
        self._launches = made(gpu, recorder.launches, "broad")

    @classmethod
    def fits(cls, model: CudaModel, gpu: Gpu) -> bool:
        spec = model.spec
        if not gpu.warpgroups or spec.architecture != "mamba2" or not states_fit(spec):
            return False
        normed = normed_behind_gate(spec) and spec.d_inner % 512 == 0
        matrices = [m for layer in model.layers for m in layer.matrices.values()]
        out = [layer.matrices["out_proj"] for layer in model.layers]
        return normed and all(map(Broad.fits, matrices)) and all(map(by_blocks, out)) and Mid.fits(model.head)

    def _recur_kernel(self, state_dtype: str) -> tuple[str, int, int]:
        """The recurrence's kernel, how many fours of heads a block of it takes, and its shared memory."""
        # Few blocks go to multiprocessors of their own where they ask for so much that no other fits
        beside = -(-self.batch * self._model.spec.n_heads // STATE_HEADS // self._gpu.blocks)
        room = (self._gpu.shared + 1024) // (beside + 1) // 128 * 128 if beside < 3 else 0
        return recur_kernel(self._model.spec, self._gpu, self.batch, state_dtype, self.FLOW_FILLS, room)

    def _layers(self, gpu: Recorder) -> None:
        """Everything before the choice of the next ids."""
        model, spec, eps = self._model, self._model.spec, float_bits(self._model.spec.norm_eps)
        inner, stride = spec.d_inner, self.batch * spec.d_model
        gpu.launch("slimba_embed", (4 * gpu.blocks,), self._embed)
        to_state = in_proj_output(spec, self._dt, self._z)
        to_parts = [STORE, self._parts.data_ptr(), spec.d_model, *[0] * 7]
        squares = [self._squares.data_ptr(), inner // CHANNELS, eps]
        u, other = self._u.data_ptr(), self._other_u.data_ptr()
        added = [self._parts.data_ptr(), stride, 0]
        for i, layer in enumerate(model.layers):
            m, out = layer.matrices["in_proj"], layer.matrices["out_proj"]
            source, early = [u, spec.d_model, 0, 0, layer.norm.data_ptr(), 1, eps], self._broad.codes_by_norm(m)
            self._broad.norm(m, source, [other, *added], [*to_state, *self._state(i)] if early else ())
            u, other = other, u
            self._broad.product(m, to_state, self._state(i), signs_only=early)
            weight = layer.gated_norm.data_ptr() if layer.gated_norm is not None else 0
            fields = fields_of(
                self._recurrences[i].tolist(), weight, self._broad.images, squares[0], self._broad.padded,
                plane_of(out), [0] * 3,
            )  # fmt: skip
            grid = spec.n_heads // STATE_HEADS // self._recur_fours, self.batch
            gpu.launch(self._recur_name, grid, fields, self._recur_bytes, overlap=True)
            self._broad.product(out, to_parts, self._state(i), stride, squares)
            added[2] = self._broad.shape(out).parts
        source = [u, spec.d_model, 0, 0, model.norm_f.data_ptr(), 1, eps]
        to_logits = [STORE, self.logits.data_ptr(), spec.vocab_size, *[0] * 7]
        if self._broad_head:
            self._broad.norm(model.head, source, [0, *added])
            self._broad.product(model.head, to_logits, self._state(0))
            return
        wide = self.batch >= self.WIDE_HEAD_FROM
        self._mid.norm(model.head, source, 1, [RESIDUAL, *added], natural=wide)
        if wide:
            gpu.call(lambda: self._bulk.head(self._mid.vectors(model.head), self.logits))
        else:
            self._mid.product(model.head, to_logits, self._state(0))


def plane_of(m: DeviceMatrix) -> list[int]:
    """Pointer to the columns of the second plane's places, and how many places."""
    return [m.plane_columns_pointer, m.plane_kpad]


def recur_kernel(
    spec: ModelSpec, gpu: Gpu, batch: int, state_dtype: str, fills: float, room: int = 0
) -> tuple[str, int, int]:
    """The recurrence's kernel, how many fours of heads a block of it takes, and its shared memory. fills: blocks of
    flow.cu a multiprocessor from which it is taken; room: bytes that a block of steps.cu asks for at least."""
    n, units = spec.d_state, batch * spec.n_heads // STATE_HEADS
    per_group = spec.n_heads // spec.n_groups // STATE_HEADS
    if state_dtype == "int8" and spec.d_conv <= FLOW_TAPS:
        for fours in BroadStep.FLOW:
            if per_group % fours == 0 and units >= fills * fours * gpu.blocks:
                return f"slimba_flow_{n}_{fours}", fours, flow_bytes(n)
    return f"slimba_steps_{STATE_CODES[state_dtype]}_{n}", 1, max(steps_bytes(n, state_dtype), room)


def by_blocks(m: DeviceMatrix) -> bool:
    """Whether the places of the second plane are divided among the blocks of slimba_steps as the columns are."""
    if m.plane_kpad == 0:
        return True
    places, left = divmod(m.plane_kpad * CHANNELS, m.cols)
    if left or places % 32 or len(m.slots) != m.plane_kpad:
        return False
    block = np.arange(m.plane_kpad) // places
    return bool(((m.slots < 0) | (m.slots // CHANNELS == block)).all())


def steps_bytes(n: int, state_dtype: str) -> int:
    """Shared memory of slimba_steps: StepsShared in kernels/cuda/steps.cu."""
    exact = state_dtype == "float32"
    rows = 4 * KEPT * (CHANNELS + n) if exact else KEPT * (2 * CHANNELS + 16) + 2 * KEPT * (n + 4)
    floats = 3 * n // 4 + 2 * n + 2 * CHANNELS + 2 * STATE_HEADS * KEPT + STATE_HEADS + 8
    return rows + 4 * floats + 2 * STATE_HEADS * 3 * KEPT


def flow_bytes(n: int) -> int:
    """Shared memory of slimba_flow: FlowShared in kernels/cuda/flow.cu."""
    floats = KEPT // 2 * (n + 4) + 3 * n // 4 + 2 * n + 3 * CHANNELS + STATE_HEADS * KEPT + STATE_HEADS + 8
    return 2 * CHANNELS * n + 2 * KEPT * (2 * CHANNELS + 16) + 4 * floats + 2 * STATE_HEADS * 3 * KEPT
