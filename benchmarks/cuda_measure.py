"""Measurements of the CUDA engine for cuda_check.py, which is what one runs; and how both report.

A figure is printed as it comes and kept in `results`.
"""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.runtime import measure
from slimba.runtime.backends.cuda import AHEAD, CudaEngine, steps_of
from slimba.runtime.backends.cuda_step import FusedStep, Step

results: dict[str, Any] = {"checks": {}, "figures": {}}
started = time.perf_counter()


def elapsed() -> float:
    return time.perf_counter() - started


def check(name: str, work: Callable[[], Any]) -> Any:
    """Runs one check; its value is printed, an exception is a failure with its last lines."""
    begun = time.perf_counter()
    try:
        value = work()
        results["checks"][name] = {"ok": True, "value": value}
        print(f"ok   {name}: {value}  [{time.perf_counter() - begun:.1f} s]", flush=True)
        return value
    except Exception as e:
        lines = traceback.format_exc().strip().splitlines()
        results["checks"][name] = {"ok": False, "error": str(e)[:2000], "traceback": lines[-12:]}
        print(f"FAIL {name}: {type(e).__name__}: {str(e)[:700]}", flush=True)
        print("     " + "\n     ".join(lines[-7:-1])[:900], flush=True)
        return None


def figure(name: str, value: Any) -> None:
    results["figures"][name] = value
    print(f"     {name}: {value}", flush=True)


