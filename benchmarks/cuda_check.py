"""Everything about the CUDA engine that needs a GPU, in one run: correctness first, then speed. Needs no installation.

    python benchmarks/cuda_check.py --json cuda-check.json [--seconds 210] [--only decode]

Compiles the kernels for the GPU at hand, compares every kernel with its NumPy twin at odd sizes on poisoned outputs,
the engine with the NumPy recurrence and the torch reference, the packed 25M model with the reference on text, and then
measures the 1.3B shape with random weights. A failed check is printed and counted and the run goes on.
"""

from __future__ import annotations

import argparse
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
from cuda_kernels import close, dot_products, expansions, lean_products, mid_products, products  # noqa: E402
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

from kernels.cuda_cases import SPECS  # noqa: E402
from runtime.numpy_reference import NumpyModel, mamba2_spec, random_checkpoint  # noqa: E402
from runtime.stored_states import StoredModel  # noqa: E402
from slimba.checkpoints.checkpoint import Checkpoint  # noqa: E402
from slimba.models.configs import named_spec  # noqa: E402
from slimba.models.spec import ModelSpec  # noqa: E402
from slimba.runtime import measure  # noqa: E402
from slimba.runtime.backends.cuda import CudaEngine  # noqa: E402
from slimba.runtime.backends.cuda_device import Gpu, open_gpu  # noqa: E402
from slimba.runtime.backends.cuda_speed import gpu_check  # noqa: E402
from slimba.runtime.backends.cuda_step import Step  # noqa: E402

# ------------------------------------------------------------ correctness


@functools.cache
def plain_gpu() -> Gpu:
    """The GPU without kernels for each shape, whose compilation would take most of the time of small checks."""
    gpu = open_gpu()
    return Gpu(gpu.device, gpu.module_builder, gpu.blocks, gpu.shared, overlap=True)


def batches_of_sequences(state_dtype: str) -> str:
    """The kernels for tens of sequences, each elsewhere in its buffer, past the token that stores the state."""
    spec = mamba2_spec(headdim=64, d_inner=512, d_state=128, n_groups=2, n_layer=1, norm_group_size=256)
    checkpoint = random_checkpoint(spec, 8, "mixed")
    ids = np.random.default_rng(6).integers(0, 67, (9, 40)).astype(np.int32)
    engine = CudaEngine(checkpoint, state_dtype=state_dtype, gpu=plain_gpu())
    pool = engine.new_state(9)
    for b in range(9):
        engine.prefill(ids[b : b + 1, : 8 + b], pool.view([b]))
    got = np.stack(
        [engine.step(ids[range(9), range(8 + t, 17 + t)], pool).cpu().numpy().copy() for t in range(20)], axis=1
    )
    models = [NumpyModel(checkpoint) if state_dtype == "float32" else StoredModel(checkpoint, state_dtype) for _ in ids]
    want = np.stack([m.logits(ids[b, : 28 + b])[8 + b :] for b, m in enumerate(models)])
    return f"largest difference {close(got, want, 2e-2 if state_dtype == 'float32' else 8e-2):.2g}"


def draws() -> str:
    """slimba_sample over a real vocabulary against the NumPy reference."""
    from slimba.runtime.engine import SamplingParams
    from slimba.runtime.sampling import sample

    rng = np.random.default_rng(0)
    engine = CudaEngine(random_checkpoint(mamba2_spec(vocab_size=50288, d_model=8, n_layer=1)), gpu=plain_gpu())
    state = engine.new_state(8)
    step = engine.stepper(state)
    same = asked = 0
    for k, (top_k, top_p) in enumerate([(0, 1.0), (50, 1.0), (0, 0.9), (0, 0.5)]):
        logits = (rng.standard_normal((8, 50288)) * 2.5).astype(np.float32)
        params = [SamplingParams(temperature=0.8, top_k=top_k, top_p=top_p, seed=b) for b in range(8)]
        step.sample_by(params)
        step.first_token(k)
        step.count.zero_()
        step.logits.copy_(torch.from_numpy(logits))
        step.after(True)
        got = step.chosen[:, 0].tolist()
        want = [sample(row, (), p, b, k) for b, (row, p) in enumerate(zip(logits, params, strict=True))]
        same += sum(g == w for g, w in zip(got, want, strict=True))
        asked += got.count(-3)
    assert same + asked == 32, f"{same} of 32 draws are the reference's, {asked} are left to the host"
    return (
        f"{same} of 32 draws are the reference's, {asked} left to the host; {1e6 * seconds(lambda: draw(step)):.0f} us"
    )


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


