"""The entry of every method: `slimba.compress(teacher, out, method="dfssm", ...)` and the verb `compress`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimba.checkpoints.atomic import check_target
from slimba.errors import UserError

if TYPE_CHECKING:
    from slimba.methods.stages import Stage

__all__ = ["METHODS", "compress"]

METHODS = ("dfssm", "quamba2", "ptq")


def compress(
    teacher: str | Path,
    out: str | Path,
    *,
    method: str | None = None,
    recipe: str | Path | None = None,
    data: Sequence[str | Path] = (),
    split_documents: str = "blank-line",
    tokens: int | None = None,
    seed: int = 0,
    device: str = "auto",
    tokenizer: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Compress `teacher` (directory, hub id or bundled name) into the packed directory `out`; returns the run's record.

    method: None takes what the recipe file says, else dfssm. recipe: a file of settings, or of a list of stages
    (docs/stages.md), which then holds all methods, tokens and settings. data: text files, `datasets:NAME`, or files of
    token ids (docs/data.md). tokens: how many training tokens to use (None: one pass). settings, or keyword arguments:
    single keys of the recipe.
    Raises UserError for an unknown method or setting, a damaged teacher, too little text, an existing `out`.
    """
    if tokens is not None and tokens < 1:
        raise UserError("tokens must be at least 1")
    out = Path(out)
    check_target(out, overwrite=overwrite)
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UserError('compressing needs torch; pip install "slimba[train]"') from None
    from slimba.checkpoints.reader import open_checkpoint
    from slimba.data.tokenizer import Tokenizer
    from slimba.data.tokens import are_ids, open_tokens
    from slimba.methods.stages import run_stages

    stages, listed = _stages(method, recipe, {**(settings or {}), **more}, tokens)
    checkpoint = open_checkpoint(teacher, tokenizer=tokenizer)
    words = None
    if not are_ids(data):
        if checkpoint.tokenizer_file is None:
            raise UserError(f"{teacher} has no tokenizer and the text must be tokenised; name one with --tokenizer")
        words = Tokenizer.from_file(checkpoint.tokenizer_file)
    spec = checkpoint.spec
    starts = (spec.bos_token_id, spec.eos_token_id, words.eot_id if words else None)
    bos = next((i for i in starts if i is not None), None)  # as LoadedModel.document_start has it
    with open_tokens(data, words, bos_id=bos, n_vocab=spec.vocab_size, split=split_documents) as ids:
        common: dict[str, Any] = {
            "data": {"sources": [Path(d).name for d in data], "split_documents": split_documents},
            "seed": seed,
            "device": device,
            "resume": resume,
            "overwrite": overwrite,
        }
        if listed:
            return run_stages(stages, checkpoint, out, ids, **common)
        (only,) = stages
        return only.run(checkpoint, out, ids, only.recipe, tokens=tokens, **common)


def _stages(
    method: str | None, file: str | Path | None, settings: Mapping[str, Any], tokens: int | None
) -> tuple[list[Stage], bool]:
    """The stages with their settings checked, and whether they came as a list; a single method is one stage."""
    from slimba.methods.stages import split_stages
    from slimba.training.recipes import read_recipe

    content = read_recipe(file) if file is not None else {}
    if "stages" not in content:
        return [_stage(method or content.get("method") or "dfssm", file, settings)], False
    for name, given in (("method", method), ("settings", settings), ("tokens", tokens)):
        if given:
            raise UserError(f"recipe {file} has stages, which hold their own {name}; put {name} into the recipe")
    out = []
    for n, (kind, own_tokens, own) in enumerate(split_stages(content, f"recipe {file}"), 1):
        try:
            out.append(dataclasses.replace(_stage(kind, None, own), tokens=own_tokens))
        except UserError as e:
            raise UserError(f"recipe {file}, stage {n}: {e}") from None
    return out, True


def _stage(method: str, file: str | Path | None, settings: Mapping[str, Any]) -> Stage:
    """A method with its checked settings; a method's modules are imported when it is asked for."""
    from slimba.methods.stages import Stage
    from slimba.training.recipes import load_recipe

    if method == "dfssm":
        from slimba.methods.dfssm.recipe import DfssmRecipe, formats
        from slimba.methods.dfssm.run import run

        return Stage(method, load_recipe(DfssmRecipe, "dfssm.yaml", file, settings), run, formats)
    if method == "quamba2":
        from slimba.methods.quamba2.recipe import QuambaRecipe, stage_layouts
        from slimba.methods.quamba2.run import run as run_quamba2

        return Stage(method, load_recipe(QuambaRecipe, "quamba2.yaml", file, settings), run_quamba2, stage_layouts)
    if method == "ptq":
        from slimba.methods.ptq.recipe import PtqRecipe, layouts
        from slimba.methods.ptq.run import run as run_ptq

        return Stage(method, load_recipe(PtqRecipe, "ptq.yaml", file, settings), run_ptq, layouts)
    raise UserError(f"unknown method {method!r}, known are {', '.join(METHODS)}")
