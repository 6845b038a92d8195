"""The CPU figures of the README: `slimba bench` over formats and batch sizes, one JSON file each in `results/`.

    python benchmarks/cpu_speed.py [--threads 2] [--quick]

Run it on a machine with nothing else to do; every file says what it ran on and how busy that was. The whole set takes
some ten minutes and 4 GB of memory on two cores; --quick only does the 1-bit formats at batch 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from slimba.cli.main import main as slimba

RESULTS = Path(__file__).parent / "results"
SHAPE = "mamba2-1.3b"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--quick", action="store_true", help="1-bit formats at batch 1 only")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    formats = ["dfssm-published", "dfssm"] + ([] if args.quick else ["int4", "int8", "float16"])
    for format in formats:
        line = ["bench", "--shape", SHAPE, "--format", format, "--batch", "1" if args.quick else "1,8"]
        line += ["--prompt-len", "512", "--json", str(RESULTS / f"cpu-{SHAPE}-{format}.json")]
        if code := slimba(line + (["--threads", str(args.threads)] if args.threads else [])):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
