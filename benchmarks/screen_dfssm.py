"""Screen settings of `dfssm` on one GPU: each arm distils, and the deployed student is measured on held-out text.

    python benchmarks/screen_dfssm.py TEACHER --ids train.npy --valid valid.npy --test test.npy \
        --arms arms.txt --shard 0/2 --out rows.jsonl --keep models

An arm is a line `name: key=value key=value ...` of recipe settings; `tokens=`, `seed=`, `recipe=FILE` and `keep=1` are
its own. Token files are NumPy arrays, or text files, tokenised as `slimba compress` does. A row is appended as an arm
ends and arms already in the file are skipped, so a run that was cut continues. Two processes with --shard 0/2 and 1/2
use two GPUs.

Rows are for choosing settings: the deployed weights run in bfloat16. Figures that are reported come from `slimba eval`
on the packed file, which `keep=1` writes to --keep. The teacher's own figures, measured alike, are the first row.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.inventory import inventory_of
from slimba.checkpoints.packed import write_packed
from slimba.checkpoints.reader import open_checkpoint
from slimba.data.batches import WindowBatches
from slimba.errors import UserError
from slimba.methods.dfssm.distil import DistilTask
from slimba.methods.dfssm.recipe import DfssmRecipe
from slimba.methods.dfssm.run import build, settings_of
from slimba.methods.dfssm.student import Student
from slimba.models.lm import SSMForCausalLM, load_weights
from slimba.training.loop import pick_device, train
from slimba.training.losses import cross_entropy
from slimba.training.recipes import load_recipe, parse_overrides

OWN = ("tokens", "seed", "recipe", "keep")
# what the first fit depends on: arms that share these share the fit
FIT = ("rank", "int8_rows", "int4_rows", "float_rows", "plane", "plane_rows", "embedding", "window")
FIT += ("calibration_windows", "init_rounds", "col_floor")


def token_ids(path: Path, teacher: Checkpoint) -> np.ndarray:
    """int32 [n] of a .npy file, or of a text with the teacher's tokenizer."""
    if path.suffix == ".npy":
        return np.load(path).astype(np.int32)
    from slimba.data.text import documents, encode_documents
    from slimba.data.tokenizer import Tokenizer

    if teacher.tokenizer_file is None:
        raise UserError(f"the teacher has no tokenizer to read {path} with; give token ids as .npy")
    return encode_documents(Tokenizer.from_file(teacher.tokenizer_file), documents([path]), teacher.spec.bos_token_id)


@torch.no_grad()
def perplexity(network: SSMForCausalLM, weights: dict[str, torch.Tensor], ids: np.ndarray, window: int = 1024) -> float:
    """Windows without overlap from an empty state, as `slimba eval` does, in bfloat16 on a GPU."""
    device = next(iter(weights.values())).device
    n = (len(ids) - 1) // window
    x = torch.from_numpy(ids[: n * window].astype(np.int64)).view(n, window).to(device)
    y = torch.from_numpy(ids[1 : n * window + 1].astype(np.int64)).view(n, window).to(device)
    head = weights.get("lm_head.weight", weights["backbone.embeddings.weight"]).float()
    inside = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    total = 0.0
    for at in range(0, n, 32):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = torch.func.functional_call(network.backbone, inside, (x[at : at + 32],))
        total += float(cross_entropy(features.float(), head, y[at : at + 32], torch.float32)) * features.shape[0]
    return math.exp(total / n)


