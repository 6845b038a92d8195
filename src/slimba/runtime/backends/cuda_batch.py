"""One token for each of tens to hundreds of sequences, ready to be recorded as a CUDA graph: six launches a layer,
nothing expanded in memory (kernels/cuda/mid.cu and batch.cu).

    step = BatchStep(model, gpu, batch=128, state_dtype="int8")     # where BatchStep.fits(model, gpu, 128)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from slimba.models.spec import ModelSpec
from slimba.runtime.backends.cuda_bake import Baked
from slimba.runtime.backends.cuda_bulk import Bulk
from slimba.runtime.backends.cuda_device import Gpu
from slimba.runtime.backends.cuda_mid import Mid
from slimba.runtime.backends.cuda_model import CudaModel, LayerWeights, entries_of, span_of
from slimba.runtime.backends.cuda_state import KEPT, STATE_CODES
from slimba.runtime.backends.cuda_step import (
    LARGEST_STATE,
    MOST_KERNELS,
    STORE,
    Step,
    in_proj_output,
    norm_groups,
    recur_bytes,
    recurrence,
)
from slimba.runtime.backends.cuda_stream import MOST_FEW
from slimba.runtime.backends.cuda_weights import DeviceMatrix, fields_of, float_bits

__all__ = ["BatchStep"]

STATE_HEADS = 4  # of kernels/cuda/batch.cu
RESIDUAL = 1
ONLY_MADE = (
    "slimba_few",
    "slimba_broad",
    "slimba_steps",
    "slimba_flow",
    "slimba_eight",
    "slimba_one",
    "slimba_leaving",
)  # kernels that there are for one model's shape alone


# Arguments of a launch by position and by name, or something to be called
Launch = tuple[tuple[Any, ...] | Callable[[], Any], dict[str, Any]]


class Recorder:
    """A Gpu that only notes what is launched, and what else is to be done between."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.launches: list[Launch] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gpu, name)

    def launch(self, *arguments: Any, **settings: Any) -> None:
        self.launches.append((arguments, settings))

    def call(self, work: Callable[[], Any]) -> None:
        self.launches.append((work, {}))


def made(gpu: Gpu, launches: list[Launch], module: str) -> list[Launch]:
    """The launches by kernels made for this model; as they are where those would be too many and there are others."""
    baked, found = Baked(), []
    for arguments, settings in launches:
        name = None if callable(arguments) else baked.of_many(arguments[0], arguments[2])
        found.append((arguments, settings, name))
    names = {name for *_, name in found if name}
    if len(names) > MOST_KERNELS and not any(name.startswith(ONLY_MADE) for name in names):
        return launches
    kernels = gpu.module(module, baked.source)
    return [
        ((name, *arguments[1:]), settings | {"module": kernels})
        if name and not callable(arguments)
        else (arguments, settings)
        for arguments, settings, name in found
    ]


class RecordedStep(Step):
    """A step whose launches are listed once, in `_launches`."""

    _launches: list[Launch]

    def work(self, *, choose: bool, follows: bool = False) -> None:
        """Launches one step, as in Step."""
        for arguments, settings in self._launches:
            if callable(arguments):
                arguments()
            else:
                self._gpu.launch(*arguments, **settings)
        self.after(choose, overlap=True)


