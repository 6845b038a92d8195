"""Decode and prefill of quamba2's modes on a GPU at published shapes with random weights, mamba-ssm beside them.

    python benchmarks/quamba2_gpu.py --json quamba2-h200.json
    python benchmarks/quamba2_gpu.py --shape mamba2-1.3b --format w4a16 float16 --batch 1 --peers none

For every shape and format the engine is compared with the torch reference on a model of the same widths with a few
layers (the reference would need minutes for all), and only where they agree the whole one is timed. --kernels also
compares the kernels that transform and round inputs with their NumPy twins at odd sizes. A format that fails is printed
with its error, and the run goes on. What is measured is what `slimba bench --backend cuda` measures.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import itertools
import json
import sys
import time
import types
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
try:
    import slimba._core  # noqa: F401
except ImportError:  # the GPU engine does not need the C++ core; only what names the CPU asks it
    core = types.ModuleType("slimba._core")
    core.isa = lambda name: "none"  # type: ignore[attr-defined]
    sys.modules["slimba._core"] = core

import torch  # noqa: E402
from cuda_measure import decode_parts  # noqa: E402

from kernels.cuda_cases import (  # noqa: E402
    CODES_LAYOUTS,
    TURNED_LAYOUTS,
    codes_product,
    mid_product,
    product,
    turned,
    what_enters,
)
from runtime.numpy_reference import random_matrix  # noqa: E402
from slimba.errors import UserError  # noqa: E402
from slimba.formats import Matrix  # noqa: E402
from slimba.formats.presets import preset_numerics  # noqa: E402
from slimba.models.configs import named_spec  # noqa: E402
from slimba.runtime.backends.cuda import CudaEngine  # noqa: E402
from slimba.runtime.backends.cuda_device import open_gpu  # noqa: E402
from slimba.runtime.backends.cuda_peers import gpu_peer_speeds  # noqa: E402
from slimba.runtime.backends.cuda_speed import gpu_check, gpu_record  # noqa: E402
from slimba.runtime.backends.cuda_weights import DeviceMatrix  # noqa: E402
from slimba.runtime.measure import random_model  # noqa: E402

FORMATS = ("w4a16", "w4a8", "w8a8", "float16")
CHECKED = 2  # layers of the model that is compared


class Turn:
    """Several processes on one GPU compare side by side, which is mostly compiling, and time one by one."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("a") if path else None
        self.to_compare()

    def to_compare(self) -> None:
        self._take(fcntl.LOCK_SH)

    def to_time(self) -> None:
        self._take(fcntl.LOCK_UN)
        self._take(fcntl.LOCK_EX)

    def _take(self, kind: int) -> None:
        if self._file:
            fcntl.flock(self._file, kind)


def kernels() -> dict[str, Any]:
    """The largest difference of each kind of kernel to its twin; `wrong` lists those that are too large."""
    worst: dict[str, Any] = {"wrong": []}
    cases = [(n, layout, TURNED) for n, layout in TURNED_LAYOUTS.items()]
    cases += [(n, CODES_LAYOUTS[n], {"codes": one_vector}) for n in ("codes-2048", "codes-5120")]
    for (name, layout, drivers), activations in itertools.product(cases, ("float32", "int8")):
        rng = np.random.default_rng(len(name))
        matrix = random_matrix(rng, layout)
        x = rng.standard_normal((8, layout.cols)).astype(np.float16).astype(np.float32)
        want = matrix.matmul(what_enters(matrix, x, activations))
        for kind, driver in drivers.items():
            try:
                got = driver(matrix, x, activations)
                off = np.abs(got - want[: len(got)]).max(axis=1)  # a flipped code is rare: most vectors have none
                assert np.median(off) < (2e-2 if kind == "mid" else 1e-4) and off.max() < 0.3, f"off by {off}"
                worst[kind] = max(worst.get(kind, 0.0), float(np.median(off)))
            except (AssertionError, UserError) as e:
                worst["wrong"].append(f"{kind} {name} {activations}: {str(e)[:300]}")
    return worst


def few_vectors(matrix: Matrix, x: np.ndarray, activations: str) -> np.ndarray:
    """slimba_product, one vector and as many as fit its shared memory."""
    gpu = open_gpu()
    first = product(gpu, matrix, x[:1], activations)
    if DeviceMatrix(matrix, gpu.device, gpu.blocks, activations=activations).shared_bytes(8) > gpu.shared:
        return first
    return np.concatenate([first, product(gpu, matrix, x[1:], activations)])


