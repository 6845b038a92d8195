"""The entry of every method: `slimba.compress(teacher, out, method="dfssm", ...)` and the verb `compress`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slimba.checkpoints.atomic import check_target
from slimba.errors import UserError

__all__ = ["METHODS", "compress"]

METHODS = ("dfssm", "quamba2")


def compress(
    teacher: str | Path,
    out: str | Path,
    *,
    method: str = "dfssm",
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

    data: text files, `datasets:NAME`, or files of token ids (docs/data.md). tokens: how many training tokens to use
    (None: one pass). settings, or keyword arguments: single keys of the recipe.
    Raises UserError for an unknown method or setting, a damaged teacher, too little text, an existing `out`.
    """
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}, known are {', '.join(METHODS)}")
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

    chosen, run = _method(method, recipe, {**(settings or {}), **more})
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
        return run(
            checkpoint,
            out,
            ids,
            chosen,
            data={"sources": [Path(d).name for d in data], "split_documents": split_documents},
            tokens=tokens,
            seed=seed,
            device=device,
            resume=resume,
            overwrite=overwrite,
        )


def _method(
    name: str, file: str | Path | None, settings: Mapping[str, Any]
) -> tuple[Any, Callable[..., dict[str, Any]]]:
    """The checked settings of a method and the function that runs it."""
    from slimba.training.recipes import load_recipe

    if name == "quamba2":
        from slimba.methods.quamba2.recipe import QuambaRecipe
        from slimba.methods.quamba2.run import run as run_quamba2

        return load_recipe(QuambaRecipe, "quamba2.yaml", file, settings), run_quamba2
    from slimba.methods.dfssm.recipe import DfssmRecipe
    from slimba.methods.dfssm.run import run as run_dfssm

    return load_recipe(DfssmRecipe, "dfssm.yaml", file, settings), run_dfssm
