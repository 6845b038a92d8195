"""The Triton kernels of Mamba-1 on a GPU: gradients against the naive twin, then times and training speed.

    python benchmarks/scan_check.py --json h100.json                       # about a minute on an H100
    python benchmarks/scan_check.py --ids train.npy --sweep

First every gradient of the fused scan against `selective_recurrence`, a token at a time in float32, at several sizes,
for float32 and bfloat16 inputs. Only if all agree, speeds are printed: forward and backward of the scan alone; tokens/s
of real training steps (loop, AdamW, cross-entropy, CUDA graph) of a Mamba-1 of 24M parameters, with the kernels and in
plain PyTorch. --sweep times the scan for other chunks and tiles. Exit code 1 when a gradient is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from slimba.data.batches import WindowBatches
from slimba.kernels import triton as kernels
from slimba.models.lm import SSMForCausalLM, init_weights
from slimba.models.scan import selective_recurrence
from slimba.models.spec import ModelSpec
from slimba.training.loop import LoopSettings, train
from slimba.training.pretrain import PretrainRecipe, PretrainTask
from slimba.training.recipes import load_recipe

NAMES = ("out", "x", "raw", "B", "C", "z", "dt_bias", "A_log", "D")
SIZES = ((3, 65, 33, 3), (2, 1008, 1024, 16))  # batch, length, channels, states
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative to the norm; bfloat16 carries 8 bits
SPEC = ModelSpec(
    architecture="mamba1", n_layer=12, d_model=512, d_inner=1024, d_state=16, dt_rank=32, vocab_size=8192,
    bos_token_id=0, eos_token_id=0, add_bos=True,
)  # fmt: skip


def inputs(batch: int, length: int, channels: int, n_state: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Arguments of `scan`, of the size that a model at its first step has."""
    torch.manual_seed(length)
    raw = torch.randn(batch, length, channels) * 0.5
    x, z = torch.randn(2, batch, length, channels)
    b, c = torch.randn(batch, length, 2 * n_state).split(n_state, dim=-1)
    bias, d = torch.rand(channels) * 4 - 6, torch.randn(channels)
    a_log = torch.log(torch.arange(1.0, n_state + 1)).repeat(channels, 1)
    wide = [t.cuda().to(dtype).requires_grad_() for t in (x, raw, b, c, z)]
    return wide + [t.cuda().requires_grad_() for t in (bias, a_log, d)]


def naive(x, raw, B, C, z, dt_bias, A_log, D) -> torch.Tensor:
    y, _ = selective_recurrence(x, F.softplus(raw + dt_bias), -A_log.exp(), B, C)
    return (y + D * x) * F.silu(z)


