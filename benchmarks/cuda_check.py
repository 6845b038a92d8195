"""Everything about the CUDA engine that needs a GPU, in one run: correctness first, then speed. Needs no installation.

    python benchmarks/cuda_check.py --json cuda-check.json [--seconds 210] [--only decode]

Compiles the kernels for the GPU at hand, compares every kernel with its NumPy twin at odd sizes on poisoned outputs,
the engine with the NumPy recurrence and the torch reference, trained models with the reference on text (activations in
float32 and int8), and then measures the 1.3B shape with random weights. A failed check is printed and counted and the
run goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
try:
    import slimba._core  # noqa: F401
except ImportError:  # the GPU engine does not need the C++ core, only `measure` imports it
    sys.modules["slimba._core"] = types.ModuleType("slimba._core")

import torch  # noqa: E402
from cuda_kernels import close, expansions, mid_products, products  # noqa: E402
from cuda_measure import (  # noqa: E402
    bandwidth,
    batched,
    check,
    decode_parts,
    decode_variants,
    elapsed,
    figure,
    prefill,
    profile,
    results,
    seconds,
)  # fmt: skip
from cuda_parts import PARTS, FloatProducts, chunks, plain, small_engine  # noqa: E402
from cuda_trained import trained_checks  # noqa: E402

from kernels.cuda_cases import SPECS  # noqa: E402
from runtime.numpy_reference import mamba2_spec, random_checkpoint  # noqa: E402
from runtime.stored_states import StoredModel  # noqa: E402
from slimba.checkpoints.checkpoint import Checkpoint  # noqa: E402
from slimba.models.configs import named_spec  # noqa: E402
from slimba.models.spec import ModelSpec  # noqa: E402
from slimba.runtime import measure  # noqa: E402
from slimba.runtime.backends.cuda import CudaEngine  # noqa: E402
from slimba.runtime.backends.cuda_device import open_gpu  # noqa: E402
from slimba.runtime.backends.cuda_speed import gpu_check  # noqa: E402
from slimba.runtime.backends.cuda_step import Step  # noqa: E402

# ------------------------------------------------------------ correctness


def draw_times() -> str:
    """Of slimba_sample over a real vocabulary."""
    from slimba.runtime.engine import SamplingParams

    engine = CudaEngine(random_checkpoint(mamba2_spec(vocab_size=50288, d_model=8, n_layer=1)), gpu=plain(open_gpu()))
    step = engine.stepper(engine.new_state(8))
    times = []
    for top_k, top_p in (0, 1.0), (50, 1.0), (0, 0.9):
        step.sample_by([SamplingParams(temperature=0.8, top_k=top_k, top_p=top_p, seed=b) for b in range(8)])
        step.first_token(0)
        step.logits.normal_(std=2.5)
        times.append(f"{1e6 * seconds(lambda: draw(step)):.0f} us with top_k {top_k}, top_p {top_p}")
    return ", ".join(times)


def draw(step: Step) -> None:
    step.count.zero_()
    step.after(True)


def peers(spec: ModelSpec, batches: tuple[int, ...]) -> str:
    from slimba.runtime.backends.cuda_peers import gpu_peer_speeds

    rows = gpu_peer_speeds(spec, batches, 512, ["mamba-ssm"], prompts=False)
    for row in rows:
        if "missing" in row:
            raise AssertionError(row["missing"])
        figure(f"peer {row['peer']} {row['version']} {row['how']} {row['batch']}", row["decode_tokens_per_second"])
    return f"{len(rows)} rows"


def stored_states(state_dtype: str) -> str:
    """Pieces and steps that end before, at and after the tokens after which a state is stored."""
    worst = 0.0
    for name in ("headdim-64", "odd"):
        checkpoint = random_checkpoint(SPECS[name], 3, "mixed")
        ids = np.random.default_rng(2).integers(0, checkpoint.spec.vocab_size, (2, 53)).astype(np.int32)
        want = np.stack([StoredModel(checkpoint, state_dtype).logits(row) for row in ids])
        engine = CudaEngine(checkpoint, state_dtype=state_dtype, gpu=plain(open_gpu()), exact=True)
        state = engine.new_state(2)
        got = []
        for a, b in ((0, 5), (5, 12), (12, 13), (13, 30), (30, 36), (36, 53)):
            if b - a < 7:
                got += [engine.step(ids[:, t], state).cpu().numpy()[:, None] for t in range(a, b)]
            else:
                got.append(engine.forward(ids[:, a:b], state))
        worst = max(worst, close(np.concatenate(got, axis=1), want, 1e-2))
    return f"largest difference {worst:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=210, help="start no further measurement after this")
    parser.add_argument("--only", default="", help="some of: quick,correct,trained,decode,prefill,batches,shape,peers")
    parser.add_argument("--models", type=Path, default=ROOT / "benchmarks/models", help="where the packed 25M model is")
    parser.add_argument("--part", default="", help=f"of quick, some of: {','.join(PARTS)}")
    parser.add_argument("--float-products", action="store_true", help="of quick, for racecheck: see FloatProducts")
    parser.add_argument("--shape", default="mamba2-1.3b")
    args = parser.parse_args()
    chosen = set(args.only.split(",")) if args.only else {"correct", "decode", "prefill", "batches", "shape"}
    print(
        torch.__version__, torch.version.cuda, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    )
    if check("compile and load", lambda: f"{open_gpu().blocks} multiprocessors, {open_gpu().shared} bytes") is None:
        sys.exit(1)
    if "quick" in chosen:
        with FloatProducts() if args.float_products else contextlib.nullcontext():
            for name in args.part.split(",") if args.part else PARTS:
                check(name, functools.partial(PARTS[name].compare, open_gpu()))
    if "correct" in chosen:
        gpu = open_gpu()
        check("products", lambda: products(gpu))
        check("products of tens", lambda: mid_products(gpu))
        check("expansions", lambda: expansions(gpu))
        for name in SPECS:
            for format in ("mixed", "float32"):
                for batch in (1, 3):
                    run = lambda n=name, f=format, b=batch: small_engine(n, f, b, True, gpu)  # noqa: E731
                    check(f"engine {name} {format} {batch}", run)
        check("engine half", lambda: small_engine("headdim-64", "mixed", 2, False, gpu))
        for n in (64, 128):
            for state in ("float32", "int8"):
                check(f"chunks {n} {state}", functools.partial(chunks, gpu, n, state))
        check("state bfloat16", lambda: stored_states("bfloat16"))
        check("state int8", lambda: stored_states("int8"))
    if chosen & {"correct", "trained"}:
        for name, work in trained_checks(args.models, open_gpu()).items():
            check(name, work)
    if chosen <= {"quick", "correct", "trained"}:
        return finish(args.json)
    check("bandwidth", bandwidth)
    spec = named_spec(args.shape)
    todo: list[tuple[str, str, str, Callable[[CudaEngine, Checkpoint], Any]]] = []
    if "decode" in chosen:
        check("times of draws", draw_times)
        for label, state in (("dfssm", "float32"), ("dfssm-published", "bfloat16"), ("dfssm", "int8")):
            name = f"decode {label} {state}"
            todo.append((name, label, state, lambda e, c, p=label, s=state: decode_variants(e, c, p, s)))
            if label == "dfssm":
                todo.append((f"parts {state}", label, state, lambda e, c, s=state: decode_parts(e, s)))
    if "prefill" in chosen:
        for b, n in ((1, 512), (1, 2048), (8, 2048)):
            todo.append((f"prefill {b}x{n}", "dfssm", "float32", lambda e, c, b=b, n=n: prefill(e, b, n)))
        for b in (1, 8):
            todo.append((f"profile {b}x2048", "dfssm", "float32", lambda e, c, b=b: profile(e, b, 2048)))
    if "batches" in chosen:
        for b in (8, 16, 32, 128, 512):
            run = lambda e, c, b=b: batched(e, c, "dfssm", "int8", b)  # noqa: E731
            todo.append((f"decode batch {b}", "dfssm", "int8", run))
    if "shape" in chosen:
        for state in ("float32", "int8"):
            todo.append((f"reference at the shape, {state}", "dfssm", state, lambda e, c: gpu_check(e, c, [1, 8, 32])))
    todo.sort(key=lambda t: (t[1], t[2]))
    engine, key, checkpoint = None, None, None
    for name, label, state, work in todo:
        if elapsed() > args.seconds:
            print(f"skip {name}: {elapsed():.0f} s are over")
            continue
        if key != (label, state):
            if checkpoint is None or key is None or key[0] != label:
                checkpoint = measure.random_model(spec, label)
            engine = None
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            begun = time.perf_counter()
            engine, key = CudaEngine(checkpoint, state_dtype=state), (label, state)
            figure(f"load {label} {state}", f"{time.perf_counter() - begun:.1f} s, {engine.model.nbytes / 1e6:.0f} MB")
        check(name, functools.partial(work, engine, checkpoint))
        figure(f"{name} memory", f"{torch.cuda.max_memory_allocated() / 1e6:.0f} MB peak allocated by torch")
        torch.cuda.reset_peak_memory_stats()
    if "peers" in chosen and elapsed() < args.seconds:
        check("peers", lambda: peers(spec, (1, 8, 32, 128, 512)))
    finish(args.json)


def finish(json_file: Path | None) -> None:
    failed = [n for n, c in results["checks"].items() if not c["ok"]]
    print(f"{len(results['checks'])} checks, {len(failed)} failed: {failed}; {elapsed():.0f} s")
    if json_file:
        json_file.write_text(json.dumps(results, indent=1, default=str))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
