"""One trained baseline from teacher to figures: the student, the loop and the losses are those of `dfssm`.

    bench = Bench(teacher, ids, texts, device, embedding="int8")
    rows = bench.run("sign", lr=1e-2, seed=0, tokens=8_000_000)

One teacher network and one set of tokens serve all arms of a process.
Tests: `pytest tests/benchmarks/test_run_baselines.py`.
"""

from __future__ import annotations

import copy
import gc
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import ARMS, Arm, Rates, Stage, Variant, arm_layouts
from counted import counted_size
from measure import figures
from torch import nn

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.packed import read_packed, write_packed
from slimba.data.batches import WindowBatches
from slimba.evaluation.perplexity import TextIds
from slimba.formats import MatrixLayout
from slimba.methods.dfssm.distil import DistilTask
from slimba.methods.dfssm.layers import array
from slimba.methods.dfssm.recipe import DfssmRecipe
from slimba.methods.dfssm.run import narrow_projections, settings_of
from slimba.methods.dfssm.student import Student
from slimba.models.lm import SSMForCausalLM, load_weights
from slimba.models.spec import ModelSpec
from slimba.training.loop import Group, train
from slimba.training.recipes import load_recipe

__all__ = ["SHARED", "BaselineStudent", "Bench", "Later"]

PROJECTIONS = ("in_proj", "out_proj")
CURVE_POINTS = 60
# the loop's settings that every baseline shares: those that the search for our own recipe found best, written out so
# that a later change of that recipe changes no baseline
SHARED: dict[str, Any] = {
    "window": 1024,
    "batch": 4,
    "micro_batch": 0,
    "warmup": 0.05,
    "decay": "linear",
    "beta2": 0.98,
    "grad_clip": 1.0,
    "optimizer_latent": "adamw",
    "temperature": 1.0,
    "label_weight": 0.0,
    "hidden_weight": 0.0,
    "hidden_until": 0.5,
    "blockwise_until": 0.0,
}


class BaselineStudent(Student):
    """The student with the arm's modules for in_proj and out_proj."""

    def __init__(
        self,
        spec: ModelSpec,
        layouts: dict[str, MatrixLayout],
        recipe: DfssmRecipe,
        maker: Callable[[MatrixLayout, int], nn.Module],
    ) -> None:
        self.maker = maker
        super().__init__(spec, layouts, recipe)

    def make(self, short: str, layout: MatrixLayout, n: int) -> nn.Module:
        return self.maker(layout, n) if short in PROJECTIONS else super().make(short, layout, n)

    def loras(self) -> list[nn.Parameter]:
        """What a stage that trains corrections only has to train."""
        return [p for m in self.stacks.values() if hasattr(m, "lora") for p in m.lora()]

    def export_as(self, variant: Variant) -> tuple[dict[str, np.ndarray], dict[str, MatrixLayout]]:
        """Tensors and layouts of the model as `variant` stores it."""
        tensors: dict[str, np.ndarray] = {}
        layouts: dict[str, MatrixLayout] = {}
        for key, names in self.names.items():
            for i, name in enumerate(names):
                ours = name.rpartition(".")[2] in PROJECTIONS
                matrix = variant.export(self.stacks[key], i) if ours else self.stack(key).export(i)
                layouts[name] = matrix.layout
                tensors |= {f"{name}.{part}": a for part, a in matrix.arrays.items()}
        for key, names in self.vector_names.items():
            ssm = self.spec.vectors()[names[0]][1] == "ssm"
            values = array(self.vectors[key]).astype(np.float32 if ssm else np.float16)
            tensors |= dict(zip(names, values, strict=True))
        return tensors, {name: layouts[name] for name in self.spec.matrices()}


class LoraTask(DistilTask):
    """The second stage of a post-hoc correction: only its factors are trained."""

    def groups(self) -> list[Group]:
        assert isinstance(self.model, BaselineStudent)
        chosen = self.model.loras()
        self.model.requires_grad_(False)
        for p in chosen:
            p.requires_grad_(True)
        return [Group("lora", chosen, self.recipe.lr_other)]


@dataclass(frozen=True, slots=True)
class Later(WindowBatches):
    """The batches from step `skip` on: a second stage goes on in the text where the first one stopped."""

    skip: int = 0

    def __getitem__(self, step: int) -> np.ndarray:
        return WindowBatches.__getitem__(self, step + self.skip)