def check(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Relative errors of the output and of every gradient; the naive twin gets the rounded inputs in float32."""
    scan = kernels.optional("mixer1").scan
    ours = inputs(*sizes, dtype)
    exact = [t.detach().float().requires_grad_() for t in ours]
    seen = torch.randn(sizes[:3], device="cuda")
    results = []
    for function, args in ((scan, ours), (naive, exact)):
        out = function(*args)
        results.append([out.detach(), *torch.autograd.grad((out.float() * seen).sum(), args)])
    errors = {}
    for name, got, wanted in zip(NAMES, *results, strict=True):
        errors[name] = float((got.float() - wanted).norm() / wanted.norm().clamp_min(1e-6))
    good = all(e < LIMIT[dtype] for e in errors.values())  # False for NaN too
    return {"sizes": sizes, "dtype": str(dtype).removeprefix("torch."), "passed": good, "errors": errors}


def milliseconds(work: Callable[[], Any]) -> float:
    """Median of ten runs, after two."""
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times[2:])[5]


def scan_times(batch: int, length: int) -> dict[str, float]:
    args = inputs(batch, length, SPEC.d_inner, SPEC.d_state, torch.bfloat16)
    scan = kernels.optional("mixer1").scan
    seen = torch.randn(batch, length, SPEC.d_inner, device="cuda").bfloat16()
    out = scan(*args)
    forward = milliseconds(lambda: scan(*args))
    backward = milliseconds(lambda: torch.autograd.grad(out, args, seen, retain_graph=True))
    return {"forward_ms": forward, "backward_ms": backward}


def kernel_times(batch: int, length: int) -> dict[str, float]:
    """Microseconds of each kernel in one forward and backward pass of the scan."""
    args = inputs(batch, length, SPEC.d_inner, SPEC.d_state, torch.bfloat16)
    scan = kernels.optional("mixer1").scan
    scan(*args).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        scan(*args).sum().backward()
        torch.cuda.synchronize()
    return {e.key[:60]: round(e.self_device_time_total, 1) for e in profile.key_averages() if e.self_device_time_total}


def sweep(batch: int, length: int) -> list[dict[str, float]]:
    """Times for other chunks and tiles of the scan."""
    module = kernels.optional("selective")
    usual = module.CHUNK, module.TILE
    rows = []
    for module.CHUNK, module.TILE in ((32, 512), (64, 512), (128, 512), (64, 256), (64, 1024)):
        row = {"chunk": module.CHUNK, "tile": module.TILE, **scan_times(batch, length)}
        print(json.dumps(row), flush=True)
        rows.append(row)
    module.CHUNK, module.TILE = usual
    return rows


def training_speed(ids: np.ndarray, batch: int, window: int, steps: int, fused: bool) -> dict[str, Any]:
    """Tokens/s of the real loop after its first five steps; plain PyTorch without `fused`."""
    usual = kernels.optional
    if not fused:
        kernels.optional = lambda name: None
    recipe = load_recipe(PretrainRecipe, "pretrain.yaml", None, {"window": window, "batch": batch, "lr": 3e-3})
    batches = WindowBatches(ids, window, batch)
    model = SSMForCausalLM(SPEC)
    init_weights(model, 0)
    model.cuda()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    settings = LoopSettings(steps=5 + steps, betas=(0.9, 0.95), log_every=1, save_every_s=math.inf)
    with tempfile.TemporaryDirectory() as work:
        train(PretrainTask(model, recipe), batches, settings, Path(work))
        rows = [json.loads(row) for row in (Path(work) / "log.jsonl").read_text().splitlines()]
    kernels.optional = usual
    seconds = (rows[-1]["seconds"] - rows[4]["seconds"]) / steps
    return {
        "kernels": fused,
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch": batch,
        "window": window,
        "step_ms": 1000 * seconds,
        "tokens_per_second": batch * window / seconds,
        "loss": [rows[0]["loss"], rows[-1]["loss"]],
        "peak_GB": torch.cuda.max_memory_allocated() / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ids", type=Path, help=".npy of token ids below 8192 (default: random ones)")
    parser.add_argument("--batch", type=int, default=16, help="windows of a training step")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--sweep", action="store_true", help="also time other chunks and tiles")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    if not torch.cuda.is_available() or kernels.optional("mixer1") is None:
        parser.error("this needs a GPU and Triton")

    record: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    record["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    record["checks"] = []
    for dtype, sizes in itertools.product((torch.float32, torch.bfloat16), SIZES):
        row = check(sizes, dtype)
        worst = max(row["errors"], key=lambda k: row["errors"][k])
        print(f"{'ok  ' if row['passed'] else 'FAIL'} {row['dtype']:8} {sizes}: {worst} {row['errors'][worst]:.1e}")
        record["checks"].append(row)
    passed = all(row["passed"] for row in record["checks"])
    print(f"gradients: {'all agree' if passed else 'WRONG, so no speeds'}", flush=True)
    if passed:
        record["scan"] = scan_times(args.batch, args.window)
        record["kernels_us"] = kernel_times(args.batch, args.window)
        print(json.dumps(record["scan"] | record["kernels_us"], indent=1), flush=True)
        if args.ids:
            ids = np.load(args.ids)[: 60 * args.batch * args.window + 1].astype(np.int32)
        else:
            ids = np.random.default_rng(0).integers(0, SPEC.vocab_size, 60 * args.batch * args.window + 1, np.int32)
        fused = training_speed(ids, args.batch, args.window, 40, True)
        print(json.dumps(fused), flush=True)
        plain = training_speed(ids, args.batch, args.window, 5, False)
        print(json.dumps(plain), flush=True)
        ratio = fused["tokens_per_second"] / plain["tokens_per_second"]
        record |= {"training": [fused, plain], "speed_up": ratio}
        print(f"training: {fused['tokens_per_second']:,.0f} tokens/s, {ratio:.1f} times plain PyTorch", flush=True)
        if args.sweep:
            record["sweep"] = sweep(args.batch, args.window)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
