"""A recipe with a list of stages: each begins from the model that the one before left; the result is one file.

    stages:
      - method: dfssm          # signs for z and x; out_proj stays float
        tokens: 33000000
        float_rows: [out]
      - method: ptq            # then out_proj at int4
        int4_rows: [out]

A stage leaves a whole packed directory, `OUT.work/stage-N`, and the next one opens it as it would any other model: a
method need not know that it is a stage. So `--resume` passes over the stages that are done and resumes the one that was
cut.
Tests: `pytest tests/methods/test_stages.py`.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import slimba
from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.packed import card_of, read_packed, write_packed
from slimba.data.tokens import Tokens
from slimba.errors import UserError
from slimba.formats import MatrixLayout
from slimba.models.spec import ModelSpec
from slimba.training import distributed
from slimba.training.loop import pick_device
from slimba.training.workdir import prepare_work, work_of

__all__ = ["Stage", "check_formats", "run_stages", "split_stages"]

Layouts = Mapping[str, MatrixLayout]


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """A method with its checked settings.

    run: the method's function. formats: the layouts of a model after the stage from those before it, UserError where
    the recipe does not fit them; None where the method does not say beforehand.
    """

    method: str
    recipe: Any
    run: Callable[..., dict[str, Any]]
    formats: Callable[[ModelSpec, Layouts, Any], Layouts] | None = None
    tokens: int | None = None


def split_stages(recipe: Mapping[str, Any], where: str) -> list[tuple[str, int | None, dict[str, Any]]]:
    """(method, tokens, settings) of every stage of a recipe file's content. UserError for what is not such a list."""
    unknown = set(recipe) - {"stages"}
    if unknown:
        raise UserError(f"{where}: {sorted(unknown)[0]!r} stands beside stages; put settings into the stages")
    listed = recipe["stages"]
    if not isinstance(listed, list) or not listed or not all(isinstance(s, dict) for s in listed):
        raise UserError(f"{where}: stages must be a list of mappings, each with a method and its settings")
    out = []
    for n, stage in enumerate(listed, 1):
        settings = dict(stage)
        method, tokens = settings.pop("method", None), settings.pop("tokens", None)
        if not isinstance(method, str):
            raise UserError(f"{where}: stage {n} names no method")
        if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1):
            raise UserError(f"{where}: tokens of stage {n} is {tokens!r}, it must be a whole number of at least 1")
        out.append((method, tokens, settings))
    return out


def check_formats(stages: Sequence[Stage], spec: ModelSpec, layouts: Layouts) -> None:
    """UserError naming the stage that does not fit what the ones before it leave, before any of them runs."""
    for n, stage in enumerate(stages, 1):
        if stage.formats is None:
            return
        try:
            layouts = stage.formats(spec, layouts, stage.recipe)
        except UserError as e:
            raise UserError(f"stage {n} ({stage.method}): {e}") from None


def run_stages(
    stages: Sequence[Stage],
    teacher: Checkpoint,
    out: Path,
    ids: np.ndarray | Tokens,
    *,
    data: dict[str, Any],
    seed: int,
    device: str,
    resume: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """Run the stages one after another and write the last one's model to `out`. Returns the record of all.

    Raises UserError as the methods do, and for `resume` with other settings.
    """
    check_formats(stages, teacher.spec, teacher.layouts)
    work = work_of(out)
    asked = [{"method": s.method, "tokens": s.tokens, "recipe": dataclasses.asdict(s.recipe)} for s in stages]
    record: dict[str, Any] = {"method": "stages", "slimba": slimba.__version__, "stages": asked, "seed": seed}
    record |= {"data": data, "teacher_sha256": teacher.sha256()}
    with distributed.group(pick_device(device)):
        distributed.from_first(lambda: prepare_work(work, record, resume, kept="stage-*"))
        source, done = teacher, []
        for n, stage in enumerate(stages, 1):
            place = work / f"stage-{n}"
            if not distributed.from_first(place.exists):
                stage.run(
                    source,
                    place,
                    ids,
                    stage.recipe,
                    data=data,
                    tokens=stage.tokens,
                    seed=seed,
                    device=device,
                    resume=work_of(place).exists(),
                    overwrite=False,
                )
                distributed.barrier()  # the first process wrote it
            source = read_packed(place)
            done.append(source)
        record |= summary([s.provenance for s in done])
        if distributed.first():
            last = dataclasses.replace(source, provenance=record)
            write_packed(last, out, card=card(done), overwrite=overwrite)
            for stage_out in (s.path for s in reversed(done)):
                log = stage_out / "training.jsonl" if stage_out else Path()
                if log.is_file():
                    shutil.copy(log, out / "training.jsonl")
                    break
            shutil.rmtree(work)
    return record


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the record says of all stages: their own records, tokens and seconds together, the last figures of each."""
    return {
        "stages": list(records),
        "tokens": sum(r["tokens"] for r in records),
        "seconds": round(sum(r["seconds"] for r in records), 1),
        "device": records[-1]["device"],
        "final": {f"{r['method']}.{k}": v for r in records for k, v in r["final"].items()},
    }


def card(done: Sequence[Checkpoint]) -> str:
    """The model card's body: every stage's own."""
    parts = [f"Made with `slimba compress` in {len(done)} stages, each from the model that the one before left."]
    for n, checkpoint in enumerate(done, 1):
        parts.append(f"## Stage {n}: {checkpoint.provenance['method']}\n\n{card_of(checkpoint).strip()}")
    return "\n\n".join(parts)
