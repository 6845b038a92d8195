"""Options that several verbs share, spelled once, and `write_json` for `--json FILE`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "Activations",
    "Backend",
    "JsonFile",
    "MinP",
    "Model",
    "NoVerify",
    "RepetitionPenalty",
    "Seed",
    "StateDtype",
    "Temperature",
    "Threads",
    "TokenizerFile",
    "TopK",
    "TopP",
    "write_json",
]

Model = Annotated[str, typer.Argument(help="A directory, a hub id, or a bundled name such as demo-teacher.")]
Backend = Annotated[str, typer.Option("--backend", help="auto, cpu, cuda or reference (both torch).")]
Threads = Annotated[int | None, typer.Option("--threads", help="Threads to compute with (default: all cores).")]
StateDtype = Annotated[
    str | None, typer.Option("--state-dtype", help="fp32, bf16 or int8 (default: what the model's config says).")
]
Activations = Annotated[
    str | None, typer.Option("--activations", help="float32 or int8 (default: what the model's config says).")
]
TokenizerFile = Annotated[Path | None, typer.Option("--tokenizer", help="tokenizer.json, where the model has none.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same text, in every backend.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token, 1 samples from the model.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens that make up this share.")]
TopK = Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0 for all.")]
MinP = Annotated[float, typer.Option(help="Leave out tokens below this share of the likeliest one's.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: tokens seen before get less likely.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Skip the checksums of the tensors.")]


def write_json(path: Path, data: Mapping[str, Any] | list[Any]) -> None:
    """Write `data` to `path` in one step; dataclasses, paths and NumPy numbers are allowed inside."""
    from slimba.checkpoints.atomic import atomic_write

    atomic_write(path, json.dumps(data, indent=2, ensure_ascii=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)
