"""Between layouts: packed, transformers and mamba_ssm directories, without losing a bit unless a type is asked for.

    notes = convert_checkpoint(open_checkpoint("mamba2-130m"), Path("out"), to="slimba")

Run the tests: `pytest tests/checkpoints/test_convert.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.common import FLOATS
from slimba.checkpoints.mamba_ssm import write_mamba_ssm
from slimba.checkpoints.packed import card_of, write_packed
from slimba.checkpoints.transformers import write_transformers
from slimba.errors import UserError
from slimba.formats import MatrixLayout
from slimba.formats.floats import DTYPES

__all__ = ["TARGETS", "cast", "convert_checkpoint"]

EXACT = {"float32": FLOATS, "float16": ("float16",), "bfloat16": ("bfloat16",)}  # types that fit in without rounding
TARGETS: dict[str, Callable[..., Path]] = {
    "slimba": write_packed,
    "transformers": write_transformers,
    "mamba-ssm": write_mamba_ssm,
}


def convert_checkpoint(
    checkpoint: Checkpoint, out: str | Path, *, to: str, dtype: str | None = None, overwrite: bool = False
) -> list[str]:
    """Write `checkpoint` in the layout `to`; returns one line for each thing the user should know.

    Without `dtype` every tensor keeps its bytes. With it every tensor becomes that float type, packed weights are
    dequantised. UserError: what the target cannot express, by name.
    """
    if to not in TARGETS:
        raise UserError(f"unknown layout {to!r}, known are {', '.join(TARGETS)}")
    notes = []
    source = checkpoint
    if dtype:
        checkpoint = cast(source, dtype)
        if not source.is_float:
            notes.append(f"dequantised weights were written, {dtype} values of what was {_formats(source)}")
        elif any(a.dtype.name not in EXACT[dtype] for a in source.tensors.values()):
            notes.append(f"the weights were rounded to {dtype}, as asked")
    elif to != "slimba" and not checkpoint.is_float:
        raise UserError(
            f"the {to} layout cannot hold weights stored as {_formats(checkpoint)}; "
            "add --type float16 (or float32) to write dequantised weights"
        )
    if to != "slimba" and checkpoint.provenance:
        notes.append(f"the {to} layout has no place for where the model came from; keep the packed directory for that")
    if to == "slimba":
        write_packed(checkpoint, out, card=card_of(source), overwrite=overwrite)
    else:
        TARGETS[to](checkpoint, out, overwrite=overwrite)
    return notes


def cast(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """The same model with every tensor in one float type, packed matrices dequantised, one at a time as it is used."""
    if dtype not in FLOATS:
        raise UserError(f"unknown type {dtype!r}, known are {', '.join(FLOATS)}")
    layouts = {name: MatrixLayout.plain(layout.rows, layout.cols, dtype) for name, layout in checkpoint.layouts.items()}
    provenance = checkpoint.provenance
    if not checkpoint.is_float:  # its figures are those of the packed weights
        provenance = provenance | {"dequantised": f"to {dtype} from {_formats(checkpoint)}"}
    tensors = _CastTensors(checkpoint, dtype)
    numerics = {k: v for k, v in checkpoint.numerics.items() if k != "ssm_inputs"}  # float inputs need no scales
    return dataclasses.replace(checkpoint, layouts=layouts, tensors=tensors, provenance=provenance, numerics=numerics)


class _CastTensors(Mapping[str, np.ndarray]):
    """Tensors of a float checkpoint, computed from another checkpoint each time they are asked for."""

    def __init__(self, source: Checkpoint, dtype: str) -> None:
        self.source, self.dtype = source, dtype
        self.matrices = {f"{name}.weight": name for name in source.layouts}
        self.names = dict.fromkeys([*self.matrices, *source.spec.vectors()])

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self.matrices:
            matrix = self.source.matrix(self.matrices[name])
            a = matrix.arrays["weight"] if matrix.layout.is_plain_float else matrix.dequantize()
        else:
            a = self.source.tensors[name]
        if a.dtype.name == self.dtype:
            return a
        with np.errstate(over="ignore"):
            out = a.astype(DTYPES[self.dtype])
        if np.isfinite(a.astype(np.float32)).all() and not np.isfinite(out.astype(np.float32)).all():
            raise UserError(f"{name} holds values beyond the range of {self.dtype}; use --type float32 or bfloat16")
        return out

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _formats(checkpoint: Checkpoint) -> str:
    """The formats other than float of a checkpoint, most used first."""
    rows: dict[str, int] = {}
    for layout in checkpoint.layouts.values():
        for s in layout.segments:
            if s.format not in FLOATS:
                rows[s.format] = rows.get(s.format, 0) + s.rows * layout.cols
    return ", ".join(sorted(rows, key=lambda f: -rows[f])) or "float with corrections"
