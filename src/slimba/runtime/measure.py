"""Speed of an engine as a share of the machine's limit: bytes that must move, bandwidth, floor, measured time.

    model = random_model(named_spec("mamba2-1.3b"), "dfssm")
    check(model, threads=2)                              # the chosen kernels against the naive ones; UserError when red
    row = decode_speed(engine, traffic(model, "float32"), bandwidth(2), batch=1, new_tokens=64)

A decode step makes one token for each of B sequences. It has to read every weight once (the whole head, but of an
untied embedding only B rows), to read the recurrent states of B sequences (Mamba-2 writes them every 16 tokens and
reads a buffer of what came since, Mamba-1 writes them) and to read and write those of the convolution. Activations and
logits are not counted. The verb is `slimba bench`; run the tests: `pytest tests/runtime/test_measure.py`.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np

from slimba import _core
from slimba.checkpoints.checkpoint import Checkpoint
from slimba.errors import UserError
from slimba.formats import FORMATS, MatrixLayout
from slimba.formats.floats import DTYPES
from slimba.formats.presets import preset_dtypes, preset_layouts, preset_numerics
from slimba.models.spec import ModelSpec
from slimba.runtime.backends.cpu import CpuEngine
from slimba.runtime.engine import SamplingParams

__all__ = [
    "DecodeRow", "PrefillRow", "Traffic", "bandwidth", "check", "decode_speed", "machine", "prefill_speed",
    "random_model", "resident_bytes", "traffic",
]  # fmt: skip

STATE_BLOCK = 16  # tokens between two writings of a Mamba-2 state: kStateBlock in kernels.h
REPEATS = 5  # timed repeats after one warm-up; the median counts


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a decode step moves: once, and for each sequence of the batch."""

    weights: int
    per_sequence: int  # recurrent and convolution state, read and written, and the row of an untied embedding

    def step(self, batch: int) -> int:
        return self.weights + batch * self.per_sequence


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One batch size. Times are seconds for a step, that is one token for each of `batch` sequences."""

    batch: int
    bytes: int
    floor: float
    time: float
    times: list[float]
    share: float  # floor / time
    tokens_per_second: float

    def against(self, bandwidth: float) -> DecodeRow:
        """The same measurement held against another bandwidth (bytes a second)."""
        floor = self.bytes / bandwidth
        return replace(self, floor=floor, share=floor / self.time)


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """From an empty state to the first token, sampling included."""

    batch: int
    prompt_len: int
    time_to_first_token: float
    times: list[float]
    tokens_per_second: float


def random_model(spec: ModelSpec, format: str, *, rank: int | None = None, seed: int = 0) -> Checkpoint:
    """Random weights in the preset `format`, with scales that keep the activations near one."""
    rng = np.random.default_rng(seed)
    layouts = preset_layouts(spec, format, rank=rank)
    tensors: dict[str, np.ndarray] = {}
    for name, layout in layouts.items():
        tensors |= _random_matrix(rng, name, layout)
    dtypes = preset_dtypes(format)
    for name, (shape, kind) in spec.vectors().items():
        tensors[name] = _vector(rng, name, shape).astype(DTYPES[dtypes[kind]])
    return Checkpoint(spec, layouts, tensors, numerics=preset_numerics(format))


# Typical size of a random code, so that scale * code has the size 1 / sqrt(cols)
CODE_RMS = {"uint8": 4.6, "int8": 73.9}


def _random_matrix(rng: np.random.Generator, name: str, layout: MatrixLayout) -> dict[str, np.ndarray]:
    size = 1 / np.sqrt(layout.cols)
    out = {}
    for full, (dtype, shape) in layout.tensors(name).items():
        part = full[len(name) + 1 :]
        count = int(np.prod(shape))
        if dtype in CODE_RMS:
            out[full] = np.frombuffer(rng.bytes(count), np.uint8).reshape(shape).view(DTYPES[dtype])
        elif part == "plane_index":
            out[full] = np.sort(rng.permutation(layout.cols)[:count]).astype(np.int32)
        elif part.endswith("scale"):
            scale = size / _code_rms(layout, part)
            out[full] = np.full(shape, scale, np.float16)
        else:  # a float matrix; drawing each number of a large one would take longer than the benchmark
            block = (rng.standard_normal(1 << 20, dtype=np.float32) * size).astype(DTYPES[dtype])
            out[full] = np.resize(block, shape)
    return out


def _code_rms(layout: MatrixLayout, part: str) -> float:
    if part == "col_scale":
        return float(1 / np.sqrt(layout.cols))  # the scale itself is 1
    if part == "lowrank_a_scale":
        return CODE_RMS["int8"] * 8  # a small correction
    if part == "lowrank_b_scale":
        return CODE_RMS["int8"]
    if part == "plane_scale":
        return 2.0  # half the first plane's
    format = layout.segments[int(part.split(".")[0])].format
    return {"sign": 1.0, "int4": CODE_RMS["uint8"]}.get(format, CODE_RMS["int8"])


def _vector(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("A_log"):
        return np.log(rng.uniform(1, 16, shape))
    if name.endswith(("dt_bias", "dt_proj.bias")):
        return rng.uniform(-5, -2, shape)
    if name.endswith(("norm.weight", "norm_f.weight", ".D")):
        return np.ones(shape)
    return rng.standard_normal(shape) * (0.5 if name.endswith("conv1d.weight") else 0.0)


def traffic(checkpoint: Checkpoint, state_dtype: str = "float32") -> Traffic:
    """What a decode step must move, from the sizes of the tensors and of a state in `state_dtype`."""
    spec = checkpoint.spec
    weights = checkpoint.nbytes()
    row = 0
    if not spec.tie_embeddings:
        table = checkpoint.layouts["backbone.embeddings"].nbytes
        weights -= table
        row = table // spec.vocab_size
    entries = spec.d_inner * spec.d_state
    ssm = {"float32": 4 * entries, "bfloat16": 2 * entries, "int8": entries + 4 * spec.d_inner}[state_dtype]
    moved = 2 * (spec.d_conv - 1) * spec.d_conv_channels * 4
    if spec.architecture == "mamba2":  # read each time, written every STATE_BLOCK tokens; the buffer is half full
        token = (spec.d_inner + spec.n_groups * spec.d_state) * (
            4 if state_dtype == "float32" else 2
        ) + 4 * spec.n_heads
        moved += ssm + ssm // STATE_BLOCK + (STATE_BLOCK - 1) * token // 2 + token
    else:
        moved += 2 * ssm
    return Traffic(weights, spec.n_layer * moved + row)


def bandwidth(threads: int, nbytes: int = 1 << 29) -> float:
    """Bytes a second that `threads` threads read from memory: the fastest of 30 passes over 512 MiB."""
    return float(nbytes / min(_core.kernels.read_seconds(nbytes, threads, 30)))


def check(checkpoint: Checkpoint, threads: int, state_dtype: str = "float32", activations: str = "float32") -> float:
    """The engine's kernels against the portable naive ones on this very model; the largest difference of the logits
    relative to the largest logit, with float32 activations.

    Eight tokens: three one by one (decode) and five at once (prefill). UserError when they differ by more than 1e-3
    (5e-3 with a rounded state), or when logits are not finite: no speed is worth printing then. With int8 activations
    logits cannot be compared so (a code flips where two float32 sums differ in the last bit); there, products with the
    first layer's and the head's rows must equal the naive ones, and tokens one by one the same tokens at once, bit for
    bit.
    """
    ids = np.random.default_rng(0).integers(0, checkpoint.spec.vocab_size, (1, 8)).astype(np.int32)

    def pieces(engine: CpuEngine) -> np.ndarray:
        state = engine.new_state()
        return np.concatenate([engine.forward(ids[:, a:b], state) for a, b in ((0, 1), (1, 2), (2, 3), (3, 8))], axis=1)

    engine = CpuEngine(checkpoint, threads=threads, state_dtype=state_dtype, activations="float32")
    naive = CpuEngine(checkpoint, threads=threads, state_dtype=state_dtype, activations="float32", isa="portable")
    want = naive.forward(ids, naive.new_state())
    worst = float(np.abs(pieces(engine) - want).max() / np.abs(want).max())
    remedy = "no speed is printed for wrong results; SLIMBA_CPU_ISA=portable runs the naive ones"
    allowed = 1e-3 if state_dtype == "float32" else 5e-3
    if not worst <= allowed:
        raise UserError(
            f"the {engine.isa} kernels differ from the naive ones by {worst:.2g} of the largest logit on this model "
            f"({allowed} is allowed): {remedy}"
        )
    if activations == "int8":
        rounded = CpuEngine(checkpoint, threads=threads, state_dtype=state_dtype, activations="int8")
        same = np.array_equal(pieces(rounded), rounded.forward(ids, rounded.new_state()))
        if not same or not all(_exact(checkpoint, name, engine.isa) for name in _first_matrices(checkpoint)):
            raise UserError(f"the {engine.isa} kernels for int8 activations differ from the naive ones: {remedy}")
    return worst


def _first_matrices(checkpoint: Checkpoint) -> list[str]:
    first = "backbone.layers.0.mixer."
    return [first + short for short in checkpoint.spec.layer_matrices()] + [checkpoint.head]


def _exact(checkpoint: Checkpoint, name: str, isa: str) -> bool:
    """Whether every segment of a matrix times three int8 tokens equals the portable result, for few and many tokens."""
    matrix = checkpoint.matrix(name)
    x = np.random.default_rng(1).standard_normal((3, matrix.layout.cols)).astype(np.float32)
    for i, segment in enumerate(matrix.layout.segments):
        parts = matrix.segment_parts(i)
        if "scale" not in parts:
            continue
        data, scale = (np.ascontiguousarray(parts[k]).reshape(-1).view(np.uint8) for k in _data_and_scale(parts))
        out = []
        for kernels, many in (("portable", False), (isa, False), (isa, True)):
            y = np.full((3, segment.rows), np.nan, np.float32)
            order = list(FORMATS).index(segment.format)  # as in kernels.h
            _core.kernels.quant_matmul(kernels, order, data, scale, x, y, 0, segment.rows, False, many)
            out.append(y)
        if not (np.array_equal(out[0], out[1]) and np.array_equal(out[0], out[2])):
            return False
    return True


def _data_and_scale(parts: dict[str, np.ndarray]) -> tuple[str, str]:
    return ("packed" if "packed" in parts else "weight"), "scale"


def decode_speed(engine: CpuEngine, moved: Traffic, bandwidth: float, batch: int, new_tokens: int) -> DecodeRow:
    """Median time of a decode step, sampling included, over REPEATS pieces of new_tokens / REPEATS tokens.

    Rounded up so that Mamba-2 writes its state as often in each piece.
    """
    block = STATE_BLOCK if engine.spec.architecture == "mamba2" else 1
    stride = -(-new_tokens // (REPEATS * block)) * block
    prompt = np.zeros((batch, 1), np.int32)
    params = SamplingParams(max_new_tokens=stride * (REPEATS + 1))
    pieces = engine.generate(prompt, engine.new_state(batch), params, stride=stride)
    next(pieces)  # warm-up
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        next(pieces)
        times.append((time.perf_counter() - start) / stride)
    middle = statistics.median(times)
    floor = moved.step(batch) / bandwidth
    return DecodeRow(batch, moved.step(batch), floor, middle, times, floor / middle, batch / middle)


def prefill_speed(engine: CpuEngine, batch: int, prompt_len: int) -> PrefillRow:
    """Median time from an empty state to the first token over REPEATS prompts of `prompt_len` tokens."""
    prompt = np.random.default_rng(1).integers(0, engine.spec.vocab_size, (batch, prompt_len)).astype(np.int32)
    times = []
    state = engine.new_state(batch)
    for _ in range(REPEATS + 1):
        state.reset()
        start = time.perf_counter()
        next(engine.generate(prompt, state, SamplingParams(max_new_tokens=1)))
        times.append(time.perf_counter() - start)
    middle = statistics.median(times[1:])
    return PrefillRow(batch, prompt_len, middle, times[1:], batch * prompt_len / middle)


def resident_bytes() -> int | None:
    """Memory of this process now (mapped files that were touched included), or None where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = [line for line in status.read_text().splitlines() if line.startswith("VmRSS:")]
    return int(lines[0].split()[1]) * 1024


def machine(threads: int) -> dict[str, object]:
    """What a figure has to say about where it was measured."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "isa": _core.isa(os.environ.get("SLIMBA_CPU_ISA", "")),
        "load_average": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "slimba": _version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version() -> str:
    try:
        return metadata.version("slimba")
    except metadata.PackageNotFoundError:
        return "source tree"