def small_engine(name: str, format: str, batch: int, exact: bool) -> str:
    """Bulk in pieces, then fused steps, the second and later ones from a graph; also with ordinary launches."""
    checkpoint = random_checkpoint(SPECS[name], 1, format)
    ids = np.random.default_rng(0).integers(0, checkpoint.spec.vocab_size, (batch, 44)).astype(np.int32)
    engine = CudaEngine(checkpoint, gpu=plain_gpu(), exact=exact)
    state = engine.new_state(batch)
    pieces = [engine.forward(ids[:, a:b], state) for a, b in ((0, 1), (1, 3), (3, 25), (25, 38))]
    pieces += [engine.step(ids[:, t], state).cpu().numpy()[:, None] for t in range(38, 44)]
    got = np.concatenate(pieces, axis=1)
    want = np.stack([NumpyModel(checkpoint).logits(row) for row in ids])
    bulk = close(got[:, :38], want[:, :38], 5e-5 if exact else 3e-2)
    return f"bulk {bulk:.2g}, steps {close(got[:, 38:], want[:, 38:], 5e-5 if exact else 3e-2):.2g}"


def chunks(d_state: int, state_dtype: str) -> str:
    """The chunked recurrence over whole and partial chunks, from an empty state and from one."""
    spec = mamba2_spec(headdim=64, d_inner=256, d_state=d_state, n_groups=2)
    checkpoint = random_checkpoint(spec, 8, "float32")
    ids = np.random.default_rng(6).integers(0, 67, (2, 400)).astype(np.int32)
    engine = CudaEngine(checkpoint, state_dtype=state_dtype, gpu=plain_gpu())
    state = engine.new_state(2)
    engine.prefill(ids[:, :170], state)
    got = engine.prefill(ids[:, 170:399], state)
    after = engine.step(ids[:, 399], state).cpu().numpy()
    want = np.stack([NumpyModel(checkpoint).logits(row) for row in ids])
    step = close(after, want[:, 399], 3e-2 if state_dtype == "float32" else 0.1)
    return f"prefill {close(got, want[:, 398], 3e-2):.2g}, step {step:.2g}"


def stored_states(state_dtype: str) -> str:
    """Pieces and steps that end before, at and after the tokens after which a state is stored."""
    worst = 0.0
    for name in ("headdim-64", "odd"):
        checkpoint = random_checkpoint(SPECS[name], 3, "mixed")
        ids = np.random.default_rng(2).integers(0, checkpoint.spec.vocab_size, (2, 53)).astype(np.int32)
        want = np.stack([StoredModel(checkpoint, state_dtype).logits(row) for row in ids])
        engine = CudaEngine(checkpoint, state_dtype=state_dtype, gpu=plain_gpu(), exact=True)
        state = engine.new_state(2)
        got = []
        for a, b in ((0, 5), (5, 12), (12, 13), (13, 30), (30, 36), (36, 53)):
            if b - a < 7:
                got += [engine.step(ids[:, t], state).cpu().numpy()[:, None] for t in range(a, b)]
            else:
                got.append(engine.forward(ids[:, a:b], state))
        worst = max(worst, close(np.concatenate(got, axis=1), want, 1e-2))
    return f"largest difference {worst:.2g}"


def real_text(model: Path, count: int) -> np.ndarray:
    from slimba.data.tokenizer import Tokenizer

    text = (ROOT / "src/slimba/assets/demo-text/heldout.txt").read_text(encoding="utf-8")[: count * 8]
    return np.array(Tokenizer.from_file(model / "tokenizer.json").encode(text)[:count], np.int32)