class BatchStep(RecordedStep):
    # What benchmarks/cuda_variants.py compares (docs/log.md)
    BAKES = True  # kernels made for the model, those of still.cu among them
    WIDE_FROM = 256  # sequences from which a matrix is expanded for cuBLAS

    def __init__(self, model: CudaModel, gpu: Gpu, batch: int, state_dtype: str, bulk: Bulk) -> None:
        super().__init__(model, gpu, batch)
        self._bulk = bulk
        spec, zeros = model.spec, self._zeros
        recorder: Any = Recorder(gpu)
        self._mid = Mid(recorder, batch, every_matrix(model), bakes=gpu.bakes and self.BAKES)
        self._u = zeros(batch, spec.d_model)
        self._z, self._y, self._dt = zeros(batch, spec.d_inner), zeros(batch, spec.d_inner), zeros(batch, spec.n_heads)
        self._parts = zeros(2, batch, spec.d_model)  # results of out_proj, each of some of its columns
        self._embed = fields_of(
            model.embedding.fields, self._state(0), batch, self.ids.data_ptr(), self._u.data_ptr()
        )  # fmt: skip
        tensors = self._dt, self._z, self._y
        self._recurrences = [
            recurrence(spec, layer, self._state(i), batch, state_dtype, *tensors)
            for i, layer in enumerate(model.layers)
        ]
        self._states = f"slimba_states_{STATE_CODES[state_dtype]}_{spec.d_state}" if states_fit(spec) else None
        self._p = zeros(batch, spec.d_inner + spec.d_conv_channels, dtype=torch.float16)
        groups, n = spec.n_groups, spec.d_state
        self._between = [
            zeros(batch, spec.d_inner), zeros(batch, groups, n), zeros(batch, groups, 3, n, dtype=torch.int8),
            zeros(batch, groups), zeros(batch, groups, KEPT),
        ]  # fmt: skip

        self._wide = self._widens(model) and (batch >= self.WIDE_FROM or not self._multiplies(model, gpu, batch))
        self._launches = self._recorded(recorder)

    @classmethod
    def fits(cls, model: CudaModel, gpu: Gpu, batch: int) -> bool:
        spec = model.spec
        small = spec.architecture == "mamba2" and spec.d_state <= LARGEST_STATE
        return small and (cls._multiplies(model, gpu, batch) or (batch > MOST_FEW and cls._widens(model)))

    @classmethod
    def _multiplies(cls, model: CudaModel, gpu: Gpu, batch: int) -> bool:
        """Whether our kernels take every matrix."""
        return all(Mid.fits(m, gpu, batch, bakes=gpu.bakes and cls.BAKES) for m in every_matrix(model))

    @staticmethod
    def _widens(model: CudaModel) -> bool:
        """Whether cuBLAS may multiply by every matrix. An expanded matrix holds its column scale, which a rounded input
        would have to have before."""
        return not any(m.bias is not None or m.cols % 8 or (m.turns and m.col_scale) for m in every_matrix(model))

    def _recorded(self, recorder: Recorder) -> list[Launch]:
        """The launches of a step, by kernels made for this model where the GPU makes such."""
        self._layers(recorder)
        baked = self._gpu.bakes and self.BAKES
        return made(self._gpu, recorder.launches, "many") if baked else recorder.launches

    def _layers(self, recorder: Recorder) -> None:
        """Everything before the choice of the next ids."""
        model, gpu = self._model, recorder
        spec = model.spec
        gpu.launch("slimba_embed", (4 * gpu.blocks,), self._embed)
        parts = 0
        if self._wide:
            gpu.call(lambda: self._bulk.begin(model.layers[0].matrices))
        for i, layer in enumerate(model.layers):
            m = layer.matrices["in_proj"]
            self._norm_residual(m, layer.norm, parts)
            if self._wide:
                self._wide_in_proj(i, gpu)
            else:
                self._mid.product(m, self._in_proj(), self._state(i))
            self._recur(i, gpu)
            parts = self._out_proj(layer, i, gpu)
        self._norm_residual(model.head, model.norm_f, parts)
        if self._wide:
            gpu.call(lambda: self._bulk.head(self._mid.vectors(model.head), self.logits))
            return
        out = [STORE, self.logits.data_ptr(), spec.vocab_size, *[0] * 7]
        self._mid.product(model.head, out, self._state(0))

    def _norm_residual(self, m: DeviceMatrix, weight: torch.Tensor, parts: int) -> None:
        """Adds the results of the last out_proj to the residual stream and norms it for m."""
        spec = self._model.spec
        source = [self._u.data_ptr(), spec.d_model, 0, 0, weight.data_ptr(), 1, float_bits(spec.norm_eps)]
        added = [RESIDUAL, self._parts.data_ptr(), self.batch * spec.d_model, parts]
        self._mid.norm(m, source, 1, added, natural=self._wide)

    def _in_proj(self) -> list[int]:
        return in_proj_output(self._model.spec, self._dt, self._z)

    def _wide_in_proj(self, i: int, gpu: Recorder) -> None:
        """in_proj of layer i by cuBLAS over the expanded matrix."""
        spec, layers = self._model.spec, self._model.layers
        m, following = layers[i].matrices["in_proj"], layers[i + 1].matrices if i + 1 < len(layers) else None

        def product() -> None:
            self._bulk.in_proj(self._mid.vectors(m), m, following, self._p, self._dt)

        gpu.call(product)
        wide = spec.d_inner + spec.d_conv_channels
        fields = fields_of(self._state(i), self.batch, self._p.data_ptr(), wide, spec.d_inner, self._z.data_ptr())
        gpu.launch("slimba_scatter", (-(-wide // 256), self.batch), fields, overlap=True)

    def _out_proj(self, layer: LayerWeights, i: int, gpu: Recorder) -> int:
        """Gated norm and out_proj; in how many parts the results are."""
        spec, m = self._model.spec, layer.matrices["out_proj"]
        late = spec.gated_norm and spec.norm_before_gate
        weight = layer.gated_norm.data_ptr() if layer.gated_norm is not None else 0
        source = [
            self._y.data_ptr(), spec.d_inner, self._z.data_ptr() if late else 0, spec.d_inner, weight,
            norm_groups(spec), float_bits(spec.norm_eps),
        ]  # fmt: skip
        self._mid.norm(m, source, norm_groups(spec), natural=self._wide)
        if self._wide:
            layers = self._model.layers
            following = layers[i + 1].matrices if i + 1 < len(layers) else None
            gpu.call(lambda: self._bulk.out_proj(self._mid.vectors(m), m, following, self._parts[0]))
            return 1
        parts = self._mid.parts_of(m)
        out = [STORE, self._parts.data_ptr(), spec.d_model, *[0] * 7]
        self._mid.product(m, out, self._state(i), parts, self.batch * spec.d_model)
        return parts

    def _recur(self, i: int, gpu: Recorder) -> None:
        spec = self._model.spec
        if self._states is None:
            units = self.batch * (spec.d_inner // span_of(spec.headdim))
            name = "slimba_recur_" + entries_of(spec.d_state)
            gpu.launch(name, (min(units, 8 * gpu.blocks),), self._recurrences[i], recur_bytes(spec), overlap=True)
            return
        fields = np.concatenate([self._recurrences[i], fields_of([t.data_ptr() for t in self._between])])
        n, groups = spec.d_state, spec.n_groups
        grid = 1 + -(-spec.d_inner // 256), self.batch
        gpu.launch("slimba_prepare", grid, fields, 4 * groups * (2 * n + 1), overlap=True)
        grid = spec.n_heads // STATE_HEADS, self.batch
        gpu.launch(self._states, grid, fields, states_bytes(n), overlap=True)


def every_matrix(model: CudaModel) -> list[DeviceMatrix]:
    return [*(m for layer in model.layers for m in layer.matrices.values()), model.head]


def states_fit(spec: ModelSpec) -> bool:
    """Whether slimba_states takes this shape."""
    return spec.headdim == 64 and spec.d_state in (64, 128) and spec.n_heads // spec.n_groups % STATE_HEADS == 0


def states_bytes(n: int) -> int:
    """Shared memory of slimba_states: StatesShared in kernels/cuda/batch.cu."""
    return 4 * (256 + 2 * STATE_HEADS * KEPT + n + KEPT * n + KEPT * 256)
