"""`slimba inspect MODEL`, or `--shape NAME [--format F]`: bytes by component, bits per weight, every layer's format.

Run the tests: `pytest tests/checkpoints/test_inventory.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimba.cli.options import JsonFile, NoVerify, TokenizerFile
from slimba.errors import UserError

if TYPE_CHECKING:
    from slimba.checkpoints.checkpoint import Checkpoint
    from slimba.checkpoints.inventory import Inventory


def inspect(
    model: Annotated[str | None, typer.Argument(help="A directory, a hub id, or a bundled name.")] = None,
    shape: Annotated[
        str | None, typer.Option("--shape", help="Instead of MODEL: a known shape, such as mamba2-1.3b.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="With --shape (all, where not given): dfssm, dfssm-published, w8a8, w4a8, w4a16, float16, "
            "bfloat16, float32, int8, int4.",
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="With --shape: rank of the low-rank correction, if not the usual one.")
    ] = None,
    embedding: Annotated[
        str | None, typer.Option("--embedding", help="With --shape: format of the embedding, if not the usual one.")
    ] = None,
    tokenizer: TokenizerFile = None,
    no_verify: NoVerify = False,
    json_file: JsonFile = None,
) -> None:
    """Show where the bytes of a model are and check its checksums."""
    from slimba.cli.options import write_json

    if (model is None) == (shape is None):
        raise UserError("give either a MODEL or --shape NAME")
    if shape is None and (format is not None or embedding is not None):
        raise UserError("--format and --embedding go with --shape; a MODEL has its own formats")
    if shape is not None:
        record = _inspect_shape(shape, format, rank, embedding)
    else:
        record = _inspect_model(str(model), tokenizer, verify=not no_verify)
    if json_file:
        write_json(json_file, record)


def _inspect_shape(name: str, format: str | None, rank: int | None, embedding: str | None) -> dict[str, Any]:
    from slimba.checkpoints.inventory import inventory_of_shape, layer_groups
    from slimba.formats.presets import PRESETS, preset_layouts
    from slimba.models.configs import named_spec

    spec = named_spec(name)
    if format is None:
        sizes = {f: inventory_of_shape(spec, f, rank=rank, embedding=embedding) for f in PRESETS}
        _print_sizes(name, sizes)
        return {"shape": name, "rank": rank, "formats": {f: inventory.to_json() for f, inventory in sizes.items()}}
    inventory = inventory_of_shape(spec, format, rank=rank, embedding=embedding)
    groups = layer_groups(spec, preset_layouts(spec, format, rank=rank, embedding=embedding))
    _print_inventory(f"{name} as {format}", inventory, groups)
    return {"shape": name, "format": format, "rank": rank, "layers": groups} | inventory.to_json()


def _print_sizes(name: str, sizes: dict[str, Inventory]) -> None:
    """One line per format: what `model.safetensors` would weigh."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{name}: model.safetensors in every format, exact, header included")
    for column in ("format", "bytes", "bits/projection weight", "smaller than float16"):
        table.add_column(column, justify="left" if column == "format" else "right")
    whole = sizes["float16"].file_bytes
    for fmt, inventory in sizes.items():
        bits = f"{inventory.bits_per_projection_weight:.3f}"
        table.add_row(fmt, f"{inventory.file_bytes:,}", bits, f"{whole / inventory.file_bytes:.2f}x")
    Console().print(table)


def _inspect_model(model: str, tokenizer: Any, *, verify: bool) -> dict[str, Any]:
    from slimba.checkpoints.inventory import inventory_of, layer_groups
    from slimba.checkpoints.reader import open_checkpoint

    checkpoint = open_checkpoint(model, tokenizer=tokenizer, verify=verify)
    inventory = inventory_of(checkpoint)
    groups = layer_groups(checkpoint.spec, checkpoint.layouts)
    # opening has checked them all: a disagreement would have raised
    agree = len(checkpoint.tensors) if checkpoint.kind == "slimba" and verify else None
    _print_inventory(f"{model} ({checkpoint.kind}, {checkpoint.spec.architecture})", inventory, groups)
    print("numerics: " + ", ".join(f"{key} {value}" for key, value in checkpoint.numerics.items()))
    _print_origin(checkpoint, agree, verify)
    return {
        "model": model,
        "layout": checkpoint.kind,
        "spec": checkpoint.spec.to_dict(),
        "layers": groups,
        "embedding": checkpoint.layouts["backbone.embeddings"].describe(),
        "numerics": checkpoint.numerics,
        "provenance": checkpoint.provenance,
        "checksums_agree": agree,
    } | inventory.to_json()


def _print_inventory(title: str, inventory: Inventory, groups: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("component")
    for column in ("bytes", "share", "bits per weight"):
        table.add_column(column, justify="right")
    for name, size in inventory.bytes.items():
        weights = inventory.weights.get(name)
        bits = f"{8 * size / weights:.3f}" if weights else ""
        table.add_row(name, f"{size:,}", f"{100 * size / inventory.file_bytes:.1f} %", bits)
    table.add_section()
    table.add_row("all", f"{inventory.file_bytes:,}", "100.0 %", f"{inventory.bits_per_parameter:.3f}")
    Console().print(table)
    print(f"weights on disk, headers included: {inventory.file_bytes:,} bytes")
    print(f"bits per projection weight, all parts counted: {inventory.bits_per_projection_weight:.4f}")
    for group in groups:
        first, last = group["first"], group["last"]
        where = f"layer {first}" if first == last else f"layers {first}-{last}"
        print(f"{where}: " + ", ".join(f"{n} {f}" for n, f in group["formats"].items()))


def _print_origin(checkpoint: Checkpoint, agree: int | None, verify: bool) -> None:
    from slimba.checkpoints.inventory import describe_value

    spec = checkpoint.spec
    if checkpoint.tokenizer_file is None:
        print("tokenizer: none (--tokenizer PATH gives one)")
    else:
        start = "starts" if spec.add_bos else "does not start"
        name = checkpoint.tokenizer_file.name
        print(f"tokenizer: {name}, end of text is id {spec.eos_token_id}, a prompt {start} with id {spec.bos_token_id}")
    for key, value in checkpoint.provenance.items():
        print(f"{key}: {describe_value(value)}")
    if agree is not None:
        print(f"checksums: {agree} of {agree} agree")
    else:
        print("checksums: " + ("this layout has none" if verify else "not checked"))
