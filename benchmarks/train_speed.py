"""Speed and memory of `dfssm` training steps at a named shape, with random weights: what a budget of tokens will take.

    python benchmarks/train_speed.py --shape mamba2-1.3b --window 2048 --batch 4 --micro-batch 1 --json h200.json
    torchrun --nproc_per_node 2 benchmarks/train_speed.py --alone-first --batch 8 --json two.json

With --alone-first the first process measures by itself before the others join, with as many windows a step as each
will have then; "alone" holds its figures and "speed_up" the ratio, both from one run on one machine.

Real steps of the real loop: the teacher's forward, KL over the whole vocabulary, the hidden-state loss and rounding all
on (the dearest phase), AdamW. On a GPU the first steps are eager and then captured; those are the warm-up. Prints
JSON; tokens/s are the mean of the steps after it. `--smoke` tries the path on a CPU with a tiny shape; the test is
tests/methods/test_train_speed.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import os
import re
import resource
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.data.batches import WindowBatches
from slimba.formats import MatrixLayout
from slimba.methods.dfssm.recipe import DfssmRecipe
from slimba.methods.dfssm.run import build, settings_of
from slimba.models.configs import named_spec
from slimba.models.lm import SSMForCausalLM, init_weights
from slimba.models.spec import ModelSpec
from slimba.training import distributed
from slimba.training.loop import pick_device, recomputes, train
from slimba.training.recipes import load_recipe

TINY = ModelSpec(
    architecture="mamba2", n_layer=2, d_model=32, d_inner=64, d_state=16, vocab_size=64, headdim=16, norm_group_size=64
)
BUDGET = 32_000_000  # tokens
# everything on from the first step to the last, so that every step costs the same; a small fit, it is not measured
ALL_ON = {"round_from": 0.0, "freeze_from": 1.0, "hidden_until": 1.0, "calibration_windows": 1, "init_rounds": 1}


def random_teacher(spec: ModelSpec) -> Checkpoint:
    """A float32 teacher with the first weights of training, the same in every layer: speed does not ask for more."""
    one = SSMForCausalLM(dataclasses.replace(spec, n_layer=1))
    init_weights(one, 0)
    drawn = {name: p.detach().numpy() for name, p in one.state_dict().items()}
    plain = {name: MatrixLayout.plain(rows, cols, "float32") for name, (rows, cols) in spec.matrices().items()}
    names = [name + ".weight" for name in plain] + list(spec.vectors())
    return Checkpoint(spec, plain, {name: drawn[re.sub(r"layers\.\d+", "layers.0", name)] for name in names})


def measure(
    spec: ModelSpec, recipe: DfssmRecipe, steps: int, warmup: int, where: torch.device, cuda_graph: bool
) -> dict[str, Any]:
    """The figures of this process; every process takes part."""
    total = warmup + steps
    tokens = total * recipe.window * recipe.batch
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, tokens + 1).astype(np.int32)
    batches = WindowBatches(ids, recipe.window, recipe.batch)
    student, task = build(random_teacher(spec), recipe, batches, where, True)
    if where.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    settings = settings_of(recipe, batches, tokens)
    settings = dataclasses.replace(settings, log_every=1, save_every_s=math.inf, cuda_graph=cuda_graph)
    with tempfile.TemporaryDirectory() as work:
        train(task, batches, settings, Path(work))
        if not distributed.first():
            return {}
        rows = [json.loads(row) for row in (Path(work) / "log.jsonl").read_text().splitlines()]
    seconds = (rows[-1]["seconds"] - rows[warmup - 1]["seconds"]) / steps
    speed = batches.tokens_per_step / seconds
    return {
        "parameters": sum(p.numel() for p in task.teacher.parameters()),
        "trained_numbers": sum(p.numel() for p in student.parameters()),
        "measured_steps": steps,
        "step_seconds": seconds,
        "tokens_per_second": speed,
        "hours_for_32M_tokens": BUDGET / speed / 3600,
        "loss": {"first": rows[0]["loss"], "last": rows[-1]["loss"]},
        "memory": peak_memory(where),
    }


def peak_memory(where: torch.device) -> dict[str, int]:
    """Bytes at their highest: of the GPU since the fit, or of this whole process."""
    if where.type == "cuda":
        return {"gpu_allocated": torch.cuda.max_memory_allocated(), "gpu_reserved": torch.cuda.max_memory_reserved()}
    return {"process_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def measure_alone(spec: ModelSpec, recipe: DfssmRecipe, args: argparse.Namespace) -> dict[str, Any] | None:
    """Figures of the first process before it joins the others, with its share of the batch; None in the others."""
    if os.environ.get("RANK") != "0":
        return None
    share = dataclasses.replace(recipe, batch=recipe.batch // int(os.environ["WORLD_SIZE"]))
    figures = measure(spec, share, args.steps, args.warmup, pick_device(args.device), not args.no_cuda_graph)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"batch": share.batch, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="mamba2-1.3b", help="a published size such as mamba2-130m, or tiny")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4, help="windows of a step, of all processes together")
    parser.add_argument("--micro-batch", type=int, default=1, help="windows at a time in each process; 0: all")
    parser.add_argument("--activation-checkpointing", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--steps", type=int, default=10, help="measured steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before; 5 hold the eager ones and the capture")
    parser.add_argument("--no-cuda-graph", action="store_true", help="launch every kernel; for comparison")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--alone-first", action="store_true", help="under torchrun: also one process by itself")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape on the CPU; its figures mean nothing")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    if args.smoke:
        args.shape, args.device, args.window, args.steps, args.warmup = "tiny", "cpu", 16, 3, 2
    if args.alone_first and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        parser.error("--alone-first needs several processes; start the script with torchrun")
    if min(args.steps, args.warmup) < 1:
        parser.error("--steps and --warmup must be at least 1")

    spec = TINY if args.shape == "tiny" else named_spec(args.shape)
    settings = {
        "window": args.window,
        "batch": args.batch,
        "micro_batch": args.micro_batch,
        "activation_checkpointing": args.activation_checkpointing,
    }
    recipe = load_recipe(DfssmRecipe, "dfssm.yaml", None, ALL_ON | settings)
    alone = measure_alone(spec, recipe, args) if args.alone_first else None
    with distributed.group(pick_device(args.device)) as where:
        figures = measure(spec, recipe, args.steps, args.warmup, where, not args.no_cuda_graph)
        record = {
            "shape": args.shape,
            "device": distributed.name_of(where),
            "processes": distributed.world(),
            **{k: settings[k] for k in ("window", "batch", "micro_batch")},
            "activation_checkpointing": recomputes(args.activation_checkpointing, spec),
            "teacher_projections": "bfloat16" if where.type == "cuda" else "float32",
            "cuda_graph": where.type == "cuda" and not args.no_cuda_graph,
            "torch": torch.__version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **figures,
        }
        if alone:
            record |= {"alone": alone, "speed_up": figures["tokens_per_second"] / alone["tokens_per_second"]}
        if distributed.first():
            text = json.dumps(record, indent=2)
            print(text)
            if args.json:
                args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