def packed_model() -> str:
    """The packed 25M model on text against the reference on the same GPU, in float32: bulk and step by step."""
    from slimba.checkpoints.reader import open_checkpoint
    from slimba.runtime.backends.reference import ReferenceEngine

    path = ROOT / "benchmarks/models/mamba2-25m-1bit"
    checkpoint = open_checkpoint(path)
    ids = real_text(path, 1025)[None]
    reference = ReferenceEngine(checkpoint, device="cuda")
    want = reference.forward(ids[:, :-1], reference.new_state())[0]
    engine = CudaEngine(checkpoint)
    parts = []
    state = engine.new_state()
    stepped = np.stack([engine.step(ids[:, t], state)[0].cpu().numpy() for t in range(256)])
    for name, got in (("bulk", engine.forward(ids[:, :-1], engine.new_state())[0]), ("steps", stepped)):
        n = len(got)
        tolerance = 0.15 if name == "bulk" else 2e-3
        top = np.sort(want[:n], axis=1)
        same = got.argmax(1) == want[:n].argmax(1)
        clear = top[:, -1] - top[:, -2] > tolerance
        difference = close(got, want[:n], tolerance)
        ours, theirs = (perplexity(x, ids[0, 1 : n + 1]) for x in (got, want[:n]))
        assert same.mean() >= 0.99, f"{name}: argmax agrees at {same.mean():.4f}"
        assert same[clear].all(), f"{name}: argmax differs where the margin exceeds the tolerance"
        assert abs(ours / theirs - 1) < 0.005, f"{name}: perplexity {ours} for {theirs}"
        parts.append(f"{name}: logits {difference:.2g}, argmax {same.mean():.4f}, ppl {ours:.4f} for {theirs:.4f}")
    return "; ".join(parts)


def perplexity(logits: np.ndarray, targets: np.ndarray) -> float:
    x = logits.astype(np.float64)
    top = x.max(1, keepdims=True)
    logp = x - top - np.log(np.exp(x - top).sum(1, keepdims=True))
    return float(np.exp(-logp[np.arange(len(targets)), targets].mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=210, help="start no further measurement after this")
    parser.add_argument("--only", default="", help="some of: quick,correct,decode,prefill,batches,shape,peers")
    parser.add_argument("--shape", default="mamba2-1.3b")
    args = parser.parse_args()
    chosen = set(args.only.split(",")) if args.only else {"correct", "decode", "prefill", "batches", "shape"}
    print(
        torch.__version__, torch.version.cuda, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    )
    gpu = check("compile and load", lambda: f"{open_gpu().blocks} multiprocessors, {open_gpu().shared} bytes shared")
    if gpu is None:
        sys.exit(1)
    if "quick" in chosen:
        check("lean products", lean_products)
        check("dot products", dot_products)
        check("products of tens", mid_products)
        for state in ("float32", "int8"):
            check(f"batches {state}", functools.partial(batches_of_sequences, state))
        check("chunks 128 int8", functools.partial(chunks, 128, "int8"))
        check("draws", draws)
    if "correct" in chosen:
        check("products", products)
        check("products of tens", mid_products)
        check("expansions", expansions)
        for name in SPECS:
            for format in ("mixed", "float32"):
                for batch in (1, 3):
                    check(
                        f"engine {name} {format} {batch}", lambda n=name, f=format, b=batch: small_engine(n, f, b, True)
                    )
        check("engine half", lambda: small_engine("headdim-64", "mixed", 2, False))
        for n in (64, 128):
            for state in ("float32", "int8"):
                check(f"chunks {n} {state}", functools.partial(chunks, n, state))
        check("state bfloat16", lambda: stored_states("bfloat16"))
        check("state int8", lambda: stored_states("int8"))
        check("packed 25M model", packed_model)
    check("bandwidth", bandwidth)
    spec = named_spec(args.shape)
    todo: list[tuple[str, str, str, Callable[[CudaEngine, Checkpoint], Any]]] = []
    if "decode" in chosen:
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
        for b in (8, 32, 128, 512):
            run = lambda e, c, b=b: batched(e, c, "dfssm", "int8", b)  # noqa: E731
            todo.append((f"decode batch {b}", "dfssm", "int8", run))
    if "shape" in chosen:
        for state in ("float32", "int8"):
            todo.append((f"reference at the shape, {state}", "dfssm", state, lambda e, c: gpu_check(e, c, [1, 8])))
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
    failed = [n for n, c in results["checks"].items() if not c["ok"]]
    print(f"{len(results['checks'])} checks, {len(failed)} failed: {failed}; {elapsed():.0f} s")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1, default=str))


if __name__ == "__main__":
    main()
