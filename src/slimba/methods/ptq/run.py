"""`slimba compress --method ptq`: rows of a model rounded in one pass over a few windows of text, the rest untouched.

    run(teacher, out, ids, recipe, device="auto", ...)

The model may be one that another method has packed in part. Layer by layer: the inputs of a matrix are those that the
layers before it, already rounded, make of the text, so that each matrix takes up what is left of their error.
Legend: n windows, L length, D d_model. Tests: `pytest tests/methods/test_ptq.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.data.batches import WindowBatches
from slimba.data.tokens import Tokens
from slimba.formats import FORMATS, Matrix, MatrixLayout
from slimba.formats.hadamard import hadamard
from slimba.methods.gptq import GROUP, Grid, Quantised, gptq, round_to_nearest
from slimba.methods.one_pass import Made, for_tokens, one_pass
from slimba.methods.ptq.recipe import PtqRecipe, layouts, pieces
from slimba.models.lm import SSMForCausalLM, load_weights

__all__ = ["quantised", "run"]

KINDS = {"int4": (Grid(bits=4), GROUP), "int8": (Grid(bits=8), None)}


def run(
    teacher: Checkpoint,
    out: Path,
    ids: np.ndarray | Tokens,
    recipe: PtqRecipe,
    *,
    data: dict[str, Any],
    tokens: int | None,
    seed: int,
    device: str,
    resume: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """Round the chosen rows of `teacher` and write the packed model to `out`. Returns the run's record.

    `tokens`: how many to calibrate on instead of the recipe's windows. Started by torchrun, the first process works and
    the others wait. Raises UserError for chosen rows that are not float, for NaN, and where memory runs out.
    """
    recipe = for_tokens(recipe, tokens)
    layouts(teacher.spec, teacher.layouts, recipe)  # refuses a recipe that does not fit before anything is read

    def gather(where: torch.device) -> tuple[torch.Tensor, dict[str, Any]]:
        batches = WindowBatches(ids, recipe.window, 1, seed)
        windows = torch.from_numpy(batches.first(recipe.windows)[:, :-1]).to(where).long()
        return windows, batches.tokens.origin

    def quantise(windows: torch.Tensor, _where: torch.device) -> Made:
        packed, error = quantised(teacher, recipe, windows)
        return Made(packed, windows.numel(), {"error": round(error, 7)})

    settings: dict[str, Any] = {"data": data, "seed": seed, "device": device, "resume": resume, "overwrite": overwrite}
    return one_pass("ptq", teacher, out, recipe, gather, quantise, card, **settings)


@torch.no_grad()
def quantised(teacher: Checkpoint, recipe: PtqRecipe, windows: torch.Tensor) -> tuple[Checkpoint, float]:
    """The model with the chosen rows rounded, and the mean relative squared error of the projections' outputs by that.

    windows int64 [n, L], on the device to work on.
    """
    network = SSMForCausalLM(teacher.spec)
    load_weights(network, teacher)
    network.to(windows.device).eval()
    after = layouts(teacher.spec, teacher.layouts, recipe)
    done: dict[str, Matrix] = {}
    errors: list[float] = []

    def replace(name: str, hessian: torch.Tensor | None) -> None:
        done[name], error = _matrix(teacher, name, after[name], recipe, hessian)
        errors.extend([] if error is None else [error])
        weight = network.get_parameter(name + ".weight")
        weight.copy_(torch.from_numpy(done[name].dequantize()))

    changed = [name for name in after if after[name] != teacher.layouts[name]]
    for name in changed:
        if ".mixer." not in name:
            replace(name, None)
    stream = [network.backbone.embeddings(piece).float() for piece in windows.split(recipe.micro_batch)]
    for i, block in enumerate(network.backbone.layers):
        for short in teacher.spec.layer_matrices():
            name = f"backbone.layers.{i}.mixer.{short}"
            if name in changed:
                replace(name, _hessian(block, block.get_submodule(f"mixer.{short}"), stream, teacher.layouts[name]))
        stream = [block(u) for u in stream]

    gone = {full for name in done for full in teacher.layouts[name].tensors(name)}
    tensors = {full: a for full, a in teacher.tensors.items() if full not in gone}
    tensors |= {f"{name}.{part}": a for name, matrix in done.items() for part, a in matrix.arrays.items()}
    packed = dataclasses.replace(teacher, layouts=after, tensors=tensors, path=None, kind="slimba")
    return packed, sum(errors) / len(errors) if errors else 0.0


def _hessian(block: nn.Module, projection: nn.Module, stream: list[torch.Tensor], layout: MatrixLayout) -> torch.Tensor:
    """Mean of x x^T over all tokens, [cols, cols] float32; x is what meets the stored weights: transformed by H."""
    total = torch.zeros(layout.cols, layout.cols, device=stream[0].device)

    def add(_m: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].float().flatten(0, -2)
        x = hadamard(x, layout.hadamard) if layout.hadamard else x
        total.addmm_(x.T, x)

    hook = projection.register_forward_pre_hook(add)
    try:
        for u in stream:
            block(u)
    finally:
        hook.remove()
    return total / sum(u.shape[0] * u.shape[1] for u in stream)


def _matrix(
    teacher: Checkpoint, name: str, layout: MatrixLayout, recipe: PtqRecipe, hessian: torch.Tensor | None
) -> tuple[Matrix, float | None]:
    """The matrix `name` in its new layout; the relative error of the chosen rows' outputs, where a Hessian is given."""
    source = teacher.matrix(name)
    old = source.layout
    device = hessian.device if hessian is not None else torch.device("cpu")
    if hessian is not None and old.col_scale:  # the stored weights meet x c
        c = torch.from_numpy(source.arrays["col_scale"].astype(np.float32)).to(device)
        hessian = hessian * c * c[:, None]
    parts: list[dict[str, np.ndarray]] = []
    lost, whole = 0.0, 0.0
    first = [sum(s.rows for s in old.segments[:k]) for k in range(len(old.segments))]
    for piece in pieces(teacher.spec, name, old, recipe):
        rows = slice(piece.start - first[piece.segment], piece.stop - first[piece.segment])
        stored = {part: a[rows] for part, a in source.segment_parts(piece.segment).items()}
        if piece.chosen:
            w = torch.from_numpy(FORMATS[old.segments[piece.segment].format].unpack(stored, old.cols)).to(device)
            q = _rounded(w, piece.format, recipe, hessian)
            stored = q.arrays(piece.format)
            if hessian is not None:
                d = w - q.weight()
                lost, whole = lost + float(((d @ hessian) * d).sum()), whole + float(((w @ hessian) * w).sum())
        parts.append(stored)
    corrections = {part: a for part, a in source.arrays.items() if part not in _segment_names(old)}
    return Matrix(layout, corrections | _joined(parts, layout)), (lost / max(whole, 1e-30) if whole else None)


