"""`slimba compress TEACHER OUT --method METHOD --data TEXT...`: run a method, or stages. See methods/run.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def compress(
    teacher: Annotated[str, typer.Argument(help="Float model: a directory, a hub id or a bundled name.")],
    out: Annotated[Path, typer.Argument(help="Directory to write the packed model to.")],
    data: Annotated[
        list[str],
        typer.Option("--data", help="Text (.txt, .jsonl, .parquet, .zst, .gz, datasets:NAME) or ids (.npy, .bin)."),
    ],
    method: Annotated[
        str | None,
        typer.Option(
            help="How the numbers are chosen: dfssm (trained), quamba2 (calibrated) or ptq (chosen rows rounded)."
            " Default: what the recipe says, else dfssm."
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML settings that override the default's, or a list of stages.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="One setting, key=value; may be repeated."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens to train on (default: one pass) or to calibrate on.")
    ] = None,
    split_documents: Annotated[str, typer.Option(help="What separates documents: blank-line or file.")] = "blank-line",
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json, where the checkpoint has none.")] = None,
    seed: Annotated[int, typer.Option(help="Order of the windows.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT once the new model is complete.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the run's record there.")] = None,
) -> None:
    """Make a float model small: one bit a weight by distillation (dfssm), 4 or 8 bits without training (quamba2, ptq).

    A recipe may list stages, such as one-bit rows by dfssm and then out_proj at 4 bits by ptq: docs/stages.md.
    """
    from slimba.cli.options import write_json
    from slimba.methods.run import compress as run
    from slimba.training.recipes import parse_overrides

    record = run(
        teacher,
        out,
        method=method,
        recipe=recipe,
        data=data,
        split_documents=split_documents,
        tokens=tokens,
        seed=seed,
        device=device,
        tokenizer=tokenizer,
        resume=resume,
        overwrite=overwrite,
        settings=parse_overrides(set_ or []),
    )
    if os.environ.get("RANK", "0") != "0":
        return  # started by torchrun: the first process speaks for all
    if json_file:
        write_json(json_file, record)
    final = ", ".join(f"{k} {v:.4g}" for k, v in record["final"].items())
    typer.echo(
        f"{out}: {record['tokens']:,} tokens in {record['seconds']:.0f} s on {record['device']}; {final}".rstrip("; ")
    )
    typer.echo(f"look at it with: slimba inspect {out}")
