"""`slimba compress --method dfssm`: a float teacher in, a packed one-bit model out.

    run(teacher, out, ids, recipe, device="auto", resume=False, ...)

Work in progress lives in `<out>.work/` (log, checkpoint, settings); it goes when the packed directory is in place.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import slimba
from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.packed import write_packed
from slimba.data.batches import WindowBatches
from slimba.data.tokens import Tokens
from slimba.errors import UserError
from slimba.methods.dfssm.distil import DistilTask
from slimba.methods.dfssm.recipe import DfssmRecipe, layouts
from slimba.methods.dfssm.student import Student
from slimba.methods.one_pass import check_finite
from slimba.models.lm import SSMForCausalLM, load_weights
from slimba.training import distributed
from slimba.training.loop import LoopSettings, pick_device, train
from slimba.training.workdir import finish_work, prepare_work, work_of

__all__ = ["run"]


def run(
    teacher: Checkpoint,
    out: Path,
    ids: np.ndarray | Tokens,
    recipe: DfssmRecipe,
    *,
    data: dict[str, Any],
    tokens: int | None,
    seed: int,
    device: str,
    resume: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """Distil `teacher` on `ids` and write the packed model to `out`. Returns the run's record.

    `ids` are int32 [n], or a text on its way; `data` describes where they came from. Started by torchrun, the processes
    share every batch. Raises UserError for a teacher that is not float or holds NaN, for `resume` with other settings,
    and where memory runs out.
    """
    teacher.require_float("the teacher")
    layouts(teacher.spec, recipe)  # refuses a recipe that does not fit the model before anything is written
    check_finite(teacher)
    with distributed.group(pick_device(device)) as where:
        distributed.share(recipe.batch)  # likewise a batch that does not fit the number of processes
        batches = WindowBatches(ids, recipe.window, recipe.batch, seed)
        settings = settings_of(recipe, batches, tokens)
        record: dict[str, Any] = {
            "method": "dfssm",
            "slimba": slimba.__version__,
            "recipe": dataclasses.asdict(recipe),
            "seed": seed,
            "data": data | batches.tokens.origin,
            "teacher_sha256": teacher.sha256(),
            "steps": settings.steps,
            "tokens": settings.steps * batches.tokens_per_step,
        }
        work = work_of(out)
        fresh = distributed.from_first(lambda: prepare_work(work, record, resume))
        try:
            student, task = build(teacher, recipe, batches, where, fresh)
            progress = train(task, batches, settings, work, resume=not fresh)
        except torch.cuda.OutOfMemoryError:
            raise UserError(
                "the GPU's memory is too small; set micro_batch to 1 or 2, or a smaller batch or window"
            ) from None
        record |= {
            "device": distributed.name_of(where),
            "seconds": round(progress.seconds, 1),
            "final": {k: round(v, 5) for k, v in progress.last.items()},
        }
        if distributed.first():
            export(student, teacher, record, out, overwrite)
            finish_work(work, out)
    return record


def export(student: Student, teacher: Checkpoint, record: dict[str, Any], out: Path, overwrite: bool) -> None:
    """Write the packed directory."""
    packed = Checkpoint(
        spec=teacher.spec,
        layouts=student.layouts,
        tensors=student.export(),
        tokenizer_file=teacher.tokenizer_file,
        provenance=record,
        generation=teacher.generation,
    )
    write_packed(packed, out, card=card(record), overwrite=overwrite)


def settings_of(recipe: DfssmRecipe, batches: WindowBatches, tokens: int | None) -> LoopSettings:
    """How the loop runs this recipe on these batches."""
    return LoopSettings(
        steps=batches.steps_for(tokens),
        warmup=recipe.warmup,
        decay=recipe.decay,
        betas=(0.9, recipe.beta2),
        clip=recipe.grad_clip,
        micro_batch=recipe.micro_batch,
        label="distilling",
    )


def build(
    teacher: Checkpoint, recipe: DfssmRecipe, batches: WindowBatches, where: torch.device, fresh: bool
) -> tuple[Student, DistilTask]:
    """Teacher network, student and task on the device.

    A student to be resumed is not fitted, nor is one that will take the first process's fit.
    """
    network = SSMForCausalLM(teacher.spec)
    load_weights(network, teacher)
    network.to(where).eval()
    student = Student(teacher.spec, layouts(teacher.spec, recipe), recipe).to(where)
    if fresh and distributed.first():
        windows = torch.from_numpy(batches.first(recipe.calibration_windows)[:, :-1]).to(where).long()
        student.initialise(network, windows)
    if where.type == "cuda":
        narrow_projections(network)
    return student, DistilTask(student, network, recipe)


def narrow_projections(network: SSMForCausalLM) -> None:
    """Hold the projections in bfloat16: the numbers that autocast makes of them in every step, in half the bytes.

    After the fit, which reads them in float32. The embedding is not narrowed, autocast leaves it alone.
    """
    for name in network.spec.matrices():
        if ".mixer." in name:
            weight = network.get_parameter(name + ".weight")
            weight.data = weight.data.bfloat16()


def parts(recipe: dict[str, Any]) -> str:
    """What the projections are made of, in words."""
    said = ["signs with row and column scales"]
    if recipe["plane"]:
        rows = ", ".join(recipe["plane_rows"])
        said.append(f"a second sign plane on {recipe['plane']:.0%} of the columns in the rows {rows}")
    if recipe["rank"]:
        said.append(f"an int8 low-rank correction of rank {recipe['rank']}")
    for kind in ("int8", "int4", "float"):
        if rows := ", ".join(recipe[f"{kind}_rows"]):
            said.append(f"{kind.replace('float', 'float16')} in the rows {rows}")
    return "; ".join(said)


def card(record: dict[str, Any]) -> str:
    """The model card's body."""
    hours = time.strftime("%H:%M:%S", time.gmtime(record["seconds"]))
    return f"""One-bit state-space model made with `slimba compress --method dfssm`.

- Projections: {parts(record["recipe"])}
- Distilled on {record["tokens"]:,} tokens in {record["steps"]:,} steps, {hours} on {record["device"]}
- Training text: {", ".join(record["data"].get("sources", [])) or "token ids given by the caller"}
- Last training figures: {", ".join(f"{k} {v}" for k, v in record["final"].items())}

`slimba inspect` on this directory shows the format of every layer and checks its checksums; `slimba eval` measures it.
"""
