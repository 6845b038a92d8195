"""Screen settings of `dfssm` on one GPU: each arm distils, and the deployed student is measured on held-out text.

    python benchmarks/screen_dfssm.py TEACHER --data train.txt.zst --valid valid.txt.zst \
        --tokens 8000000 --arm "lr_latent=1e-3" --arm "lr_latent=1e-2 rank=32" --out results.json

For choosing settings quickly; figures that are reported come from `slimba eval` on the packed file. `--keep DIR`
also writes the packed model of every arm. The teacher's own figure is the first row.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.inventory import inventory_of
from slimba.checkpoints.packed import write_packed
from slimba.checkpoints.reader import open_checkpoint
from slimba.data.batches import WindowBatches
from slimba.data.text import documents, encode_documents
from slimba.data.tokenizer import Tokenizer
from slimba.methods.dfssm.recipe import DfssmRecipe
from slimba.methods.dfssm.run import build, settings_of
from slimba.models.lm import SSMForCausalLM, load_weights
from slimba.training.loop import pick_device, train
from slimba.training.losses import cross_entropy
from slimba.training.recipes import load_recipe, parse_overrides


@torch.no_grad()
def perplexity(features, head: torch.Tensor, ids: np.ndarray, window: int, device: torch.device) -> float:
    """Windows without overlap, as `slimba eval` does, in bfloat16 on a GPU."""
    n = (len(ids) - 1) // window
    x = torch.from_numpy(ids[: n * window].astype(np.int64)).view(n, window).to(device)
    y = torch.from_numpy(ids[1 : n * window + 1].astype(np.int64)).view(n, window).to(device)
    total = 0.0
    for at in range(0, n, 32):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            f = features(x[at : at + 32])
        total += float(cross_entropy(f.float(), head.float(), y[at : at + 32], torch.float32)) * f.shape[0]
    return math.exp(total / n)


def teacher_row(teacher: Checkpoint, valid: np.ndarray, device: torch.device) -> dict:
    network = SSMForCausalLM(teacher.spec).to(device)
    load_weights(network, teacher)
    ppl = perplexity(lambda x: network.features(x)[0], network.head_weight, valid, 1024, device)
    return {"arm": "teacher", "valid_ppl": round(ppl, 3)}


def run_arm(
    teacher: Checkpoint,
    arm: str,
    ids: np.ndarray,
    valid: np.ndarray,
    tokens: int | None,
    device: torch.device,
    keep: Path | None,
) -> dict:
    """Distil with the settings of `arm`, measure the deployed student, optionally write it."""
    recipe = load_recipe(DfssmRecipe, "dfssm.yaml", None, parse_overrides(arm.split()))
    batches = WindowBatches(ids, recipe.window, recipe.batch, 0)
    started = time.time()
    student, task = build(teacher, recipe, batches, device, True)
    fitted = time.time() - started
    with tempfile.TemporaryDirectory() as work:
        progress = train(task, batches, settings_of(recipe, batches, tokens), Path(work))
    with student.deployed(), torch.no_grad():
        weights = {"lm." + k: v for k, v in student.effective().items()}
        head = weights["lm." + task.head]
        run = torch.func.functional_call
        ppl = perplexity(lambda x: run(task.network, weights, (x,))[0], head, valid, 1024, device)
    packed = Checkpoint(
        spec=teacher.spec,
        layouts=student.layouts,
        tensors=student.export(),
        tokenizer_file=teacher.tokenizer_file,
        provenance={"method": "dfssm", "arm": arm, "tokens": progress.step * batches.tokens_per_step},
    )
    if keep:
        write_packed(packed, keep, overwrite=True)
    row = {"arm": arm, "valid_ppl": round(ppl, 3), "kl": round(progress.last["kl"], 4)}
    row |= {"bits": round(inventory_of(packed).bits_per_projection_weight, 3), "steps": progress.step}
    row |= {"fit_s": round(fitted, 1), "train_s": round(progress.seconds, 1)}
    row |= {"tok_s": round(progress.step * batches.tokens_per_step / progress.seconds)}
    if device.type == "cuda":
        row["peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    return row


def main() -> None:
    args = argparse.ArgumentParser()
    args.add_argument("teacher")
    args.add_argument("--data", nargs="+", required=True)
    args.add_argument("--valid", required=True)
    args.add_argument("--tokens", type=int)
    args.add_argument("--arm", action="append", default=[], help="space-separated key=value settings")
    args.add_argument("--keep", type=Path)
    args.add_argument("--out", type=Path)
    a = args.parse_args()

    device = pick_device("auto")
    teacher = open_checkpoint(a.teacher)
    words = Tokenizer.from_file(teacher.tokenizer_file)
    bos = teacher.spec.bos_token_id
    started = time.time()
    ids = encode_documents(words, documents(a.data), bos)
    valid = encode_documents(words, documents([a.valid]), bos)
    print(f"tokenised {len(ids):,} + {len(valid):,} tokens in {time.time() - started:.0f} s", flush=True)

    rows: list[dict] = []
    for arm in a.arm or [""]:
        if not rows:
            rows.append(teacher_row(teacher, valid, device))
            print(rows[-1], flush=True)
        keep = a.keep / f"arm{len(rows)}" if a.keep else None
        rows.append(run_arm(teacher, arm, ids, valid, a.tokens, device, keep))
        print(rows[-1], flush=True)
    if a.out:
        a.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
