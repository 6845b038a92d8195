"""One token for each sequence of a batch, ready to be recorded as a CUDA graph.

FusedStep: few sequences, three launches a layer. BulkStep: any model, by the bulk pass. For many see cuda_batch.py.

    step = FusedStep(model, gpu, batch=1, state_dtype="int8")
    step.point_to(state); step.ids[:] = ...; step.work(choose=True)     # logits, next ids, positions moved on

Larger batches than 1 run in groups of 8. Which models fit is `FusedStep.fits`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from slimba.models.spec import ModelSpec
from slimba.runtime.backends.cuda_bake import KEYS, QUICK, QUICK_THREADS, Baked
from slimba.runtime.backends.cuda_bulk import Bulk
from slimba.runtime.backends.cuda_codes import Codes, streamed_of
from slimba.runtime.backends.cuda_device import Gpu
from slimba.runtime.backends.cuda_lean import Dot, Lean, dot_of, lean_of
from slimba.runtime.backends.cuda_model import CudaModel, LayerWeights, entries_of, span_of
from slimba.runtime.backends.cuda_state import KEPT, POINTERS, STATE_CODES, CudaState, StatePointers
from slimba.runtime.backends.cuda_stream import Stream
from slimba.runtime.backends.cuda_weights import WARPS, DeviceMatrix, fields_of, float_bits
from slimba.runtime.engine import SamplingParams

__all__ = ["BulkStep", "FusedStep", "Step"]

STORE, ADD, IN_PROJ = 0, 1, 2  # enum OutputMode in kernels/cuda/matrix.cuh
RECUR = {"1": "1, false", "quad": "1, true", "2": "2, false"}  # arguments of the template in kernels/cuda/step.cuh
MOST_KERNELS = 16  # of one model: a layout a layer would take minutes to compile
LARGEST_BATCH = 8  # of the fused kernels: the tokens that one holds
SETTINGS, SAMPLE_BYTES = 7, 8 * (4096 + 1024 + 32 + 1) + 4 * (2048 + 4)  # structs in kernels/cuda/sample.cu
CHOICE_BLOCKS = 32  # that look at the logits of a sequence
QUICK_STATE, QUICK_SPAN = 128, 32  # d_state and channels of a block of kernels/cuda/quick.cuh
QUICK_BYTES = 4 * (QUICK_SPAN + 2 * QUICK_STATE + KEPT)
LARGEST_STATE = 256  # entries of a row of the state that a warp holds


def recur_bytes(spec: ModelSpec) -> int:
    """Shared memory of a block of slimba_recur."""
    span, n = span_of(spec.headdim), spec.d_state
    return 4 * (span + 2 * n + KEPT * (span + n + 2))


def norm_groups(spec: ModelSpec) -> int:
    """Parts of the gated norm, each with an RMS of its own; 0 without a norm."""
    return spec.d_inner // spec.norm_group_size if spec.gated_norm else 0


def normed_behind_gate(spec: ModelSpec) -> bool:
    """Whether one norm follows the gate."""
    return spec.gated_norm and not spec.norm_before_gate and norm_groups(spec) == 1


def takes_quick(spec: ModelSpec) -> bool:
    """Whether kernels/cuda/quick.cuh has the shape."""
    return spec.d_state == QUICK_STATE and span_of(spec.headdim) == QUICK_SPAN


def in_proj_output(spec: ModelSpec, dt: torch.Tensor, z: torch.Tensor) -> list[int]:
    """The struct Output of in_proj."""
    inner, ring = spec.d_inner, spec.d_inner + spec.d_conv_channels
    return [IN_PROJ, dt.data_ptr(), spec.n_heads, 0, inner, z.data_ptr(), inner, inner, ring, ring]


def recurrence(
    spec: ModelSpec,
    layer: LayerWeights,
    state: list[int],
    batch: int,
    state_dtype: str,
    dt: torch.Tensor,
    z: torch.Tensor,
    y: torch.Tensor,
) -> np.ndarray:
    """The struct Recurrence of kernels/cuda/step.cuh."""
    gated = not (spec.gated_norm and spec.norm_before_gate)
    low, high = spec.dt_limit
    return fields_of(
        state, batch, spec.n_heads, spec.headdim, spec.d_state, spec.n_groups, spec.d_inner, span_of(spec.headdim),
        STATE_CODES[state_dtype], int(spec.d_has_hdim), int(gated), layer.conv.data_ptr(),
        layer.conv_bias.data_ptr() if layer.conv_bias is not None else 0, layer.a.data_ptr(), layer.d.data_ptr(),
        layer.dt_bias.data_ptr(), dt.data_ptr(), spec.n_heads, z.data_ptr(), spec.d_inner, y.data_ptr(), spec.d_inner,
        float_bits(low), float_bits(high),
    )  # fmt: skip


class Step(ABC):
    """What every step of decoding has, whatever computes it.

    `ids` int32 [B] in, `logits` float32 [B, V] out; `chosen` int32 [B, ROOM] and `count` [B] record the ids that are
    chosen. `arithmetic`: what the products take their inputs in.
    """

    ROOM = 4096
    arithmetic = "float16"

    def __init__(self, model: CudaModel, gpu: Gpu, batch: int) -> None:
        spec = model.spec
        self.batch, self._gpu, self._model = batch, gpu, model
        self.ids = self._zeros(batch, dtype=torch.int32)
        self.chosen = self._zeros(batch, self.ROOM, dtype=torch.int32)
        self.count = self._zeros(batch, dtype=torch.int32)
        self.logits = self._zeros(batch, spec.vocab_size)
        self._keys = self._zeros(batch, CHOICE_BLOCKS, dtype=torch.int64)
        self._tickets = self._zeros(batch, dtype=torch.int32)
        self._valid = torch.full((1,), spec.vocab_size, dtype=torch.int32, device=gpu.device)
        self.pointers = StatePointers(self._zeros(POINTERS, dtype=torch.int64), self._zeros(batch, dtype=torch.int32))
        self._settings = self._zeros(batch, SETTINGS, dtype=torch.int64)
        self._sample = fields_of(
            self._state(0), batch, self.logits.data_ptr(), spec.vocab_size, self._valid.data_ptr(),
            self.ids.data_ptr(), self.chosen.data_ptr(), self.ROOM, self.count.data_ptr(), self._settings.data_ptr(),
        )  # fmt: skip
        self.samples = False
        self._argmax = fields_of(
            self._state(0), batch, self.logits.data_ptr(), spec.vocab_size, self._valid.data_ptr(),
            self.ids.data_ptr(), self.chosen.data_ptr(), self.ROOM, self.count.data_ptr(), self._keys.data_ptr(),
            self._tickets.data_ptr(),
        )  # fmt: skip

    @abstractmethod
    def work(self, *, choose: bool, follows: bool = False) -> None:
        """Launches one step. choose: the most likely ids become the next ids. follows: it is launched directly after a
        step that chose its ids."""

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self._gpu.device)

    def _state(self, layer: int) -> list[int]:
        return self.pointers.fields(self._model.spec, layer)

    def allow(self, n_valid: int) -> None:
        """Ids from `n_valid` on are not chosen; 0 allows all."""
        self._valid.fill_(n_valid or self._model.spec.vocab_size)

    def sample_by(
        self, params: SamplingParams | Sequence[SamplingParams] | None, numbers: Sequence[int] | None = None
    ) -> None:
        """How the next ids are chosen: by these settings, which may be one for each sequence, or greedily (None).

        numbers: each sequence's number in the draws, by default its place in the batch. Token i of a sequence is the
        i-th after the call of `first_token`.
        """
        self.samples = params is not None
        if params is None:
            return
        every = [params] * self.batch if isinstance(params, SamplingParams) else list(params)
        rows = np.zeros((self.batch, SETTINGS), np.int64)
        rows[:, :3].view(np.float64)[:] = [[p.temperature, p.top_p, p.min_p] for p in every]
        rows[:, 3].view(np.uint64)[:] = [p.seed for p in every]
        rows[:, 4] = [p.top_k for p in every]
        rows[:, 5] = range(self.batch) if numbers is None else numbers
        self._settings.copy_(torch.from_numpy(rows))

    def first_token(self, number: int | Sequence[int]) -> None:
        """The number of the token that is chosen next, where `count` is 0."""
        self._settings[:, 6] = torch.as_tensor(number, dtype=torch.int64, device=self._gpu.device)

    def point_to(self, state: CudaState) -> None:
        """The next steps move this state on."""
        self.pointers.arrays.copy_(state.pointers.arrays)
        self.pointers.slots.copy_(state.pointers.slots)

    def after(self, choose: bool, overlap: bool = False) -> None:
        """The next ids where they are chosen here; and the positions move on."""
        gpu = self._gpu
        if choose and self.samples:
            gpu.launch("slimba_sample", (self.batch,), self._sample, SAMPLE_BYTES, threads=1024, overlap=overlap)
        elif choose:
            gpu.launch("slimba_argmax", (CHOICE_BLOCKS, self.batch), self._argmax, 64, overlap=overlap)
        else:
            fields = fields_of(self._state(0), self.batch, 1)
            gpu.launch("slimba_advance", (-(-self.batch // 256),), fields, overlap=overlap)


class BulkStep(Step):
    """One token for each of many sequences by the bulk pass."""

    def __init__(self, model: CudaModel, gpu: Gpu, batch: int, bulk: Bulk) -> None:
        super().__init__(model, gpu, batch)
        self._bulk = bulk

    def work(self, *, choose: bool, follows: bool = False) -> None:
        """Launches one step, as in Step."""
        u = self._bulk.residual(self.ids[:, None], self.pointers, advance=False)
        self._bulk.logits(u, out=self.logits)
        self.after(choose)


class FusedStep(Step):
    """One token for each of up to LARGEST_BATCH sequences by the fused kernels."""

    arithmetic = "23-bit fixed point"
    DOTS = QUICK = STREAMS = True
    # Shared memory that kernels ask for so that their blocks spread over the multiprocessors: neighbours fit beside
    # each other, but never two blocks of one kernel. Percent of a multiprocessor's memory that blocks share, and bytes;
    # STAGED: where codes of projections wait there.
    SPREAD, STAGED = (70, 164 * 1024), (100, 226 * 1024)
    BESIDE: ClassVar = {"in_proj": 0.485, "recur": 0.378, "out_proj": 0.5005}

    def __init__(self, model: CudaModel, gpu: Gpu, batch: int, state_dtype: str) -> None:
        super().__init__(model, gpu, batch)
        spec, zeros = model.spec, self._zeros
        self._tokens = self.tokens_of(batch)
        self.u = zeros(batch, spec.d_model)
        self._z, self._y = zeros(batch, spec.d_inner), zeros(batch, spec.d_inner)
        self._dt = zeros(batch, spec.n_heads)
        self.products: list[np.ndarray] = []
        self.recurrences: list[np.ndarray] = []
        for i, layer in enumerate(model.layers):
            self.products += [self._in_proj(layer, i), self._out_proj(layer, i)]
            tensors = self._dt, self._z, self._y
            self.recurrences.append(recurrence(spec, layer, self._state(i), batch, state_dtype, *tensors))
        self.products.append(self._head())
        self._lean: dict[int, Codes | Dot | Lean | Stream] = {}
        self._quick, self._spread = False, self.SPREAD
        self.embed = fields_of(
            model.embedding.fields, self._state(0), batch, self.ids.data_ptr(), self.u.data_ptr()
        )  # fmt: skip
        self._block_keys = zeros(gpu.blocks, dtype=torch.int64)
        choice = self._argmax.copy()
        choice[-2] = self._block_keys.data_ptr()
        self._choosing = np.concatenate([self.products[-1], choice, self.embed])  # struct Head
        self._heads = self._choosing.copy()
        self._heads[KEYS] = 0
        self._chooses = False
        self._kernels, self._own = self._bake() if gpu.bakes else self._generic()

    @staticmethod
    def tokens_of(batch: int) -> int:
        """Tokens that the kernel for this batch holds."""
        return 1 if batch == 1 else 8

    @classmethod
    def fits(cls, model: CudaModel, gpu: Gpu, batch: int) -> bool:
        spec = model.spec
        if spec.architecture != "mamba2" or not 1 <= batch <= LARGEST_BATCH or spec.d_state > LARGEST_STATE:
            return False
        groups = max(1, norm_groups(spec))
        matrices = [m for layer in model.layers for m in layer.matrices.values()]
        return all(m.shared_bytes(cls.tokens_of(batch), groups) <= gpu.shared for m in [*matrices, model.head])

    def work(self, *, choose: bool, follows: bool = False, overlap: bool = True) -> None:
        """Launches one step, as in Step. overlap: by dependent launch."""
        by_head = self._chooses and not self.samples
        self.layers(overlap, embedded=follows and by_head)
        self.head(overlap, choose and by_head)
        if not (choose and by_head):
            self.after(choose, overlap)

    def head(self, overlap: bool, choose: bool = False) -> None:
        """Launches the last product; choose: the ids and inputs of the next step are made by the same kernel."""
        i = len(self.products) - 1
        if not self._chooses:
            return self.product(self._model.head, i, 1, overlap)
        lean, fields = self._lean[i], self._choosing if choose else self._heads
        self._gpu.launch(
            self._kernels[i], (self._gpu.blocks,), fields, max(lean.shared_bytes, 8 * (lean.threads // 32 + 1)),
            threads=lean.threads, overlap=overlap, module=self._own, spread=self._spread[0],
        )  # fmt: skip

    def layers(self, overlap: bool, embedded: bool = False) -> None:
        """Launches everything before the head. embedded: the inputs are there already."""
        spec = self._model.spec
        if not embedded:
            self._embed(overlap)
        for i, layer in enumerate(self._model.layers):
            self.product(layer.matrices["in_proj"], 2 * i, 1, overlap)
            self.recur(i, overlap)
            self.product(layer.matrices["out_proj"], 2 * i + 1, norm_groups(spec), overlap)

    def _embed(self, overlap: bool) -> None:
        spread = self._spread[0] * (self.batch == 1)
        self._gpu.launch("slimba_embed", (self._gpu.blocks,), self.embed, overlap=overlap, spread=spread)

    def product(self, m: DeviceMatrix, i: int, groups: int, overlap: bool) -> None:
        """Launches the i-th product; `groups` of its input's norm."""
        if lean := self._lean.get(i):
            room = self._room("in_proj" if i % 2 == 0 else "out_proj")
            self._gpu.launch(
                self._kernels[i], (self._gpu.blocks,), self.products[i], max(lean.shared_bytes, room),
                threads=lean.threads, overlap=overlap, module=self._own, spread=self._spread[0],
            )  # fmt: skip
            return
        blocks = self._gpu.blocks * (2 if m.items >= 2 * WARPS * self._gpu.blocks else 1)  # two fit a multiprocessor
        grid = min(blocks, m.items), -(-self.batch // self._tokens)
        shared = m.shared_bytes(self._tokens, groups)
        self._gpu.launch(self._kernels[i], grid, self.products[i], shared, overlap=overlap, module=self._own)

    def recur(self, i: int, overlap: bool) -> None:
        """Launches the recurrence of layer i."""
        spec, name = self._model.spec, self._kernels[len(self.products) + i]
        units = self.batch * (spec.d_inner // span_of(spec.headdim))
        if self._quick:
            self._gpu.launch(
                name,
                (max(units, self._gpu.blocks),),
                self.recurrences[i],
                max(QUICK_BYTES, self._room("recur")),
                threads=QUICK_THREADS,
                overlap=overlap,
                module=self._own,
                spread=self._spread[0],
            )
            return
        shared = recur_bytes(spec)
        grid = (min(units, 8 * self._gpu.blocks),)
        self._gpu.launch(name, grid, self.recurrences[i], shared, overlap=overlap, module=self._own)

    def _room(self, kernel: str) -> int:
        """Shared memory to ask for, whatever a kernel uses. Without it the blocks of the next kernel go in pairs to
        where there is room first, and half of the GPU has nothing to do."""
        return int(self.BESIDE[kernel] * self._spread[1]) // 128 * 128 if self._gpu.overlaps and self.batch == 1 else 0

    def _generic(self) -> tuple[list[str], Any]:
        """Names of the kernels of products and recurrences, and their module: kernels for any shape."""
        recur = "slimba_recur_" + entries_of(self._model.spec.d_state)
        names = [f"slimba_product_{self._tokens}"] * len(self.products) + [recur] * len(self.recurrences)
        return names, self._gpu.module("generic")

    def _bake(self) -> tuple[list[str], Any]:
        """The same, made for this model's shape."""
        spec = self._model.spec
        self._quick = self.QUICK and takes_quick(spec)
        baked, instance = Baked(), QUICK if self._quick else RECUR[entries_of(spec.d_state)]
        self._lean = self._lean_products()
        names = [baked.product(fields, self._tokens, self._lean.get(i)) for i, fields in enumerate(self.products[:-1])]
        head = self._lean.get(len(names))
        self._chooses = isinstance(head, Codes | Stream)
        if isinstance(head, Codes | Stream):
            names.append(baked.head(self._choosing, head))
        else:
            names.append(baked.product(self.products[-1], self._tokens, head))
        names += [baked.recurrence(fields, instance) for fields in self.recurrences]
        if len(set(names)) > MOST_KERNELS:
            self._lean, self._quick, self._chooses = {}, False, False
            return self._generic()
        return names, self._gpu.module("decode", baked.source)

    def _lean_products(self) -> dict[int, Codes | Dot | Lean | Stream]:
        """The products that dot.cuh, lean.cuh, codes.cuh or stream.cuh takes, by their number."""
        if self.batch > 1:
            return {}
        spec, blocks = self._model.spec, self._gpu.blocks
        late = bool(spec.gated_norm and spec.norm_before_gate)

        head = streamed_of(self._model.head, blocks, 1, False, self.STREAMS)
        found: dict[int, Codes | Dot | Lean | Stream | None] = {len(self.products) - 1: head}
        for i, layer in enumerate(self._model.layers):
            for k, name, groups, gated in (0, "in_proj", 1, False), (1, "out_proj", norm_groups(spec), late):
                given = layer.matrices[name], blocks, groups, gated
                dot = dot_of(*given) if self.DOTS else None
                found[2 * i + k] = dot or lean_of(*given) or streamed_of(*given, self.STREAMS)
        fitting = {i: lean for i, lean in found.items() if lean is not None and lean.shared_bytes <= self._gpu.shared}
        return fitting | self._staged(fitting)

    def _staged(self, lean: dict[int, Codes | Dot | Lean | Stream]) -> dict[int, Codes | Dot | Lean | Stream]:
        """All projections with their codes in shared memory, where in_proj and out_proj fit there side by side: then
        the weights of one come while the other works, for which a multiprocessor has too few registers."""
        out: dict[int, Codes | Dot | Lean | Stream] = {}
        for i in range(len(self.products) - 1):
            codes = lean.get(i)
            staged = codes.staged_codes if isinstance(codes, Codes) else None
            room = self.BESIDE["in_proj" if i % 2 == 0 else "out_proj"] * self.STAGED[1]
            if staged is None or staged.shared_bytes > room or self._gpu.shared < self.STAGED[1]:
                return {}
            out[i] = staged
        self._spread = self.STAGED
        return out

    def _in_proj(self, layer: LayerWeights, i: int) -> np.ndarray:
        spec = self._model.spec
        source = [self.u.data_ptr(), spec.d_model, 0, 0, layer.norm.data_ptr(), 1, float_bits(spec.norm_eps)]
        m, out = layer.matrices["in_proj"], in_proj_output(spec, self._dt, self._z)
        return fields_of(m.fields, source, out, self._state(i), self.batch, m.plane_inverse)

    def _out_proj(self, layer: LayerWeights, i: int) -> np.ndarray:
        spec = self._model.spec
        late = spec.gated_norm and spec.norm_before_gate  # the gate is applied after the norm, that is here
        weight = layer.gated_norm.data_ptr() if layer.gated_norm is not None else 0
        source = [
            self._y.data_ptr(), spec.d_inner, self._z.data_ptr() if late else 0, spec.d_inner, weight,
            norm_groups(spec), float_bits(spec.norm_eps),
        ]  # fmt: skip
        out = [ADD, self.u.data_ptr(), spec.d_model, *[0] * 7]
        m = layer.matrices["out_proj"]
        return fields_of(m.fields, source, out, self._state(i), self.batch, m.plane_inverse)

    def _head(self) -> np.ndarray:
        spec, model = self._model.spec, self._model
        source = [self.u.data_ptr(), spec.d_model, 0, 0, model.norm_f.data_ptr(), 1, float_bits(spec.norm_eps)]
        out = [STORE, self.logits.data_ptr(), spec.vocab_size, *[0] * 7]
        return fields_of(model.head.fields, source, out, self._state(0), self.batch, model.head.plane_inverse)