class Bench:
    def __init__(
        self,
        teacher: Checkpoint,
        ids: np.ndarray,
        texts: Mapping[str, TextIds],
        device: torch.device,
        *,
        embedding: str = "int8",
        settings: Mapping[str, Any] | None = None,
        keep: Path | None = None,
        eval_window: int = 1024,
    ) -> None:
        self.teacher, self.ids, self.texts, self.device = teacher, ids, texts, device
        self.embedding, self.settings, self.keep = embedding, dict(settings or {}), keep
        self.eval_window = eval_window
        self.first = SSMForCausalLM(teacher.spec)  # float32, what students start from
        load_weights(self.first, teacher)
        self.first.to(device).eval().requires_grad_(False)
        self.network = copy.deepcopy(self.first)
        if device.type == "cuda":
            narrow_projections(self.network)

    def run(self, name: str, lr: float, seed: int, tokens: int, splits: tuple[str, ...]) -> list[dict[str, Any]]:
        """Train arm `name` and measure what it is exported as on `splits`: a row for each variant."""
        arm, begin = ARMS[name], time.perf_counter()
        torch.manual_seed(seed)
        recipe = self.recipe(arm.stages[0], lr)
        layouts = arm_layouts(self.teacher.spec, arm, self.embedding)
        student = BaselineStudent(self.teacher.spec, layouts, recipe, arm.make).to(self.device)
        whole = WindowBatches(self.ids, recipe.window, recipe.batch, seed)
        windows = torch.from_numpy(whole[0][:1, :-1].astype(np.int64)).to(self.device)
        student.initialise(self.first, windows)
        trained, curve = self.train(student, arm, whole, lr, tokens)
        shared = {
            "arm": name,
            "kind": "trained",
            "lr": lr,
            "seed": seed,
            "embedding": self.embedding,
            "budget": tokens,
            "tokens": trained["steps"] * whole.tokens_per_step,
            "seconds": round(trained["seconds"], 2),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU",
            "settings": trained["settings"],
            "curve": curve,
        }
        rows = [shared | self.measure(student, v, name, lr, seed, tokens, splits) for v in arm.variants]
        for row in rows:
            row["wall_seconds"] = round(time.perf_counter() - begin, 2)
        del student
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return rows

    def recipe(self, stage: Stage, lr: float) -> DfssmRecipe:
        rates: Rates = stage.rates(lr)
        values = SHARED | dict(stage.settings)
        values |= {"lr_latent": rates.latent, "lr_scale": rates.scale, "lr_other": rates.other}
        return load_recipe(DfssmRecipe, "dfssm.yaml", None, values | self.settings)

    def train(
        self, student: BaselineStudent, arm: Arm, whole: WindowBatches, lr: float, tokens: int
    ) -> tuple[dict[str, Any], list[list[float]]]:
        """All stages one after the other; steps and seconds of all, and the KL over the tokens, thinned."""
        total, done, seconds = whole.steps_for(tokens), 0, 0.0
        curve: list[list[float]] = []
        used = []
        for k, stage in enumerate(arm.stages):
            steps = total - done if k == len(arm.stages) - 1 else max(1, round(stage.share * total))
            recipe = self.recipe(stage, lr)
            task = (LoraTask if stage.only_lora else DistilTask)(student, self.network, recipe)
            batches = Later(self.ids, recipe.window, recipe.batch, whole.seed, skip=done)
            settings = settings_of(recipe, batches, steps * batches.tokens_per_step)
            with tempfile.TemporaryDirectory() as work:
                progress = train(task, batches, settings, Path(work))
                log = (Path(work) / "log.jsonl").read_text(encoding="utf-8").splitlines()
            at = done * whole.tokens_per_step
            curve += [[at + row["tokens"], row["kl"]] for row in thin([json.loads(line) for line in log])]
            done, seconds = done + progress.step, seconds + progress.seconds
            used.append({"share": stage.share} | dict(stage.settings) | {"rates": vars_of(stage.rates(lr))})
        return {"steps": done, "seconds": seconds, "settings": used}, curve

    def measure(
        self,
        student: BaselineStudent,
        v: Variant,
        name: str,
        lr: float,
        seed: int,
        tokens: int,
        splits: tuple[str, ...],
    ) -> dict[str, Any]:
        """Bytes and figures of one variant, from the packed file where its formats exist."""
        tensors, layouts = student.export_as(v)
        made = Checkpoint(
            self.teacher.spec,
            layouts,
            tensors,
            tokenizer_file=self.teacher.tokenizer_file,
            provenance={"method": f"baseline {v.name}", "lr": lr, "seed": seed, "tokens": tokens},
        )
        size = counted_size(self.teacher.spec, layouts, v.stated)
        texts = {k: self.texts[k] for k in splits}
        if v.stated is not None:
            got = figures(made, texts, self.device, self.eval_window)
        else:
            with tempfile.TemporaryDirectory() as scratch:
                place = (self.keep or Path(scratch)) / f"{v.name}-lr{lr:g}-seed{seed}-{tokens}"
                place.parent.mkdir(parents=True, exist_ok=True)
                got = figures(
                    read_packed(write_packed(made, place, overwrite=True)), texts, self.device, self.eval_window
                )
        return {
            "variant": v.name,
            "about": v.about,
            "simulated": v.stated is not None,
            "file_bytes": size.file_bytes,
            "bits_per_projection_weight": size.bits_per_projection_weight,
        } | got


def vars_of(rates: Rates) -> dict[str, float]:
    return {"latent": rates.latent, "scale": rates.scale, "other": rates.other}


def thin(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """At most CURVE_POINTS rows, each the mean KL of its neighbours at the last one's tokens."""
    size = max(1, -(-len(log) // CURVE_POINTS))
    pieces = [log[i : i + size] for i in range(0, len(log), size)]
    return [{"tokens": p[-1]["tokens"], "kl": round(sum(r["kl"] for r in p) / len(p), 4)} for p in pieces]
