"""load(): from a name to a model that runs, with the backend chosen and bad cases caught. `cpu` needs no torch.

    model = load("slimba-demo", backend="auto", threads=2, state_dtype="fp32")

Run the tests: `pytest tests/runtime/test_load.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import cast

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.data.tokenizer import Tokenizer
from slimba.errors import UserError
from slimba.runtime.api import LoadedModel
from slimba.runtime.engine import Engine

__all__ = ["ACTIVATIONS", "BACKENDS", "STATE_DTYPES", "load", "resolve_activations", "resolve_state_dtype"]

STATE_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
ACTIVATIONS = ("float32", "int8")


def _cpu(checkpoint: Checkpoint, threads: int | None, state_dtype: str, activations: str) -> Engine:
    if not _has_core():
        raise UserError("backend cpu needs the compiled core, which this installation lacks; reinstall slimba")
    from slimba.runtime.backends.cpu import CpuEngine

    # a cast, because an engine takes the states that it made and no others
    return cast("Engine", CpuEngine(checkpoint, threads=threads, state_dtype=state_dtype, activations=activations))


def _reference(checkpoint: Checkpoint, threads: int | None, state_dtype: str, activations: str) -> Engine:
    from slimba.runtime.backends.reference import ReferenceEngine

    engine = ReferenceEngine(checkpoint, threads=threads, state_dtype=state_dtype, activations=activations)
    return cast("Engine", engine)


def _cuda(checkpoint: Checkpoint, threads: int | None, state_dtype: str, activations: str) -> Engine:
    from slimba.runtime.backends.cuda import CudaEngine

    return cast("Engine", CudaEngine(checkpoint, state_dtype=state_dtype, activations=activations))


def _gpu_or_cpu(checkpoint: Checkpoint, threads: int | None, state_dtype: str, activations: str) -> Engine:
    """The GPU where there is one; when it cannot be used, the CPU and one line that says why."""
    try:
        return _cuda(checkpoint, threads, state_dtype, activations)
    except UserError as e:
        warnings.warn(f"the GPU is not used, the CPU engine runs instead: {e}", stacklevel=2)
    return _cpu(checkpoint, threads, state_dtype, activations)


Maker = Callable[[Checkpoint, int | None, str, str], Engine]
BACKENDS: dict[str, Maker] = {"cpu": _cpu, "cuda": _cuda, "reference": _reference}


def load(
    model: str | Path | Checkpoint,
    *,
    backend: str = "auto",
    threads: int | None = None,
    state_dtype: str | None = None,
    activations: str | None = None,
    tokenizer: str | Path | None = None,
    verify: bool = True,
) -> LoadedModel:
    """Open a model and make it ready to run.

    model: a directory (packed, transformers or mamba_ssm layout), a hub id, a bundled name, or an opened Checkpoint.
    backend: `cpu`, `cuda` (torch), `reference` (torch), or `auto`: cuda where an NVIDIA GPU can, else cpu. threads:
    None for all cores. state_dtype: fp32, bf16 or int8 where the backend has it; None for what the checkpoint says.
    activations: float32, or int8: the input of every matrix that is not all floats is rounded, one scale a token; None
    for what the checkpoint says. tokenizer: a `tokenizer.json` for a checkpoint without one. verify: check the
    checksums of a packed directory.
    Raises UserError for an unknown backend or type, a damaged or unknown model, and too little memory.
    """
    make = _choose(backend)
    if threads is not None and threads < 1:
        raise UserError(f"--threads is {threads}, it must be at least 1")
    if not isinstance(model, Checkpoint):
        from slimba.checkpoints.reader import open_checkpoint

        model = open_checkpoint(model, tokenizer=tokenizer, verify=verify)
    elif tokenizer is not None:
        model.tokenizer_file = Path(tokenizer)
    state = resolve_state_dtype(state_dtype, model)
    inputs = resolve_activations(activations, model)
    found = Tokenizer.from_file(model.tokenizer_file) if model.tokenizer_file else None
    _check_memory(model, needs_float32=make is _reference)
    try:
        engine = make(model, threads, state, inputs)
    except MemoryError:
        raise UserError(f"{model.path or 'the model'} does not fit this machine's memory") from None
    return LoadedModel(engine, model, found, state, inputs)


def _choose(backend: str) -> Maker:
    if backend == "auto":
        if _has_core():
            return _gpu_or_cpu if _has_gpu() else _cpu
        warnings.warn(
            "the compiled core is missing, so the slow reference backend runs; reinstall slimba", stacklevel=3
        )
        return _reference
    if backend not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise UserError(f"backend {backend!r} is not available in this version, known are {known}")
    return BACKENDS[backend]


def _has_gpu() -> bool:
    """Whether the NVIDIA driver shows a device; torch, which is slow to import, is asked only then."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _has_core() -> bool:
    try:
        import slimba._core  # noqa: F401
    except ImportError:
        return False
    return True


def resolve_state_dtype(name: str | None, checkpoint: Checkpoint) -> str:
    """The long name of `name` (fp32, bf16, int8 or a long name), or of what the checkpoint says where it is None."""
    name = name or checkpoint.numerics.get("state", "float32")
    if name in STATE_DTYPES.values():
        return name
    if name not in STATE_DTYPES:
        raise UserError(f"unknown state type {name!r}, known are {', '.join(STATE_DTYPES)}")
    return STATE_DTYPES[name]


def resolve_activations(name: str | None, checkpoint: Checkpoint) -> str:
    """float32 or int8: `name`, or what the checkpoint says where it is None."""
    name = name or checkpoint.numerics.get("activations", "float32")
    if name not in ACTIVATIONS:
        raise UserError(f"unknown activation type {name!r}, known are {', '.join(ACTIVATIONS)}")
    return name


def _check_memory(checkpoint: Checkpoint, *, needs_float32: bool) -> None:
    need = 4 * checkpoint.spec.n_params() if needs_float32 else checkpoint.nbytes()
    free = available_memory()
    if free is not None and need > free:
        raise UserError(
            f"{checkpoint.path or 'the model'} needs about {need / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are "
            "free; close other programs or use a smaller model"
        )


def available_memory() -> int | None:
    """Bytes that can be had without swapping, at most the container's limit; None where the system does not say."""
    found: list[int] = []
    try:
        with open("/proc/meminfo") as f:
            found += [int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable:")]
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # another system, no container, or the limit is the word `max`
        pass
    return min(found, default=None)
