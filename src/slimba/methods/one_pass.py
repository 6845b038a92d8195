"""What a method that quantises in one pass over a few windows does besides: checks, the record, the packed file.

    one_pass("ptq", teacher, out, recipe, gather, quantise, card, data=..., seed=0, device="auto", ...)

Tests: `pytest tests/methods/test_ptq.py tests/methods/test_quamba2.py`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import slimba
from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.packed import write_packed
from slimba.errors import UserError
from slimba.training import distributed
from slimba.training.loop import pick_device

__all__ = ["Made", "check_finite", "for_tokens", "one_pass"]

Recipe = TypeVar("Recipe")


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """A packed model, the number of tokens that it was calibrated on, the record's figures, and what else it says."""

    packed: Checkpoint
    tokens: int
    final: dict[str, float]
    also: dict[str, Any] = dataclasses.field(default_factory=dict)


def check_finite(teacher: Checkpoint) -> None:
    """UserError naming the first tensor of the teacher that holds NaN or infinity."""
    for name, tensor in teacher.tensors.items():
        if not np.isfinite(np.asarray(tensor).astype(np.float32)).all():
            raise UserError(
                f"the teacher's {name} holds NaN or infinity; the checkpoint is damaged or diverged in training"
            )


def for_tokens(recipe: Recipe, tokens: int | None) -> Recipe:
    """The recipe with as many windows as `tokens` fill, at least one; as it is for None."""
    if tokens is None:
        return recipe
    return dataclasses.replace(recipe, windows=max(1, tokens // recipe.window))  # type: ignore[type-var, attr-defined]


def one_pass(
    method: str,
    teacher: Checkpoint,
    out: Path,
    recipe: Any,
    gather: Callable[[torch.device], tuple[torch.Tensor, dict[str, Any]]],
    quantise: Callable[[torch.Tensor, torch.device], Made],
    card: Callable[[dict[str, Any]], str],
    *,
    data: dict[str, Any],
    seed: int,
    device: str,
    resume: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """Quantise windows' worth of text and write the packed model to `out`. Returns the run's record.

    gather: windows of token ids and where they come from, on the device to work on. Started by torchrun, the first
    process works and the others wait. Raises UserError for a teacher with NaN, for `resume`, and where memory runs out.
    """
    if resume:
        raise UserError(f"{method} takes minutes and keeps nothing to resume; start it again without --resume")
    check_finite(teacher)
    with distributed.group(pick_device(device)) as where:

        def work() -> dict[str, Any]:
            windows, origin = gather(where)
            begin = time.monotonic()
            try:
                made = quantise(windows, where)
            except torch.cuda.OutOfMemoryError:
                raise UserError("the GPU's memory is too small; set micro_batch to 1, or use fewer windows") from None
            made.packed.provenance = record = {
                "method": method,
                "slimba": slimba.__version__,
                "recipe": dataclasses.asdict(recipe),
                "seed": seed,
                "data": data | origin,
                "teacher_sha256": teacher.sha256(),
                "tokens": made.tokens,
                **made.also,
                "device": distributed.name_of(where),
                "seconds": round(time.monotonic() - begin, 1),
                "final": made.final,
            }
            write_packed(made.packed, out, card=card(record), overwrite=overwrite)
            return record

        return distributed.from_first(work)
