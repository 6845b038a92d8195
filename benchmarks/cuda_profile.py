"""Where the time of a decoding step of several sequences goes on a GPU. Needs no installation.

    python benchmarks/cuda_profile.py --json cuda-profile.json [--batches 8,32,128,512] [--state-dtype int8]

The 1.3B shape with random weights, whole steps as CUDA graphs. For each batch: a step that stores the states (one in
16) and the others; each kernel by itself, all layers of it in one graph, with positions at which states are not stored
and at which they are; and the step without it, which is what it costs where kernels overlap.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
try:
    import slimba._core  # noqa: F401
except ImportError:  # the GPU engine does not need the C++ core, only `measure` imports it
    sys.modules["slimba._core"] = types.ModuleType("slimba._core")

import torch  # noqa: E402
from cuda_measure import bandwidth, check, figure, results, seconds  # noqa: E402

from slimba.models.configs import named_spec  # noqa: E402
from slimba.runtime import measure  # noqa: E402
from slimba.runtime.backends.cuda import CudaEngine  # noqa: E402
from slimba.runtime.backends.cuda_batch import Launch, RecordedStep  # noqa: E402
from slimba.runtime.backends.cuda_device import Gpu  # noqa: E402
from slimba.runtime.backends.cuda_state import KEPT  # noqa: E402

CHOICE, CALL = "choice of ids", "cuBLAS"


def name_of(launch: Launch) -> str:
    arguments, _ = launch
    return CALL if callable(arguments) else str(arguments[0])


def put(gpu: Gpu, launches: Iterable[Launch]) -> None:
    for arguments, settings in launches:
        if callable(arguments):
            arguments()
        else:
            gpu.launch(*arguments, **settings)


def graph(gpu: Gpu, work: Callable[[], None]) -> Callable[[], None]:
    work()
    return gpu.record(work)


def by_position(run: Callable[[], None], rounds: int = 12) -> list[float]:
    """Microseconds of a step at each of the KEPT positions in turn: medians over rounds."""
    times: list[list[float]] = [[] for _ in range(KEPT)]
    for _ in range(rounds):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(KEPT + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        for k in range(KEPT):
            times[k].append(1e3 * events[k].elapsed_time(events[k + 1]))
    return [statistics.median(t) for t in times]


def profile(engine: CudaEngine, batch: int) -> str:
    state = engine.new_state(batch)
    step = engine.stepper(state)
    assert isinstance(step, RecordedStep), f"{type(step).__name__} has no list of launches"
    step.point_to(state)
    step.ids.fill_(5)
    run = graph(engine.gpu, lambda: step.work(choose=True))
    state.reset()
    step.count.zero_()
    each = by_position(run)
    mean, storing = statistics.mean(each), max(each)
    other = statistics.median(each)
    figure(f"{batch}", f"{mean:.1f} us, {1e6 * batch / mean:.0f} tok/s: storing {storing:.1f}, others {other:.1f}")
    rows = []
    launches = step._launches
    for name in dict.fromkeys(name_of(x) for x in launches):
        own, rest = ([x for x in launches if (name_of(x) == name) is kept] for kept in (True, False))
        alone = graph(engine.gpu, functools.partial(put, engine.gpu, own))
        times = []
        for position in (0, KEPT - 1):
            state.pos.fill_(position)
            times.append(1e6 * seconds(alone, 8, 3) / len(own))

        def without(rest: list[Launch] = rest) -> None:
            put(engine.gpu, rest)
            step.after(True)

        shorter = graph(engine.gpu, without)
        state.reset()
        step.count.zero_()
        cost = (mean - 1e6 * seconds(shorter, KEPT, 3)) / len(own)
        rows.append({"kernel": name, "times": len(own), "alone_us": times[0], "storing_us": times[1], "cost_us": cost})
    state.pos.zero_()
    step.count.zero_()
    chosen = graph(engine.gpu, lambda: step.after(True))
    step.count.zero_()
    rows.append({"kernel": CHOICE, "times": 1, "alone_us": 1e6 * seconds(chosen, 8, 3)})
    step.count.zero_()
    for row in rows:
        figures = (f"{k} {v:.2f}" for k, v in row.items() if isinstance(v, float))
        print(f"     {row['kernel']:24} {row['times']:3} x {', '.join(figures)}", flush=True)
    results["figures"][f"kernels {batch}"] = rows
    return type(step).__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batches", default="8,32,128,512")
    parser.add_argument("--shape", default="mamba2-1.3b")
    parser.add_argument("--format", default="dfssm")
    parser.add_argument("--state-dtype", default="int8", choices=("float32", "bfloat16", "int8"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no usable NVIDIA GPU; this profile is of the CUDA engine alone")
    figure("device", f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    check("bandwidth", bandwidth)
    checkpoint = measure.random_model(named_spec(args.shape), args.format)
    engine = CudaEngine(checkpoint, state_dtype=args.state_dtype)
    for batch in map(int, args.batches.split(",")):
        check(f"batch {batch}", functools.partial(profile, engine, batch))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    sys.exit(any(not c["ok"] for c in results["checks"].values()))


if __name__ == "__main__":
    main()
