"""Speed of the CUDA engine as a share of the GPU's limit; the GPU twin of runtime/measure.py.

    record = gpu_record(checkpoint, batches=[1, 8], prompt_len=512, new_tokens=64, numerics=numerics)

The engine is compared first with the torch reference on the same GPU, at every batch and with the state type that is
measured; UserError when they differ, and nothing is timed. `slimba bench --backend cuda` prints the record.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
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
TOLERANCE = {"steps": 2e-3, "prompt": 2e-2, "continued": 2e-2}
# What sums in another order and float16 products do, relative; by as much the reference's embeddings are shaken to see
# how far its own logits go (`shake`)
SHAKEN = {"steps": 2.0**-20, "prompt": 2.0**-11, "continued": 2.0**-11}


def gpu_record(
    checkpoint: Checkpoint,
    batches: list[int],
    prompt_len: int,
    new_tokens: int,
    numerics: dict[str, str],
    difference: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Everything that is printed, JSON-ready: seconds, bytes, tokens a second. numerics: `activations` and `state`.

    difference: what `gpu_check` found, where the caller has compared a model of these kernels already.
    """
    engine = CudaEngine(checkpoint, state_dtype=numerics["state"], activations=numerics["activations"])
    if difference is None:
        difference = gpu_check(engine, checkpoint, batches)
    torch.cuda.empty_cache()
    limit = bandwidth()
    moved = traffic(checkpoint, numerics["state"])
    torch.cuda.reset_peak_memory_stats()
    decode, prefill, products = [], [], {}
    for batch in batches:
        times = decode_times(engine, batch, new_tokens)
        products[str(batch)] = engine.arithmetic(batch)
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

    "steps" are the first tokens one by one, "prompt" the last of a first prompt, "continued" the token after it, which
    sees the state as it was stored. Within a piece of a prompt the engine's state is float32 whatever it is stored in
    (`Bulk.residual`), so float32 states are what its prompts are held against. An int8 state may move the token after
    it as far from them as it moves the reference's own logits. With int8 activations which code an entry takes may be
    decided by a difference in the last place, and every code that flips moves what follows: a random model of 48
    layers goes a third of the largest logit that way. Then twice as much is allowed as the reference's own logits
    move when its input is shaken by what the arithmetic differs by, and the engine is also compared without int8.
    """
    device, worst = str(engine.gpu.device), {k: 0.0 for k in TOLERANCE}
    kinds = [(engine.state_dtype, engine.activations)]
    if "int8" in kinds[0]:
        kinds.append(("float32", "float32"))
    references = [ReferenceEngine(checkpoint, state_dtype=s, activations=a, device=device) for s, a in kinds]
    if engine.activations == "int8":
        plain = CudaEngine(checkpoint, activations="float32", gpu=engine.gpu)
        worst |= {f"{k}, float32": v for k, v in _differences(plain, references[1:], batches).items()}
        del plain
    return worst | _differences(engine, references, batches)


def _differences(engine: CudaEngine, references: list[ReferenceEngine], batches: list[int]) -> dict[str, float]:
    """`gpu_check` against the first of `references`; a second one, without int8, shows what that moves."""
    worst = {k: 0.0 for k in TOLERANCE} | {f"{k} allowed": v for k, v in TOLERANCE.items()}
    rng, rounds = np.random.default_rng(0), engine.activations == "int8"
    first, last = references[0], references[-1]
    for batch in batches:
        ids = rng.integers(0, engine.spec.vocab_size, (batch, PROMPT)).astype(np.int32)
        ours = engine.new_state(batch)
        stepped = np.stack([(engine.step(ids[:, t], ours).cpu().numpy().copy()) for t in range(STEPS)])
        ours.reset()
        prompt, more = engine.prefill(ids[:, :-1], ours), engine.step(ids[:, -1], ours).cpu().numpy().copy()
        what = "steps" if engine.arithmetic(batch) != "float16" else "prompt"
        shaken = shake(first, lambda: _steps_of(first, ids), SHAKEN[what]) if rounds else None  # noqa: B023
        _compare(worst, what, stepped, _steps_of(first, ids), shaken, batch, 2)
        right = first if rounds else last
        wanted = _continued(right, ids)
        moved = [None, _continued(first, ids)[1] if first is not right else None]
        if rounds:
            moved = shake(first, lambda: _continued(first, ids), SHAKEN["prompt"])  # noqa: B023
        for name, got, want, other in zip(("prompt", "continued"), (prompt, more), wanted, moved, strict=True):
            _compare(worst, name, got, want, other, batch, 2 if rounds else 1)
    return worst


def _steps_of(reference: ReferenceEngine, ids: np.ndarray) -> np.ndarray:
    """Logits of the first STEPS tokens [STEPS, B, V]."""
    state = reference.new_state(len(ids))
    return np.stack([reference.prefill(ids[:, t : t + 1], state) for t in range(STEPS)])


def _continued(reference: ReferenceEngine, ids: np.ndarray) -> list[np.ndarray]:
    """Logits after all tokens but the last, and after that one."""
    state = reference.new_state(len(ids))
    return [reference.prefill(ids[:, :-1], state), reference.prefill(ids[:, -1:], state)]


def shake(reference: ReferenceEngine, work: Callable[[], Any], by: float) -> Any:
    """`work` while every number that enters the first layer is off by up to `by` of itself."""
    noise = torch.Generator().manual_seed(0)

    def shake(_: object, args: object, out: torch.Tensor) -> torch.Tensor:
        return out * (1 + by * (2 * torch.rand(out.shape, generator=noise) - 1).to(out))

    handle = reference.model.backbone.embeddings.register_forward_hook(shake)
    try:
        return work()
    finally:
        handle.remove()


def _difference(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def _compare(
    worst: dict[str, float],
    what: str,
    got: np.ndarray,
    want: np.ndarray,
    other: np.ndarray | None,
    batch: int,
    times: int,
) -> None:
    """other: where the reference itself goes, by int8 states or shaken; `times` as far is allowed (`gpu_check`)."""
    if other is not None:
        allowed = TOLERANCE[what] + times * _difference(other, want)
        worst[f"{what} allowed"] = max(worst[f"{what} allowed"], allowed)
    difference, allowed = _difference(got, want), worst[f"{what} allowed"]
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
