"""`slimba convert SRC OUT --to LAYOUT`: change the layout of a model, losing nothing unless a type is asked for.

Run the tests: `pytest tests/checkpoints/test_convert.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimba.cli.options import JsonFile, NoVerify, TokenizerFile


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A directory, a hub id, or a bundled name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="slimba, transformers or mamba-ssm. All are written as safetensors; mamba_ssm's own loader asks for "
            "pytorch_model.bin, a pickle, which Slimba never writes: load model.safetensors into its model instead.",
        ),
    ],
    dtype: Annotated[
        str | None,
        typer.Option("--type", help="float32, float16 or bfloat16, packed weights dequantised (default: as they are)."),
    ] = None,
    tokenizer: TokenizerFile = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model at OUT.")] = False,
    no_verify: NoVerify = False,
    json_file: JsonFile = None,
) -> None:
    """Change the layout of a model."""
    from slimba.checkpoints.convert import convert_checkpoint
    from slimba.checkpoints.reader import open_checkpoint
    from slimba.cli.options import write_json

    checkpoint = open_checkpoint(source, tokenizer=tokenizer, verify=not no_verify)
    notes = convert_checkpoint(checkpoint, out, to=to, dtype=dtype, overwrite=overwrite)
    size = sum(f.stat().st_size for f in out.glob("model*.safetensors"))
    print(f"{source} ({checkpoint.kind}) -> {out} ({to}), {size:,} bytes of weights")
    for note in notes:
        print(f"note: {note}")
    if checkpoint.tokenizer_file is None:
        print("note: the source has no tokenizer; --tokenizer PATH adds one")
    if json_file:
        record = {"source": source, "out": str(out), "to": to, "type": dtype, "bytes": size, "notes": notes}
        write_json(json_file, record)
