"""The ablation ladder of quamba2: what each part is worth, on a float teacher, from packed files by the CPU engine.

    python benchmarks/quamba2_ladder.py --teacher MODEL --data train.txt.zst --text valid.txt.zst --out rows.jsonl \
        [--arms w4a8,w4a8-nearest] [--max-tokens 40961] [--window 1024] [--state int8] [--threads 1] [--keep DIR]

An arm is the default recipe with half of its windows and settings changed; `float` is the teacher. Rows that are in
the file already are not run again. `--state int8` or `bf16` measures with that recurrent state, stored as the engine
stores it while decoding. Run the tests: `pytest tests/benchmarks/test_quamba2_ladder.py`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.inventory import inventory_of
from slimba.checkpoints.packed import read_packed, write_packed
from slimba.checkpoints.reader import open_checkpoint
from slimba.data.tokenizer import Tokenizer
from slimba.data.tokens import open_tokens
from slimba.errors import UserError
from slimba.evaluation.perplexity import evaluate
from slimba.methods.quamba2.recipe import QuambaRecipe
from slimba.methods.quamba2.run import quantised, sample
from slimba.runtime.load import load
from slimba.training.recipes import load_recipe

__all__ = ["ARMS", "measure", "run_arm"]

SHORT: dict[str, Any] = {"windows": 16}  # half of the default, to save time
NO_HADAMARD: dict[str, Any] = {"hadamard": (), "residual": "off"}
# as published: rotated residual stream and untied head, one scale for a tensor, calibrated scales for activations
PUBLISHED: dict[str, Any] = {
    "residual": "fold",
    "int8_scale": "tensor",
    "input_scale": "static",
    "hadamard": ("out_proj",),
}
LADDER: dict[str, Any] = {"mode": "w4a8"} | PUBLISHED
ARMS: dict[str, dict[str, Any]] = {
    "w8a8": {"mode": "w8a8"},
    "w4a8": {"mode": "w4a8"},
    "w4a16": {"mode": "w4a16"},
    "mixed": {"mode": "mixed"},
    # without one part of the default
    "w8a8-nearest": {"mode": "w8a8", "rounding": "nearest"},
    "w4a8-nearest": {"mode": "w4a8", "rounding": "nearest"},
    "w4a16-nearest": {"mode": "w4a16", "rounding": "nearest"},
    "w8a8-no-hadamard": {"mode": "w8a8"} | NO_HADAMARD,
    "w4a8-no-hadamard": {"mode": "w4a8"} | NO_HADAMARD,
    "w4a16-no-hadamard": {"mode": "w4a16"} | NO_HADAMARD,
    "w4a8-nearest-no-hadamard": {"mode": "w4a8", "rounding": "nearest"} | NO_HADAMARD,
    "w4a8-hadamard-out": {"mode": "w4a8", "hadamard": ("out_proj",)},
    "w4a8-fold": {"mode": "w4a8", "residual": "fold"},
    "w4a8-int4-embedding": {"mode": "w4a8", "embedding": "int4"},
    "w4a16-int4-embedding": {"mode": "w4a16", "embedding": "int4"},
    "w4a8-windows-32": {"mode": "w4a8", "windows": 32},
    "w4a8-windows-4": {"mode": "w4a8", "windows": 4},
    # the published choices, one by one, on the default
    "w8a8-tensor": {"mode": "w8a8", "int8_scale": "tensor"},
    "w8a8-static": {"mode": "w8a8", "input_scale": "static"},
    "w8a8-static-no-hadamard": {"mode": "w8a8", "input_scale": "static"} | NO_HADAMARD,
    "w4a8-static": {"mode": "w4a8", "input_scale": "static"},
    "w8a8-scan-tensor": {"mode": "w8a8", "ssm_inputs": "tensor"},
    "w8a8-scan-percentile": {"mode": "w8a8", "ssm_inputs": "tensor", "percentile": 0.9995},
    "w8a8-scan-group": {"mode": "w8a8", "ssm_inputs": "group"},
    "w8a8-scan-cluster": {"mode": "w8a8", "ssm_inputs": "cluster"},
    "w8a8-scan-channel": {"mode": "w8a8", "ssm_inputs": "channel"},
    # the published ladder, each rung with all those before it
    "ladder-0": LADDER | {"rounding": "nearest", "ssm_inputs": "tensor"} | NO_HADAMARD,
    "ladder-1-hadamard": LADDER | {"rounding": "nearest", "ssm_inputs": "tensor"},
    "ladder-2-gptq": LADDER | {"ssm_inputs": "tensor"},
    "ladder-3-groups": LADDER | {"ssm_inputs": "group"},
    "ladder-4-clusters": LADDER | {"ssm_inputs": "cluster"},
    "published-w8a8": {"mode": "w8a8", "rounding": "nearest", "ssm_inputs": "cluster"} | PUBLISHED,
}


def run_arm(
    name: str, teacher: Checkpoint, data: list[str], out: Path, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Quantise `teacher` with the settings of the arm into `out`; returns seconds and what the method says."""
    recipe = load_recipe(QuambaRecipe, "quamba2.yaml", None, SHORT | ARMS[name])
    assert teacher.tokenizer_file is not None
    words = Tokenizer.from_file(teacher.tokenizer_file)
    bos = next(i for i in (teacher.spec.bos_token_id, teacher.spec.eos_token_id, words.eot_id) if i is not None)
    with open_tokens(data, words, bos_id=bos, n_vocab=teacher.spec.vocab_size, split="blank-line") as text:
        windows = sample(text, recipe, seed)
    begin = time.perf_counter()
    made, figures = quantised(teacher, recipe, windows, torch.device(device), seed)
    seconds = time.perf_counter() - begin
    write_packed(made, out, overwrite=True)
    return {"settings": SHORT | ARMS[name], "seconds": round(seconds, 1), "calibration": figures}


