"""The scripts of `benchmarks/` and `benchmarks/baselines/` import each other by their plain names, as when they run."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS / "baselines"), str(BENCHMARKS)]
