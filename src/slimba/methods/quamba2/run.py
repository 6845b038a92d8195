"""`slimba compress --method quamba2`: a float model in, a quantised one out, in one pass over a few windows of text.

run(teacher, out, ids, recipe, device="auto", ...)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.data.tokens import ArrayTokens, Tokens
from slimba.errors import UserError
from slimba.evaluation.perplexity import progress_bar
from slimba.methods.one_pass import Made, for_tokens, one_pass
from slimba.methods.quamba2.fold import Source
from slimba.methods.quamba2.model import Fitness, calibrate, compare
from slimba.methods.quamba2.recipe import QuambaRecipe, folds
from slimba.methods.quamba2.search import budget_of, search

__all__ = ["quantised", "run", "sample"]

SAMPLE = 1 << 20  # the windows come from so many tokens at the start of the text: nobody waits for more to be tokenised


def run(
    teacher: Checkpoint,
    out: Path,
    ids: np.ndarray | Tokens,
    recipe: QuambaRecipe,
    *,
    data: dict[str, Any],
    tokens: int | None,
    seed: int,
    device: str,
    resume: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """Quantise `teacher` and write the packed model to `out`. Returns the run's record.

    `tokens`: how many to calibrate on instead of the recipe's windows. Started by torchrun, the first process works and
    the others wait. Raises UserError for a teacher that is not float or holds NaN, for `resume`, and where memory runs
    out.
    """
    teacher.require_float("the teacher")
    recipe = for_tokens(recipe, tokens)
    text = ArrayTokens(ids) if isinstance(ids, np.ndarray) else ids

    def gather(_where: torch.device) -> tuple[torch.Tensor, dict[str, Any]]:
        return sample(text, recipe, seed), text.origin

    def quantise(windows: torch.Tensor, where: torch.device) -> Made:
        packed, figures = quantised(teacher, recipe, windows, where, seed)
        used, also = figures.pop("tokens"), {k: figures.pop(k) for k in ("modes",) if k in figures}
        return Made(packed, used, {k: round(v, 5) for k, v in figures.items()}, also)

    settings: dict[str, Any] = {"data": data, "seed": seed, "device": device, "resume": resume, "overwrite": overwrite}
    return one_pass("quamba2", teacher, out, recipe, gather, quantise, card, **settings)


def sample(text: Tokens, recipe: QuambaRecipe, seed: int) -> torch.Tensor:
    """int64 [n, window + 1]: windows for calibration, for the search, held out; fewer where the text is short."""
    wanted, length = recipe.windows + searched(recipe) + recipe.check_windows, recipe.window
    have = min(text.wait(max(SAMPLE, wanted * length + 1)), max(SAMPLE, wanted * length + 1))
    if have <= length:
        raise UserError(f"the text has {have} tokens, fewer than one window of {length}; give more or a shorter window")
    order = np.random.default_rng(seed).permutation((have - 1) // length)[:wanted]
    return torch.from_numpy(np.stack([text.read(i * length, (i + 1) * length + 1) for i in order]).astype(np.int64))


@torch.inference_mode()
def quantised(
    teacher: Checkpoint, recipe: QuambaRecipe, windows: torch.Tensor, device: torch.device, seed: int = 0
) -> tuple[Checkpoint, dict[str, Any]]:
    """The packed model in memory, and `tokens` calibrated on with what the held-out windows say.

    In the mode mixed also `modes`, one a layer, and the best KL of the first and the last generation.
    """
    used, held_out = windows[: recipe.windows], windows[recipe.windows + searched(recipe) :]
    source = Source(teacher, fold=folds(teacher.spec, recipe), device=device)
    budget = budget_of(source.spec, recipe) if recipe.mode == "mixed" else None
    with progress_bar("calibrating layers", source.spec.n_layer, show=True) as advance:
        packed = calibrate(source, recipe, used[:, :-1], device, advance)
    figures: dict[str, Any] = {"tokens": used[:, :-1].numel()}
    modes: Sequence[str] = [recipe.modes[0]] * source.spec.n_layer
    if budget is not None:
        trial = windows[recipe.windows :][: recipe.search_windows]
        fitness = Fitness(source, packed, trial if len(trial) else used[-recipe.search_windows :], device)
        settings = {"population": recipe.population, "generations": recipe.generations, "seed": seed}
        modes, history = search(budget, fitness, recipe.modes, **settings)
        figures |= {"search_first": history[0], "search_kl": history[-1], "modes": list(modes)}
    if len(held_out):
        figures |= compare(source, packed, modes, held_out, device)
    numerics = {"activations": recipe.activations, "state": recipe.state}
    if recipe.ssm_inputs != "float32" and recipe.activations == "int8":
        numerics["ssm_inputs"] = "int8"
    return packed.checkpoint(teacher, modes, numerics), figures


def searched(recipe: QuambaRecipe) -> int:
    """Windows for the search."""
    return recipe.search_windows if recipe.mode == "mixed" else 0


def card(record: dict[str, Any]) -> str:
    """The body of the model card."""
    recipe, final = record["recipe"], record["final"]
    lines = [
        f"# Quantised by Slimba (quamba2, {recipe['mode']})",
        "",
        f"Quantised after training with {record['tokens']:,} tokens of {', '.join(record['data']['sources'])}.",
        f"The float model's SHA-256 over its tensors is {record['teacher_sha256']}.",
    ]
    if final:
        before, after = final["teacher_perplexity"], final["perplexity"]
        lines += [
            "",
            f"On {recipe['check_windows']} windows of that text that were not used: perplexity {after:.3f},",
            f"{before:.3f} of the float model. Measure it on yours with `slimba eval DIRECTORY --text FILE`.",
        ]
    return "\n".join(lines)
