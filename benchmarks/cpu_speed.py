"""The CPU figures of the README: `slimba bench` over formats, numerics and instruction sets, one JSON file each.

    python benchmarks/cpu_speed.py [--threads 2] [--quick] [--llama-cpp TQ2_0,Q1_0]

Run it on a machine with nothing else to do; every file in `results/` says what it ran on and how busy that was. The
whole set takes some twenty minutes and 4 GB of memory on two cores; --quick only does the 1-bit formats at batch 1,
with the best kernels. llama.cpp runs in the same command where llama-cpp-python is installed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from slimba.cli.main import main as slimba

RESULTS = Path(__file__).parent / "results"
SHAPE = "mamba2-1.3b"
# format, activations, state, instruction set ("" for the best)
QUICK = [
    ("dfssm-published", "int8", "bf16", ""),
    ("dfssm", "int8", "bf16", ""),
    ("dfssm", "int8", "int8", ""),
    ("dfssm-published", "float32", "fp32", ""),
]
WHOLE = [
    *QUICK,
    ("dfssm-published", "int8", "bf16", "avx2"),
    ("dfssm", "int8", "int8", "avx2"),
    ("int4", "int8", "bf16", ""),
    ("int8", "int8", "bf16", ""),
    ("float16", "float32", "bf16", ""),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--quick", action="store_true", help="1-bit formats at batch 1 only")
    parser.add_argument("--llama-cpp", default="TQ2_0,Q1_0,Q4_0,Q8_0", help="GGUF types, or none")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for format, activations, state, isa in QUICK if args.quick else WHOLE:
        os.environ["SLIMBA_CPU_ISA"] = isa
        name = "-".join(["cpu", SHAPE, format, activations, state] + ([isa] if isa else []))
        line = ["bench", "--shape", SHAPE, "--format", format, "--batch", "1" if args.quick else "1,8"]
        line += ["--activations", activations, "--state-dtype", state, "--llama-cpp", args.llama_cpp]
        line += ["--prompt-len", "512", "--json", str(RESULTS / f"{name}.json")]
        if code := slimba(line + (["--threads", str(args.threads)] if args.threads else [])):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
