"""Speed of the CUDA engine as a share of the GPU's limit; the GPU twin of runtime/measure.py.

    record = gpu_record(checkpoint, batches=[1, 8], prompt_len=512, new_tokens=64, numerics=numerics)

The engine is compared first with the torch reference on the same GPU, at every batch and with the state type that is
measured; UserError when they differ, and nothing is timed. `slimba bench --backend cuda` prints the record.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.errors import UserError
from slimba.runtime.backends.cuda import CudaEngine
from slimba.runtime.backends.reference import ReferenceEngine
from slimba.runtime.measure import REPEATS, DecodeRow, PrefillRow, machine, traffic

__all__ = ["gpu_check", "gpu_record"]

STEPS, PROMPT = 4, 24  # tokens of the comparison
# Largest difference of the logits, relative to the largest logit: steps take 23-bit activations, prompts float16
TOLERANCE = {"steps": 2e-3, "prompt": 2e-2}


def gpu_record(
    checkpoint: Checkpoint, batches: list[int], prompt_len: int, new_tokens: int, numerics: dict[str, str]
) -> dict[str, Any]:
    """Everything that is printed, JSON-ready: seconds, bytes, tokens a second. numerics: `activations` and `state`."""
    engine = CudaEngine(checkpoint, state_dtype=numerics["state"], activations=numerics["activations"])
    difference = gpu_check(engine, checkpoint, batches)
    torch.cuda.empty_cache()
    limit = bandwidth()
    moved = traffic(checkpoint, numerics["state"])
    torch.cuda.reset_peak_memory_stats()
    decode, prefill, products = [], [], {}
    for batch in batches:
        products[str(batch)] = engine.arithmetic(batch)
        times = decode_times(engine, batch, new_tokens)
        middle, floor = statistics.median(times), moved.step(batch) / limit
        decode.append(DecodeRow(batch, moved.step(batch), floor, middle, times, floor / middle, batch / middle))
        times = prefill_times(engine, batch, prompt_len)
        middle = statistics.median(times)
        prefill.append(PrefillRow(batch, prompt_len, middle, times, batch * prompt_len / middle))
    about = torch.cuda.get_device_properties(0)
    return {
        "machine": machine(1) | {"gpu": about.name, "torch": torch.__version__, "cuda": torch.version.cuda},
        "bandwidth": limit,
        "difference_to_reference": difference,
        "weight_bytes": checkpoint.nbytes(),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
        "numerics": numerics,
        "products": products | {"prompt": "float16"},
        "decode": decode,
        "prefill": prefill,
    }


def gpu_check(engine: CudaEngine, checkpoint: Checkpoint, batches: list[int]) -> dict[str, float]:
    """Largest relative differences of steps and prompts to the reference, and what is allowed. UserError above it.

    Which int8 code an entry of the state takes, a difference of one part in a thousand before may decide. So with
    float16 products as much is allowed as int8 states change the reference's own logits, where that is more.
    """
    device = str(engine.gpu.device)
    reference = ReferenceEngine(checkpoint, state_dtype=engine.state_dtype, activations="float32", device=device)
    precise = (
        ReferenceEngine(checkpoint, activations="float32", device=device) if engine.state_dtype == "int8" else None
    )
    worst = {"steps": 0.0, "prompt": 0.0, "prompt allowed": TOLERANCE["prompt"]}
    rng = np.random.default_rng(0)
    for batch in batches:
        ids = rng.integers(0, engine.spec.vocab_size, (batch, PROMPT)).astype(np.int32)
        theirs, ours = reference.new_state(batch), engine.new_state(batch)
        stepped = [(engine.step(ids[:, t], ours).cpu().numpy().copy()) for t in range(STEPS)]
        want = [reference.prefill(ids[:, t : t + 1], theirs) for t in range(STEPS)]
        after = reference.prefill(ids, reference.new_state(batch))
        if precise is not None:
            rounding = _difference(after, precise.prefill(ids, precise.new_state(batch)))
            worst["prompt allowed"] = max(worst["prompt allowed"], rounding)
        exact = engine.arithmetic(batch) != "float16"
        _compare(worst, "steps" if exact else "prompt", np.stack(stepped), np.stack(want), batch)
        _compare(worst, "prompt", engine.prefill(ids, engine.new_state(batch)), after, batch)
    return worst


def _difference(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def _compare(worst: dict[str, float], what: str, got: np.ndarray, want: np.ndarray, batch: int) -> None:
    difference, allowed = _difference(got, want), worst["prompt allowed"] if what == "prompt" else TOLERANCE[what]
    if not difference <= allowed:
        raise UserError(
            f"backend cuda differs from the reference by {difference:.2g} of the largest logit ({what}, batch {batch}; "
            f"{allowed:.2g} is allowed): no speed is printed for wrong results"
        )
    worst[what] = max(worst[what], difference)


def bandwidth(nbytes: int = 1 << 30) -> float:
    """Bytes a second that a copy reads and writes: the fastest of ten."""
    a = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * nbytes / min(_seconds(lambda: b.copy_(a)) for _ in range(10))


def decode_times(engine: CudaEngine, batch: int, new_tokens: int) -> list[float]:
    """Seconds of a step, choice of the token included, as the mean of each of REPEATS pieces."""
    state = engine.new_state(batch)
    step = engine.stepper(state)
    step.ids.zero_()
    stride = min(max(1, new_tokens // REPEATS), step.ROOM)

    def piece() -> None:
        step.count.zero_()
        engine.run_ahead(step, stride)

    for _ in range(2):  # warm-up, and the CUDA graphs
        piece()
    return [_seconds(piece) / stride for _ in range(REPEATS)]


def prefill_times(engine: CudaEngine, batch: int, prompt_len: int) -> list[float]:
    """Seconds from a prompt to the logits after it, on the host."""
    prompt = np.random.default_rng(1).integers(0, engine.spec.vocab_size, (batch, prompt_len)).astype(np.int32)
    times = []
    state = engine.new_state(batch)
    for _ in range(REPEATS + 1):
        state.reset()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        engine.prefill(prompt, state)
        times.append(time.perf_counter() - begun)
    return times[1:]


def _seconds(work: Any) -> float:
    """Device time of some work, by events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
