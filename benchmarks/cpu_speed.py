"""The CPU table: our formats in every state type beside llama.cpp, at the shape of Mamba-2 1.3B or another, in one run.

    python benchmarks/cpu_speed.py [--threads 2] [--llama-cpp TQ2_0,Q1_0,Q4_0,Q8_0,F16] [--rows dfssm:int8:bf16,...]
    python benchmarks/cpu_speed.py --shape mamba2-2.7b --rows quamba2 --llama-cpp Q4_0,Q8_0 --start none

Run it on a machine with nothing else to do (some twelve minutes and 4 GB of memory on two cores; the files say how busy
it was). llama.cpp is measured in the same run where llama-cpp-python is installed, twice, before and after ours: the
better of the two counts. `--llama-cpp-python PYTHON` takes that of another interpreter, such as one built without
AVX-512 beside rows that end in `:avx2`: CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON
-DGGML_BMI2=ON -DGGML_AVX_VNNI=OFF -DGGML_AVX512=OFF" when it is installed. Every figure is a median of five. Also
measured: the time from the start of a process to the first token of an 8-token prompt, from the packed model on disk,
and the memory resident then. Writes `results/cpu-table.json` (`cpu-table-SHAPE.json` of other shapes), and one file of
`slimba bench` a row; the table goes to stdout as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from slimba.checkpoints.packed import write_packed
from slimba.models.configs import named_spec
from slimba.runtime import measure
from slimba.runtime.backends.cpu import default_threads
from slimba.runtime.peers import has_llama_cpp, llama_cpp_speeds

RESULTS = Path(__file__).parent / "results"
SHAPE = "mamba2-1.3b"
STARTS = 5
# format:activations:state[:instruction set]
ROWS = (
    "dfssm:int8:int8", "dfssm:int8:bf16", "dfssm:int8:fp32", "dfssm:float32:fp32",
    "dfssm-published:int8:int8", "dfssm-published:int8:bf16", "dfssm-published:int8:fp32",
    "dfssm:int8:int8:avx2", "int4:int8:bf16", "int8:int8:bf16", "float16:float32:bf16",
)  # fmt: skip
QUAMBA2 = ("w8a8:int8:bf16", "w4a8:int8:bf16", "w4a16:float32:bf16")
FIRST_TOKEN = """
import sys, numpy as np, slimba
from slimba.runtime import measure
from slimba.runtime.engine import SamplingParams
model = slimba.load(sys.argv[1], backend="cpu", threads=int(sys.argv[2]), state_dtype="bf16", activations="int8")
prompt = np.arange(1, 9, dtype=np.int32)[None]
next(model.engine.generate(prompt, model.engine.new_state(1), SamplingParams(max_new_tokens=1)))
print(measure.resident_bytes(), flush=True)
"""


def ours(shape: str, row: str, threads: int) -> dict[str, Any]:
    """`slimba bench` in a process of its own, so that the memory it reports is its own too."""
    format, activations, state, *isa = row.split(":")
    path = RESULTS / f"cpu-{shape}-{row.replace(':', '-')}.json"
    line = [str(Path(sys.executable).with_name("slimba")), "bench", "--shape", shape, "--format", format]
    line += ["--activations", activations, "--state-dtype", state, "--threads", str(threads), "--llama-cpp", "none"]
    line += ["--prompt-len", "512", "--new-tokens", "80", "--json", str(path)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"SLIMBA_CPU_ISA": "".join(isa)})
    record: dict[str, Any] = json.loads(path.read_text())
    return {"row": row, "decode": record["decode"][0], "prefill": record["prefill"][0]} | {
        key: record[key] for key in ("weight_bytes", "bandwidth", "resident_bytes", "machine")
    }


def start(shape: str, format: str, threads: int) -> dict[str, Any]:
    """Seconds from the start of a process to the first token, the model's pages in the system's cache."""
    with tempfile.TemporaryDirectory(prefix="slimba-start-") as folder:
        model = Path(folder) / "model"
        write_packed(measure.random_model(named_spec(shape), format), model)
        times, resident = [], 0
        for _ in range(STARTS + 1):
            begin = time.perf_counter()
            run = subprocess.Popen(
                [sys.executable, "-c", FIRST_TOKEN, str(model), str(threads)], stdout=subprocess.PIPE, text=True
            )
            assert run.stdout is not None
            resident = int(run.stdout.readline())
            times.append(time.perf_counter() - begin)
            run.wait()
    return {"format": format, "first_token_seconds": statistics.median(times[1:]), "resident_bytes": resident}


def table(record: dict[str, Any]) -> str:
    """Markdown: ours against the best llama.cpp type, for decode and prefill each."""
    theirs = record["llama_cpp"]
    most = {k: max((r[f"{k}_tokens_per_second"] for r in theirs), default=None) for k in ("decode", "prefill")}

    def ratio(kind: str, speed: float) -> str:
        return "" if most[kind] is None else f" ({speed / most[kind]:.2f}x)"

    lines = [f"llama.cpp built for {' '.join(theirs[0]['built_for'])}\n"] if theirs else []
    lines += [
        "| format, activations, state | MB a token | decode tok/s | share of the limit | prefill of 512, tok/s |",
        "|---|---|---|---|---|",
    ]
    for r in record["ours"]:
        decode, prefill = r["decode"], r["prefill"]
        lines.append(
            f"| {r['row'].replace(':', ', ')} | {decode['bytes'] / 1e6:.0f} "
            f"| {decode['tokens_per_second']:.1f}{ratio('decode', decode['tokens_per_second'])} "
            f"| {100 * decode['share']:.0f} % of {r['bandwidth'] / 1e9:.0f} GB/s "
            f"| {prefill['tokens_per_second']:.0f}{ratio('prefill', prefill['tokens_per_second'])} |"
        )
    for r in theirs:
        lines.append(
            f"| llama.cpp {r['type']} | {r['bytes'] / 1e6:.0f} (file) | {r['decode_tokens_per_second']:.1f} | "
            f"| {r['prefill_tokens_per_second']:.0f} |"
        )
    for r in record["start"]:
        lines.append(
            f"\n{r['format']}: first token {r['first_token_seconds']:.2f} s after the start of the process, "
            f"{r['resident_bytes'] / 1e6:.0f} MB resident"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=default_threads(), help="default: all cores")
    parser.add_argument("--shape", default=SHAPE)
    parser.add_argument("--rows", default=",".join(ROWS), help="format:activations:state, or quamba2: its modes")
    parser.add_argument("--start", default="dfssm,dfssm-published", help="formats whose start is measured, or none")
    parser.add_argument("--llama-cpp", default="TQ2_0,Q1_0,Q4_0,Q8_0,F16", help="GGUF types, or none")
    parser.add_argument("--llama-cpp-python", metavar="PYTHON", default=sys.executable, help="interpreter that has it")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shape = args.shape
    out = args.out or RESULTS / ("cpu-table.json" if shape == SHAPE else f"cpu-table-{shape}.json")
    RESULTS.mkdir(exist_ok=True)
    wanted = args.llama_cpp != "none" and (has_llama_cpp() or args.llama_cpp_python != sys.executable)
    types = tuple(args.llama_cpp.split(",")) if wanted else ()

    def theirs() -> list[dict[str, Any]]:
        return llama_cpp_speeds(named_spec(shape), args.threads, 512, 80, types, python=args.llama_cpp_python)

    peers = [theirs()]
    rows = [ours(shape, row, args.threads) for row in (QUAMBA2 if args.rows == "quamba2" else args.rows.split(","))]
    peers.append(theirs())
    best = []
    for a, b in zip(*peers, strict=True):
        speeds = {k: max(a[k], b[k]) for k in ("decode_tokens_per_second", "prefill_tokens_per_second")}
        best.append(a | speeds | {"runs": [a, b]})
    begun = [start(shape, format, args.threads) for format in args.start.split(",") if format != "none"]
    command = " ".join("PYTHON" if a == args.llama_cpp_python else a for a in sys.argv)  # no paths of this machine
    record = {"command": command, "shape": shape, "threads": args.threads, "ours": rows}
    record |= {"llama_cpp": best, "start": begun}
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