def _joined(parts: list[dict[str, np.ndarray]], layout: MatrixLayout) -> dict[str, np.ndarray]:
    """The arrays of all segments, from those of runs of rows in order; neighbours of one format are one segment."""
    out: dict[str, np.ndarray] = {}
    left = iter(parts)
    for k, segment in enumerate(layout.segments):
        group: list[dict[str, np.ndarray]] = []
        while sum(len(next(iter(g.values()))) for g in group) < segment.rows:
            group.append(next(left))
        out |= {layout.part_name(k, part): np.concatenate([g[part] for g in group]) for part in group[0]}
    return out


def _rounded(w: torch.Tensor, format: str, recipe: PtqRecipe, hessian: torch.Tensor | None) -> Quantised:
    grid, group = KINDS[format]
    if hessian is None or recipe.rounding == "nearest":
        return round_to_nearest(w, grid, group)
    return gptq(w, hessian, grid, group, damping=recipe.damping)


def _segment_names(layout: MatrixLayout) -> set[str]:
    """Names of the arrays that hold the segments; the others are corrections, which stay."""
    parts = [FORMATS[s.format].parts(s.rows, layout.cols) for s in layout.segments]
    return {layout.part_name(k, part) for k, names in enumerate(parts) for part in names}


def card(record: dict[str, Any]) -> str:
    """The model card's body."""
    recipe = record["recipe"]
    rows = [f"{', '.join(recipe[key])} at {key[:4]}" for key in ("int4_rows", "int8_rows") if recipe[key]]
    return f"""State-space model made with `slimba compress --method ptq`.

- Rounded after training ({recipe["rounding"]}): {"; ".join(rows)}. What is not named was left as it was
- Calibrated on {record["tokens"]:,} tokens of {", ".join(record["data"].get("sources", [])) or "given token ids"}
- Mean relative squared error of the rounded projections' outputs: {record["final"]["error"]}

`slimba inspect` on this directory shows the format of every layer and checks its checksums; `slimba eval` measures it.
"""
