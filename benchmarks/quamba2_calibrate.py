"""Time and memory of quamba2's calibration for a published shape with random float16 weights, on a GPU or on the CPU.

    python benchmarks/quamba2_calibrate.py --shape mamba2-1.3b --mode w4a8 --json calibrate.json

The work is that of `slimba compress --method quamba2` between the opening of the model and the writing of the file:
the same function, on random tokens. `float_bytes` is what the float model takes; the
peak of the device, `device_peak_bytes`, stays far below where one layer at a time is in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import sys
import time
import types
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

try:
    import slimba._core  # noqa: F401
except ImportError:  # `measure` imports it and nothing here calls it
    sys.modules["slimba._core"] = types.ModuleType("slimba._core")

import torch

from slimba.data.tokens import ArrayTokens
from slimba.methods.quamba2 import run as quamba2
from slimba.methods.quamba2.recipe import QuambaRecipe
from slimba.models.configs import named_spec
from slimba.runtime.measure import random_model
from slimba.training.recipes import load_recipe, parse_overrides


def calibrated(shape: str, layers: int, settings: list[str], device: torch.device) -> dict[str, Any]:
    """The record of one calibration; of the first `layers` layers alone where that is not 0."""
    recipe = load_recipe(QuambaRecipe, "quamba2.yaml", None, parse_overrides(settings))
    spec = named_spec(shape)
    spec = dataclasses.replace(spec, n_layer=layers or spec.n_layer)
    teacher = random_model(spec, "float16")
    count = (recipe.windows + recipe.check_windows + recipe.search_windows) * recipe.window + 1
    ids = np.random.default_rng(1).integers(0, spec.vocab_size, count).astype(np.int32)
    windows = quamba2.sample(ArrayTokens(ids), recipe, 0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = time.monotonic()
    packed, figures = quamba2.quantised(teacher, recipe, windows, device)
    seconds = time.monotonic() - begin
    out: dict[str, Any] = {
        "shape": shape,
        "layers": spec.n_layer,
        "mode": recipe.mode,
        "tokens": figures["tokens"],
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "float_bytes": teacher.nbytes(),
        "packed_bytes": packed.nbytes(),
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "finite": all(np.isfinite(t).all() for n, t in packed.tensors.items() if n.endswith("scale")),
        "final": {k: v for k, v in figures.items() if k not in ("tokens", "modes")},
    }
    if device.type == "cuda":
        out["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="mamba2-1.3b", help="mamba2-1.3b, mamba2-2.7b, mamba-1.4b, ...")
    parser.add_argument("--layers", type=int, default=0, help="calibrate so many layers alone (0: all)")
    parser.add_argument("--mode", nargs="+", default=["w4a8"], help="w8a8, w4a8, w4a16, mixed; each is one calibration")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], help="settings of the recipe, key=value")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the records there")
    args = parser.parse_args()
    record: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "torch": torch.__version__}
    record["runs"] = []
    for mode in args.mode:
        row = calibrated(args.shape, args.layers, [f"mode={mode}", *args.settings], torch.device(args.device))
        record["runs"].append(row)
        print(json.dumps(row), flush=True)
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