def one_vector(matrix: Matrix, x: np.ndarray, activations: str) -> np.ndarray:
    return np.stack([codes_product(open_gpu(), matrix, v, None, activations) for v in x[:3]])


def turned_vectors(matrix: Matrix, x: np.ndarray, activations: str) -> np.ndarray:
    """slimba_turn, then the product by NumPy."""
    bare = dataclasses.replace(matrix, layout=dataclasses.replace(matrix.layout, hadamard=0))
    return bare.matmul(turned(open_gpu(), matrix, x, activations, True))


TURNED = {
    "product": few_vectors,
    "mid": lambda matrix, x, activations: mid_product(open_gpu(), matrix, x, activations=activations),
    "turn": turned_vectors,
}


def measured(shape: str, format: str, args: argparse.Namespace, turn: Turn) -> dict[str, Any]:
    begun = time.perf_counter()
    spec = named_spec(shape)
    numerics = preset_numerics(format) | {"state": args.state}
    row: dict[str, Any] = {"shape": shape, "format": format}
    try:
        few = random_model(dataclasses.replace(spec, n_layer=CHECKED), format)
        engine = CudaEngine(few, state_dtype=numerics["state"], activations=numerics["activations"])
        difference = gpu_check(engine, few, args.batch)
        print(f"     {shape} {format}: differences to the reference: {difference}", flush=True)
        del engine, few
        torch.cuda.empty_cache()
        checkpoint = random_model(spec, format)
        turn.to_time()
        record = gpu_record(checkpoint, args.batch, args.prompt_len, args.new_tokens, numerics, difference)
        row |= record | {k: [dataclasses.asdict(r) for r in record[k]] for k in ("decode", "prefill")}
        for d, p in zip(record["decode"], record["prefill"], strict=True):
            print(
                f"{shape} {format} batch {d.batch}: {d.tokens_per_second:,.0f} tok/s, {1e6 * d.time:.1f} us, share of"
                f" the limit {d.share:.2f}; prompts {p.tokens_per_second:,.0f} tok/s",
                flush=True,
            )
        if args.parts:
            engine = CudaEngine(checkpoint, state_dtype=numerics["state"], activations=numerics["activations"])
            row["parts"] = decode_parts(engine, numerics["state"])
            print(f"     {row['parts']}", flush=True)
    except Exception as e:  # the other formats shall be measured all the same
        row["error"] = f"{type(e).__name__}: {str(e)[:500]}"
        print(f"FAIL {shape} {format}: {row['error']}", flush=True)
    finally:
        turn.to_compare()
    row["seconds"] = round(time.perf_counter() - begun, 1)
    torch.cuda.empty_cache()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=["mamba2-1.3b", "mamba2-2.7b"])
    parser.add_argument("--format", nargs="*", default=list(FORMATS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--prompt-len", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=320)
    parser.add_argument("--state", default="float32", help="float32, bfloat16 or int8")
    parser.add_argument("--parts", action="store_true", help="also the time of each kernel of a step at batch 1")
    parser.add_argument("--peers", nargs="*", default=["mamba-ssm"], help="mamba-ssm, transformers, or none")
    parser.add_argument("--peer-prompts", action="store_true", help="peers' prefill too; its autotuning takes a minute")
    parser.add_argument("--kernels", action="store_true", help="also compare single kernels at odd sizes")
    parser.add_argument("--lock", type=Path, help="a file that all processes share which run at once")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further measurement after this")
    parser.add_argument("--json", type=Path, help="also write the records there, as they come")
    args = parser.parse_args()
    started = time.perf_counter()
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "runs": [],
        "peers": {},
    }
    turn = Turn(args.lock)
    peers = [p for p in args.peers if p != "none"]
    for shape in args.shape:
        for format in args.format:
            if time.perf_counter() - started > args.seconds:
                print(f"skip {shape} {format}: the time is over")
                continue
            record["runs"].append(measured(shape, format, args, turn))
            if args.json:
                args.json.write_text(json.dumps(record, indent=1) + "\n")
        if peers and time.perf_counter() - started <= args.seconds:
            turn.to_time()
            record["peers"][shape] = gpu_peer_speeds(
                named_spec(shape), args.batch, args.prompt_len, peers, prompts=args.peer_prompts
            )
            print(f"{shape}: {record['peers'][shape]}", flush=True)
            torch.cuda.empty_cache()
            turn.to_compare()
            if args.json:
                args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.kernels:
        record["kernels"] = kernels()
        print(f"kernels and their twins: {record['kernels']}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(record.get("kernels", {}).get("wrong")) or any("error" in row for row in record["runs"]))


if __name__ == "__main__":
    main()
