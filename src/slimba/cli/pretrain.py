"""`slimba pretrain OUT --data TEXT... --tokenizer F`: train a small model from scratch. See training/pretrain.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def pretrain(
    out: Annotated[Path, typer.Argument(help="Directory to write the model to.")],
    data: Annotated[
        list[str],
        typer.Option("--data", help="Text (.txt, .jsonl, .parquet, .zst, .gz, datasets:NAME) or ids (.npy, .bin)."),
    ],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json of the model to be.")],
    recipe: Annotated[Path | None, typer.Option(help="YAML settings that override the default's.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="One setting, key=value; may be repeated."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens (default: the recipe's passes).")] = None,
    split_documents: Annotated[str, typer.Option(help="What separates documents: blank-line or file.")] = "blank-line",
    seed: Annotated[int, typer.Option(help="First weights and order of the windows.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT once the new model is complete.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the run's record there.")] = None,
) -> None:
    """Train a model from scratch with the loop that every method uses."""
    from slimba.errors import UserError

    try:
        import torch  # noqa: F401
    except ImportError:
        raise UserError('training needs torch; pip install "slimba[train]"') from None
    from slimba.cli.options import write_json
    from slimba.training.pretrain import pretrain as run
    from slimba.training.recipes import parse_overrides

    record = run(
        out,
        data=data,
        tokenizer=tokenizer,
        recipe=recipe,
        split_documents=split_documents,
        tokens=tokens,
        seed=seed,
        device=device,
        resume=resume,
        overwrite=overwrite,
        settings=parse_overrides(set_ or []),
    )
    if os.environ.get("RANK", "0") != "0":
        return  # started by torchrun: the first process speaks for all
    if json_file:
        write_json(json_file, record)
    typer.echo(f"{out}: {record['tokens']:,} tokens in {record['seconds']:.0f} s, loss {record['final']['loss']:.4f}")