def seconds(run: Callable[[], None], repeats: int = 20, rounds: int = 5) -> float:
    """Median over rounds of the mean of `repeats` runs, by events."""
    run()
    torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / repeats)
    return sorted(times)[rounds // 2]


def bandwidth() -> str:
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    speed = 2 * a.numel() / seconds(lambda: b.copy_(a), 5)
    results["figures"]["copy_bandwidth"] = speed
    return f"copy {speed / 1e12:.2f} TB/s"


def graph_of(engine: CudaEngine, work: Callable[[], None]) -> Callable[[], None]:
    work()
    return engine.gpu.record(work)


def decode_variants(engine: CudaEngine, checkpoint: Checkpoint, label: str, state_dtype: str) -> str:
    """Batch 1: dependent and ordinary launches, whose logits must agree, and eight steps in one graph, as `generate`
    has them."""
    state = engine.new_state()
    moved = measure.traffic(checkpoint, state_dtype).step(1)
    floor = moved / results["figures"].get("copy_bandwidth", 4.0e12)
    times, logits, texts = {}, {}, {}
    variants: dict[str, tuple[Step, bool]] = {}
    step = engine.stepper(state)
    variants["ordinary"] = step, False
    variants["overlapped"] = step, True
    for name, (s, overlap) in variants.items():
        try:
            state.reset()
            s.point_to(state)
            s.ids.fill_(5)
            for _ in range(3):
                s.work(choose=True, overlap=overlap)  # type: ignore[call-arg]
            run = engine.gpu.record(functools.partial(s.work, choose=True, overlap=overlap))
            state.reset()
            s.ids.fill_(5)
            s.count.zero_()
            for _ in range(24):
                run()
            logits[name], texts[name] = s.logits.cpu().numpy().copy(), s.chosen[0, :24].tolist()
            times[name] = seconds(run, 50)
            s.count.zero_()
        except Exception as e:
            print(f"     {label} {name}: FAILED {type(e).__name__}: {str(e)[:300]}", flush=True)
    for name, value in times.items():
        figure(
            f"decode 1 {label} {state_dtype} {name}",
            f"{1 / value:.0f} tok/s, {value * 1e6:.1f} us, share of the limit {floor / value:.2f}",
        )
    step.count.zero_()
    eight = engine.gpu.record(lambda: steps_of(step))
    value = seconds(eight, 6, 7) / AHEAD
    step.count.zero_()
    figure(
        f"decode 1 {label} {state_dtype}, {AHEAD} steps a graph",
        f"{1 / value:.0f} tok/s, {value * 1e6:.1f} us, share of the limit {floor / value:.2f}, {type(step).__name__}",
    )
    base = logits["ordinary"]
    assert all(t == texts["ordinary"] for t in texts.values()), f"24 tokens differ: {texts}"
    return ", ".join(f"{k} differs {np.abs(v - base).max():.2g}" for k, v in logits.items()) + (
        f"; logits {np.abs(base).max():.3g} at most; {moved / 1e6:.0f} MB a token"
    )


def decode_parts(engine: CudaEngine, state_dtype: str) -> str:
    """The time of each kernel of a step: graphs of one kind of kernel over all layers."""
    step = FusedStep(engine.model, engine.gpu, 1, state_dtype)
    state = engine.new_state()
    step.point_to(state)
    n, gpu, layers = engine.spec.n_layer, engine.gpu, engine.model.layers
    kinds: dict[str, tuple[int, Callable[[bool], None]]] = {
        "in_proj": (n, lambda o: [step.product(w.matrices["in_proj"], 2 * i, 1, o)
                                   for i, w in enumerate(layers)] and None),
        "recur": (n, lambda o: [step.recur(i, o) for i in range(n)] and None),
        "out_proj": (n, lambda o: [step.product(w.matrices["out_proj"], 2 * i + 1, 1, o)
                                    for i, w in enumerate(layers)] and None),
        "head": (1, step.head),
        "head and choice": (1, lambda o: step.head(o, choose=True)),
        "argmax": (1, lambda o: step.after(True, o)),
        "embed x48": (48, lambda o: [gpu.launch("slimba_embed", (gpu.blocks,), step.embed, overlap=o)
                                      for _ in range(48)] and None),
    }  # fmt: skip
    parts = []
    for name, (count, launch) in kinds.items():
        each = []
        for overlap in (False, True):
            run = graph_of(engine, lambda launch=launch, overlap=overlap: launch(overlap))
            each.append(seconds(run, 20, 3) / count * 1e6)
            step.count.zero_()
        parts.append(f"{name} {each[0]:.2f} ({each[1]:.2f} overlapped)")
    value = "us each: " + ", ".join(parts)
    results["figures"][f"parts {state_dtype}"] = value
    return value


def drop(value: Any) -> None:
    """For work that gives a value nobody wants."""


def kernel_times(name: str, work: Callable[[], None], most: int) -> float:
    """Device time of one run of `work` by kernel, in milliseconds: printed, kept, and summed."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    torch.cuda.synchronize()
    with torch_profile(activities=[ProfilerActivity.CUDA]) as p:
        work()
        torch.cuda.synchronize()
    rows = [(e.key[:60], e.count, e.self_device_time_total / 1e3) for e in p.key_averages() if e.self_device_time_total]
    rows.sort(key=lambda r: -r[2])
    for key, count, ms in rows[:most]:
        print(f"       {ms:9.3f} ms {count:5d} x {1e3 * ms / count:8.2f} us {key}")
    results["figures"][f"profile {name}"] = rows[:20]
    return sum(r[2] for r in rows)


def batched(engine: CudaEngine, checkpoint: Checkpoint, label: str, state_dtype: str, batch: int) -> str:
    state = engine.new_state(batch)
    step = engine.stepper(state)
    step.ids.fill_(5)
    engine.run(step, choose=True)
    finite = bool(torch.isfinite(step.logits).all())
    same = bool((step.logits == step.logits[:1]).all())
    value = seconds(lambda: engine.run(step, choose=True), 16, 3)  # a state is stored once in 16 steps
    step.count.zero_()
    floor = measure.traffic(checkpoint, state_dtype).step(batch) / results["figures"].get("copy_bandwidth", 4.0e12)
    how = type(step).__name__
    text = f"{batch / value:.0f} tok/s, {value * 1e3:.3f} ms, share of the limit {floor / value:.2f}, {how}"
    figure(f"decode {batch} {label} {state_dtype}", text)
    kernel_times(f"decode {batch} {state_dtype}", lambda: step.work(choose=True), 9)
    assert finite, "logits are not finite"
    return f"finite, rows {'equal' if same else 'differ'}"


def prefill(engine: CudaEngine, batch: int, length: int) -> str:
    ids = np.random.default_rng(1).integers(0, engine.spec.vocab_size, (batch, length)).astype(np.int32)
    state = engine.new_state(batch)
    times = []
    for _ in range(4):
        state.reset()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        logits = engine.prefill(ids, state)
        times.append(time.perf_counter() - begun)
    value = sorted(times[1:])[1]
    figure(f"prefill {batch}x{length}", f"{batch * length / value:.0f} tok/s, {value * 1e3:.1f} ms")
    assert np.isfinite(logits).all()
    return "finite"


def profile(engine: CudaEngine, batch: int, length: int) -> str:
    ids = np.random.default_rng(1).integers(0, engine.spec.vocab_size, (batch, length)).astype(np.int32)
    state = engine.new_state(batch)
    whole = kernel_times(f"prefill {batch}x{length}", lambda: drop(engine.prefill(ids, state)), 14)
    return f"{whole:.2f} ms on the device"
