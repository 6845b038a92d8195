"""CpuEngine: a checkpoint on the C++ engine (`slimba._core`, sources in `kernels/cpu/`). No torch, no Python per token.

Weights are used where they lie, in the memory-mapped file; small vectors are copied to float32. The kernels are chosen
at run time; SLIMBA_CPU_ISA=portable|avx2|avxvnni|avx512|avx512vnni|avx512lookup|amx|neon forces one set of them.
Results do not depend on the number of threads, the other sequences of a batch or where a prompt is cut into pieces.

Run the tests: `pytest tests/runtime/test_cpu_engine.py tests/kernels`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from slimba import _core
from slimba.checkpoints.checkpoint import Checkpoint, scan_scales
from slimba.errors import UserError
from slimba.models.spec import ModelSpec
from slimba.runtime.engine import SamplingParams

__all__ = ["STATE_DTYPES", "CpuEngine", "CpuState", "available_bytes", "default_threads"]

ACTIVATIONS = ("float32", "int8")
STATE_DTYPES = ("float32", "bfloat16", "int8")  # in the order of StateType in kernels.h, where rounding is defined


def default_threads() -> int:
    """Physical cores that this process may use, and no more than a container's CPU quota."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text().strip() if siblings.exists() else str(cpu))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        most, _, period = quota.read_text().strip().partition(" ")
        if most != "max":
            return max(1, min(len(cores), -(-int(most) // int(period))))
    return len(cores)


def available_bytes() -> int | None:
    """Memory that can be had without swapping, or None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _need_memory(nbytes: int, what: str, remedy: str) -> None:
    available = available_bytes()
    if available is not None and nbytes > available:
        raise UserError(f"{what} needs {nbytes / 1e9:.1f} GB but {available / 1e9:.1f} GB are free: {remedy}")


def _ids(ids: np.ndarray, batch: int, what: str = "ids") -> np.ndarray:
    """int32 [B, L], contiguous; the values are checked against the vocabulary by the core."""
    array = np.asarray(ids)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise UserError(f"{what} must be integers of shape [batch, length], not {array.dtype} {list(array.shape)}")
    if array.shape[0] != batch:
        raise UserError(f"{what} are for a batch of {array.shape[0]} but the state holds {batch} sequences")
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise UserError(f"{what} hold {array.min() if array.min() < 0 else array.max()}, which is no token id")
    return np.ascontiguousarray(array, dtype=np.int32)


def _bytes(array: np.ndarray) -> np.ndarray:
    """The same memory as a flat uint8 array: the core takes any alignment."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class CpuState:
    """Recurrent state of a batch of sequences, in the engine's state dtype."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.batch: int = core.batch

    def clone(self) -> CpuState:
        return CpuState(self._core.clone())

    def reset(self) -> None:
        self._core.reset()

    def save(self, b: int = 0) -> np.ndarray:
        """Sequence b as bytes, of the same number whatever its length: a prefix to go on from by `load`."""
        out = np.empty(self._core.saved_bytes, np.uint8)
        try:
            self._core.save(b, out)
        except ValueError as e:
            raise UserError(str(e)) from None
        return out

    def load(self, saved: np.ndarray, b: int = 0) -> None:
        """Sequence b goes on from what `save` gave. UserError when that is of another model or state type."""
        try:
            self._core.load(b, _bytes(saved))
        except ValueError as e:
            raise UserError(str(e)) from None


class CpuEngine:
    """Implements `runtime.engine.Engine`.

    `threads` defaults to the cores at hand; `isa` forces an instruction set, else SLIMBA_CPU_ISA, else the best one is
    taken. `state_dtype` is float32, bfloat16 or int8 (a scale for each head and channel): what the recurrent state is
    stored in, by Mamba-2 after every 16 tokens, by Mamba-1 after each (docs/decisions.md). `activations` is float32 or
    int8, by default what the checkpoint says: with int8 the input of every matrix that is not all floats is rounded,
    one scale a token. All can be read back as attributes. UserError for settings that are not available and for a
    checkpoint whose tensors do not fit its spec.
    """

    name = "cpu"

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        threads: int | None = None,
        state_dtype: str = "float32",
        activations: str | None = None,
        isa: str | None = None,
    ) -> None:
        if state_dtype not in STATE_DTYPES:
            raise UserError(f"state dtype {state_dtype!r} is unknown, known are {', '.join(STATE_DTYPES)}")
        activations = activations or checkpoint.numerics.get("activations", "float32")
        if activations not in ACTIVATIONS:
            raise UserError(f"activations {activations!r} are unknown, known are {', '.join(ACTIVATIONS)}")
        if threads is not None and not 1 <= threads <= 1024:
            raise UserError(f"threads is {threads}, it must be between 1 and 1024")
        self.spec: ModelSpec = checkpoint.spec
        try:
            wanted = isa or os.environ.get("SLIMBA_CPU_ISA", "")
            config = _config(self.spec) | {"state_type": float(STATE_DTYPES.index(state_dtype))}
            config["int8_activations"] = float(activations == "int8")
            self._core = _core.Model(config, threads or default_threads(), wanted)
            _fill(self._core, checkpoint)
            self._core.finish()
        except ValueError as e:
            raise UserError(str(e)) from None
        self.isa: str = self._core.isa
        self.state_dtype = state_dtype
        self.activations = activations
        self.threads: int = self._core.threads

    def new_state(self, batch: int = 1) -> CpuState:
        if batch < 1:
            raise UserError(f"batch is {batch}, it must be at least 1")
        _need_memory(self._core.state_bytes(batch), f"the state of {batch} sequences", "use a smaller batch")
        return CpuState(self._core.new_state(batch))

    def forward(self, ids: np.ndarray, state: CpuState) -> np.ndarray:
        """int32 [B, L] -> float32 logits [B, L, V]."""
        ids = _ids(ids, state.batch)
        shape = (*ids.shape, self.spec.vocab_size)
        _need_memory(4 * int(np.prod(shape)), f"the logits {list(shape)}", "use shorter pieces, or prefill or nll")
        out = np.empty(shape, np.float32)
        self._call(self._core.forward, ids, state._core, out)
        return out

    def prefill(self, ids: np.ndarray, state: CpuState) -> np.ndarray:
        """int32 [B, L] -> float32 logits of the last position [B, V]."""
        ids = _ids(ids, state.batch)
        if ids.shape[1] == 0:
            raise UserError("the prompt is empty: prefill needs at least one token")
        out = np.empty((state.batch, self.spec.vocab_size), np.float32)
        self._call(self._core.prefill, ids, state._core, out)
        return out

    def nll(self, ids: np.ndarray, targets: np.ndarray, state: CpuState) -> np.ndarray:
        """int32 [B, L] twice -> float64 negative log-likelihoods [B, L] in nats."""
        ids, targets = _ids(ids, state.batch), _ids(targets, state.batch, "targets")
        if ids.shape != targets.shape:
            raise UserError(f"ids are {list(ids.shape)} but targets are {list(targets.shape)}")
        out = np.empty(ids.shape, np.float64)
        self._call(self._core.nll, ids, targets, state._core, out)
        return out

    def generate(
        self, prompt: np.ndarray, state: CpuState, params: SamplingParams, *, stride: int = 1
    ) -> Iterator[np.ndarray]:
        """int32 prompt [B, L] -> new ids in pieces [B, <= stride]; -1 pads a sequence that met a stop id.

        The state has consumed the prompt and every new id but the last of each sequence.
        """
        if stride < 1:
            raise UserError(f"stride is {stride}, it must be at least 1")
        if params.n_valid > self.spec.vocab_size:
            raise UserError(f"n_valid is {params.n_valid} but the model has {self.spec.vocab_size} ids")
        prompt = _ids(prompt, state.batch)
        logits = self.prefill(prompt, state)
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "n_valid")
        numbers = {name: float(getattr(params, name)) for name in names}
        run = self._call(
            _core.Generation, self._core, state._core, logits, prompt, numbers, params.seed, list(params.stop_ids),
            params.max_new_tokens,
        )  # fmt: skip
        while True:
            piece = np.full((state.batch, stride), -1, np.int32)
            made = self._call(run.next, piece)
            if made:
                yield piece[:, :made]
            if made < stride:
                return

    @staticmethod
    def _call(function: Any, *args: Any) -> Any:
        """What the core refuses (ids out of range, NaN logits, no memory) is a UserError."""
        try:
            return function(*args)
        except ValueError as e:
            raise UserError(str(e)) from None
        except MemoryError:
            raise UserError("there is not enough memory for this batch: use a smaller one") from None


def _config(spec: ModelSpec) -> dict[str, float]:
    """The numbers of a spec that the core needs."""
    mamba2 = spec.architecture == "mamba2"
    low, high = spec.dt_limit if mamba2 else (0.0, float("inf"))
    names = (
        "n_layer", "d_model", "d_inner", "d_state", "vocab_size", "d_conv", "norm_eps", "headdim", "n_groups",
        "norm_group_size", "gated_norm", "norm_before_gate", "d_has_hdim", "dt_rank",
    )  # fmt: skip
    return {name: float(getattr(spec, name)) for name in names} | {
        "mamba2": float(mamba2),
        "dt_low": low,
        "dt_high": high,
        "bcdt_norm": float(spec.bcdt_norm_eps is not None),
        "bcdt_norm_eps": spec.bcdt_norm_eps or 0.0,
    }


def _fill(core: Any, checkpoint: Checkpoint) -> None:
    """Hands every tensor to the core."""
    spec, scales = checkpoint.spec, scan_scales(checkpoint.spec, checkpoint.numerics)

    def matrix(name: str, short: str, layer: int, bias: np.ndarray | None = None) -> None:
        m = checkpoint.matrix(name)
        segments = []
        for i, s in enumerate(m.layout.segments):
            parts = m.segment_parts(i)
            data = parts["packed"] if "packed" in parts else parts["weight"]
            segments.append((s.format, s.rows, _bytes(data), _bytes(parts["scale"]) if "scale" in parts else None))
        lowrank = None
        if lr := m.layout.lowrank:
            keys = ("lowrank_a", "lowrank_a_scale", "lowrank_b", "lowrank_b_scale")
            lowrank = (lr.rank, lr.start, lr.stop, *(_bytes(m.arrays[k]) for k in keys))
        plane = None
        if p := m.layout.plane:
            index = np.ascontiguousarray(m.plane_columns(), np.int32) if p.cols < m.layout.cols else None
            signs, scale = _bytes(m.arrays["plane_packed"]), _bytes(m.arrays["plane_scale"])
            plane = (p.cols, p.start, p.stop, signs, scale, index)
        col_scale = m.arrays["col_scale"].astype(np.float32) if m.layout.col_scale else None
        step = float(m.arrays["input_scale"][0]) if m.layout.input_scale else 0.0
        shape = short, layer, m.layout.rows, m.layout.cols
        keep = m.layout.activations == "float32"
        core.set_matrix(*shape, segments, lowrank, plane, col_scale, bias, m.layout.hadamard, step, keep)

    def vector(name: str, short: str, layer: int) -> None:
        core.set_vector(short, layer, np.ascontiguousarray(checkpoint.vector(name).reshape(-1)))

    matrix("backbone.embeddings", "embeddings", 0)
    if not spec.tie_embeddings:
        matrix("lm_head", "lm_head", 0)
    vector("backbone.norm_f.weight", "norm_f", 0)
    for i in range(spec.n_layer):
        at = f"backbone.layers.{i}."
        for short in spec.layer_matrices():
            has_bias = spec.proj_bias and short in ("in_proj", "out_proj")
            matrix(f"{at}mixer.{short}", short, i, checkpoint.vector(f"{at}mixer.{short}.bias") if has_bias else None)
        vector(at + "norm.weight", "norm", i)
        taps = checkpoint.vector(at + "mixer.conv1d.weight")[:, 0, :].T  # [K, channels]
        core.set_vector("conv_weight", i, np.ascontiguousarray(taps).reshape(-1))
        if spec.conv_bias:
            vector(at + "mixer.conv1d.bias", "conv_bias", i)
        if (name := at + "mixer.conv1d.out_scale") in scales:
            vector(name, "conv_scale", i)
        # exp in float64: the decay is a power of it, so its error would grow with the length
        a = -np.exp(checkpoint.vector(at + "mixer.A_log").astype(np.float64))
        core.set_vector("a", i, np.ascontiguousarray(a.astype(np.float32).reshape(-1)))
        vector(at + "mixer.D", "d", i)
        if spec.architecture == "mamba2":
            vector(at + "mixer.dt_bias", "dt_bias", i)
            if spec.gated_norm:
                vector(at + "mixer.norm.weight", "gated_norm", i)
        else:
            vector(at + "mixer.dt_proj.bias", "dt_bias", i)