class Screen:
    """The teacher, the texts, and the first fits that arms share."""

    def __init__(
        self, teacher: Checkpoint, ids: np.ndarray, held_out: dict[str, np.ndarray], keep: Path | None
    ) -> None:
        self.teacher, self.ids, self.held_out, self.keep = teacher, ids, held_out, keep
        self.device = pick_device("auto")
        self.fits: dict[str, dict[str, torch.Tensor]] = {}

    def teacher_row(self) -> dict[str, Any]:
        network = SSMForCausalLM(self.teacher.spec).to(self.device)
        load_weights(network, self.teacher)
        weights = dict(network.named_parameters())
        return {"arm": "teacher"} | {
            f"{k}_ppl": round(perplexity(network, weights, v), 3) for k, v in self.held_out.items()
        }

    def student(self, recipe: DfssmRecipe, batches: WindowBatches) -> tuple[Student, DistilTask, float]:
        """Fitted, and the seconds that took; arms whose fit is the same share it."""
        started = time.time()
        key = repr([getattr(recipe, name) for name in FIT])
        student, task = build(self.teacher, recipe, batches, self.device, key not in self.fits)
        if key in self.fits:
            student.load_state_dict(self.fits[key])
        else:
            self.fits[key] = {k: v.clone() for k, v in student.state_dict().items()}
        return student, task, time.time() - started

    def run(self, name: str, settings: dict[str, str]) -> dict[str, Any]:
        """Distil an arm, measure the deployed student, write it if it is to be kept."""
        own = {k: settings.pop(k) for k in OWN if k in settings}
        file = Path(own["recipe"]) if "recipe" in own else None
        recipe = load_recipe(
            DfssmRecipe, "dfssm.yaml", file, parse_overrides([f"{k}={v}" for k, v in settings.items()])
        )
        tokens, seed = (int(float(own[k])) if k in own else None for k in ("tokens", "seed"))
        batches = WindowBatches(self.ids, recipe.window, recipe.batch, seed or 0)
        student, task, fit_seconds = self.student(recipe, batches)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as work:
            progress = train(task, batches, settings_of(recipe, batches, tokens), Path(work))
            log = [json.loads(line) for line in (Path(work) / "log.jsonl").read_text().splitlines()]
        with student.deployed(task.dtype), torch.no_grad():
            weights = student.effective()
        said = {k: own[k] for k in ("recipe",) if k in own} | settings
        row: dict[str, Any] = {"arm": name, "settings": said, "seed": seed or 0}
        row |= {f"{k}_ppl": round(perplexity(task.network.lm, weights, v), 3) for k, v in self.held_out.items()}
        packed = Checkpoint(
            spec=self.teacher.spec,
            layouts=student.layouts,
            tensors=student.export(),
            tokenizer_file=self.teacher.tokenizer_file,
            provenance={"method": "dfssm", "arm": name, "settings": settings, "seed": seed or 0},
        )
        inventory = inventory_of(packed)
        row |= {"bits": round(inventory.bits_per_projection_weight, 4), "bytes": inventory.file_bytes}
        row |= {
            "kl": round(log[-1]["kl"], 4),
            "steps": progress.step,
            "tokens": progress.step * batches.tokens_per_step,
        }
        row |= {"fit_s": round(fit_seconds, 1), "train_s": round(progress.seconds, 1)}
        if self.device.type == "cuda":
            row |= {
                "device": torch.cuda.get_device_name(),
                "peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 1),
            }
        if own.get("keep") and self.keep:
            packed.provenance |= {k: row[k] for k in ("tokens", "steps", "train_s")}
            write_packed(packed, self.keep / name, overwrite=True)
            (self.keep / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
        return row


def read_arms(path: Path) -> dict[str, dict[str, str]]:
    """Lines `name: key=value ...`; # begins a comment."""
    arms: dict[str, dict[str, str]] = {}
    for line in path.read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line:
            name, _, rest = line.partition(":")
            arms[name.strip()] = dict(item.split("=", 1) for item in rest.split())
    return arms


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("teacher")
    args.add_argument("--ids", type=Path, required=True, help="training text or tokens")
    args.add_argument("--valid", type=Path, required=True)
    args.add_argument("--test", type=Path)
    args.add_argument("--arms", type=Path, required=True)
    args.add_argument("--shard", default="0/1", help="i/n: every n-th arm from the i-th")
    args.add_argument("--seconds", type=float, default=math.inf, help="begin no arm after this time")
    args.add_argument("--keep", type=Path, help="folder for the packed models of arms with keep=1")
    args.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    a = args.parse_args()

    started = time.time()
    teacher = open_checkpoint(a.teacher)
    held_out = {k: token_ids(p, teacher) for k, p in (("valid", a.valid), ("test", a.test)) if p}
    screen = Screen(teacher, token_ids(a.ids, teacher), held_out, a.keep)
    done = {json.loads(line)["arm"] for line in a.out.read_text().splitlines()} if a.out.is_file() else set()
    i, n = map(int, a.shard.split("/"))
    with open(a.out, "a") as out:

        def write(row: dict[str, Any]) -> None:
            print(json.dumps(row), flush=True)
            out.write(json.dumps(row) + "\n")
            out.flush()

        if i == 0 and "teacher" not in done:
            write(screen.teacher_row())
        for name, settings in list(read_arms(a.arms).items())[i::n]:
            if name in done or time.time() - started > a.seconds:
                continue
            try:
                write(screen.run(name, settings))
            except UserError as e:  # a diverged arm is a result too
                write({"arm": name, "settings": settings, "error": str(e)})


if __name__ == "__main__":
    main()