def measure(model: str | Path, text: Path, **how: Any) -> dict[str, Any]:
    """Perplexity of the file on disk by the CPU engine, as `slimba eval --split-documents blank-line` has it."""
    state, threads, window, most = (how.get(k) for k in ("state", "threads", "window", "max_tokens"))
    loaded = load(model, backend="cpu", threads=threads, state_dtype=state)
    result = evaluate(loaded, [text], window=window or 1024, split_documents="blank-line", max_tokens=most)
    return {"perplexity": result.perplexity, "tokens": result.tokens, "state": loaded.state_dtype}


def main() -> None:
    args = argparse.ArgumentParser(description="Ablation ladder of quamba2.")
    for name in ("teacher", "text", "out"):
        args.add_argument("--" + name, required=True)
    args.add_argument("--data", action="append", required=True)
    args.add_argument("--arms", default="float," + ",".join(ARMS), help="separated by commas")
    args.add_argument("--max-tokens", type=int)
    args.add_argument("--window", type=int, default=1024)
    args.add_argument("--state", choices=["fp32", "bf16", "int8"])
    args.add_argument("--threads", type=int)
    args.add_argument("--device", default="cpu")
    args.add_argument("--keep", type=Path, help="keep the packed models here, and take those that are there")
    a = args.parse_args()

    teacher = open_checkpoint(a.teacher)
    out = Path(a.out)
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    how = {"window": a.window, "state": a.state, "threads": a.threads, "max_tokens": a.max_tokens}
    for name in a.arms.split(","):
        if name != "float" and name not in ARMS:
            raise UserError(f"unknown arm {name!r}, known are float, {', '.join(ARMS)}")
        key = {"arm": name, "text": Path(a.text).name, "window": a.window, "max_tokens": a.max_tokens}
        key["asked_state"] = a.state
        if any(all(row.get(k) == v for k, v in key.items()) for row in done):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            model, row = Path(a.teacher), dict(key)
            if name != "float":
                model = (a.keep or Path(scratch)) / name
                row |= {} if model.exists() else run_arm(name, teacher, a.data, model, a.device)
                size = inventory_of(read_packed(model))
                row |= {"file_bytes": size.file_bytes, "bits": size.bits_per_projection_weight}
            row |= measure(model, Path(a.text), **how)
        with out.open("a") as f:
            f.write(json.dumps(row) + "\n")
        print(name, f"{row['perplexity']:.3f}", row.get("seconds", ""), flush=True)


if __name__ == "__main__":
    main()
