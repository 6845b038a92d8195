"""Which kernels of a decode step are fastest: all configurations in one process, at the 1.3B shape, random weights.

    python benchmarks/cuda_variants.py --json variants.json [--seconds 120]

Batch 1: products by dot.cuh with 8 or 16 warps or by older kernels, recurrence by quick.cuh or step.cuh, the kernel
after released before or after the wait. Batches with an int8 state: kernels for any shape or made for the model,
weights that stay in registers (still.cu), matrices expanded for cuBLAS. The first configuration of a batch is what the
others' logits are compared with.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import cuda_check  # noqa: F401  sets the paths up
import numpy as np
import torch
from cuda_measure import bandwidth, batched, check, decode_parts, elapsed, figure, results, seconds

from slimba.models.configs import named_spec
from slimba.runtime import measure
from slimba.runtime.backends import cuda_lean
from slimba.runtime.backends.cuda import CudaEngine
from slimba.runtime.backends.cuda_bake import Baked
from slimba.runtime.backends.cuda_batch import BatchStep
from slimba.runtime.backends.cuda_broad_step import BroadStep
from slimba.runtime.backends.cuda_mid import Mid
from slimba.runtime.backends.cuda_step import FusedStep

EARLY, ORDER, NEVER = "Early()", "AtOnce()", 1 << 30
DEFAULT = {
    "dots": True,
    "warps": (8, 16),  # for 2,048 and 4,096 columns
    "order": ORDER,
    "quick": True,
    "resident": 2,
    "bakes": True,
    "still": 128,
    "wide": NEVER,
    "broad": NEVER,
    "broad_head": 64,
}
ONE: list[tuple[str, str, dict[str, Any]]] = [
    ("dfssm", "float32", {}),
    ("dfssm", "float32", {"order": EARLY}),
    ("dfssm", "float32", {"warps": (8, 8)}),
    ("dfssm", "float32", {"warps": (16, 16)}),
    ("dfssm", "float32", {"warps": (8, 8), "order": EARLY}),
    ("dfssm", "float32", {"warps": (8, 8), "order": EARLY, "resident": 3}),
    ("dfssm", "float32", {"dots": False}),
    ("dfssm", "float32", {"quick": False}),
    ("dfssm", "float32", {"dots": False, "quick": False}),
    ("dfssm-published", "bfloat16", {}),
    ("dfssm-published", "bfloat16", {"order": EARLY}),
    ("dfssm-published", "bfloat16", {"warps": (8, 8), "order": EARLY}),
    ("dfssm-published", "bfloat16", {"dots": False, "quick": False}),
]
MANY: list[tuple[int, dict[str, Any]]] = [
    (batch, changes)
    for batch in (8, 512, 128, 32)
    for changes in ({"bakes": False}, {"still": 0}, {"still": 512}, {"wide": 2}, {"still": 512, "warps": (8, 8)})
] + [(batch, {"broad": 2} | changes) for batch in (8, 512, 128, 32) for changes in ({}, {"broad_head": NEVER})]


def apply(changes: dict[str, Any]) -> None:
    c = DEFAULT | changes
    FusedStep.DOTS, FusedStep.QUICK, Baked.ORDER, Baked.QUICK_RESIDENT = (
        c["dots"],
        c["quick"],
        c["order"],
        c["resident"],
    )
    cuda_lean.DOT_WARPS, Mid.STILL_MOST = dict(zip((2048, 4096), c["warps"], strict=True)), c["still"]
    BatchStep.BAKES, BatchStep.WIDE_FROM = c["bakes"], c["wide"]
    BroadStep.FEWEST, BroadStep.BROAD_HEAD_FROM = c["broad"], c["broad_head"]


def difference(got: np.ndarray, want: np.ndarray) -> str:
    worst = float(np.abs(got - want).max() / np.abs(want).max())
    agreed = (got.argmax(1) == want.argmax(1)).mean()
    return f"logits differ by {worst:.2g} of the largest, argmax the same at {agreed:.4f}"


def one(engine: CudaEngine, state_dtype: str, name: str, first: dict[str, Any]) -> str:
    """Speed of a step alone in its graph and of eight in one; both must choose the same ids."""
    state = engine.new_state()
    step = FusedStep(engine.model, engine.gpu, 1, state_dtype)
    step.point_to(state)
    for _ in range(3):
        step.work(choose=True)
    run = engine.gpu.record(functools.partial(step.work, choose=True))
    eight = engine.gpu.record(lambda: [step.work(choose=True, follows=i > 0) for i in range(8)] and None)
    texts = []
    for work, times in (run, 24), (eight, 3):
        state.reset()
        step.ids.fill_(5)
        step.count.zero_()
        for _ in range(times):
            work()
        texts.append(step.chosen[0, :24].tolist())
    logits = step.logits.cpu().numpy().copy()
    step.count.zero_()
    single = seconds(run, 48, 5)
    step.count.zero_()
    many = seconds(eight, 8, 5) / 8
    figure(f"decode 1 {name}", f"{1 / single:.0f} tok/s, {single * 1e6:.1f} us; eight a graph {1 / many:.0f} tok/s")
    assert texts[0] == texts[1], f"eight a graph: {texts[1]} for {texts[0]}"
    return difference(logits, first.setdefault("logits", logits))


def same(engine: CudaEngine, batch: int, first: dict[int, np.ndarray]) -> str:
    state = engine.new_state(batch)
    step = engine.stepper(state)
    step.ids.copy_(torch.arange(batch, device=step.ids.device) * 37 % engine.spec.vocab_size)
    for _ in range(3):
        step.work(choose=True)
    got = step.logits.cpu().numpy().copy()
    return difference(got, first.setdefault(batch, got))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=240, help="start no further configuration after this")
    parser.add_argument("--shape", default="mamba2-1.3b")
    args = parser.parse_args()
    spec = named_spec(args.shape)
    check("bandwidth", bandwidth)
    engine, key = None, None
    firsts: dict[tuple[str, str], dict[str, Any]] = {}
    for label, state, changes in ONE:
        if elapsed() > args.seconds / 2:
            break
        if key != (label, state):
            engine = None
            torch.cuda.empty_cache()
            engine, key = CudaEngine(measure.random_model(spec, label), state_dtype=state), (label, state)
        assert engine is not None
        apply(changes)
        name = f"{label} {state} {changes}"
        check(f"one {name}", functools.partial(one, engine, state, name, firsts.setdefault((label, state), {})))
        check(f"parts {name}", functools.partial(decode_parts, engine, state))
    engine = None
    torch.cuda.empty_cache()
    checkpoint = measure.random_model(spec, "dfssm")
    engine = CudaEngine(checkpoint, state_dtype="int8")
    first: dict[int, np.ndarray] = {}
    for batch, changes in MANY:
        if elapsed() > args.seconds:
            break
        apply(changes)
        engine._steps.clear()
        engine._graphs.clear()
        check(f"same {batch} {changes}", functools.partial(same, engine, batch, first))
        check(
            f"many {batch} {changes}", functools.partial(batched, engine, checkpoint, f"dfssm {changes}", "int8", batch)
        )
    print(f"{time.strftime('%X')}, {elapsed():.0f} s")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1, default=str))


if __name__ == "__main__":
    main()
