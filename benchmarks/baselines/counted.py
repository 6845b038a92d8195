"""Bytes of a model whose projections are in a form that no engine reads yet: a stated simulation, all parts counted.

    size = counted_size(spec, layouts, stated=FORMS["ternary"])
    size.bits_per_projection_weight, size.file_bytes

A form says which tensors a matrix of [rows, cols] would have in the file. Codes are counted at log2 of the number of
levels, each row rounded up to a byte: what an entropy-free coder of the published grid can reach, so no baseline
pays for a clumsy container. Everything else (embedding, norms, convolution, header) is counted as the packed file
would have it. Tests: `pytest tests/benchmarks/test_counted.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from slimba.checkpoints.packed import METADATA
from slimba.checkpoints.safetensors_io import file_bytes
from slimba.formats import MatrixLayout
from slimba.formats.floats import DTYPES
from slimba.formats.presets import preset_dtypes
from slimba.models.spec import ModelSpec

__all__ = ["FORMS", "GROUP", "Form", "Size", "codes", "counted_size", "grouped", "levels_lora"]

GROUP = 128
Entry = tuple[str, tuple[int, ...]]
Form = Callable[[int, int], dict[str, Entry]]


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of the whole file and of the projections with all their parts."""

    file_bytes: int
    projection_bytes: int
    projection_weights: int

    @property
    def bits_per_projection_weight(self) -> float:
        return 8 * self.projection_bytes / self.projection_weights


def codes(rows: int, cols: int, levels: float) -> Entry:
    """Codes of `levels` values: a row takes ceil(cols log2(levels) / 8) bytes."""
    return "uint8", (rows, math.ceil(cols * math.log2(levels) / 8))


def grouped(levels: float) -> Form:
    """Codes and a float16 scale for every 128 columns of a row."""
    return lambda rows, cols: {"codes": codes(rows, cols, levels), "scale": ("float16", (rows, -(-cols // GROUP)))}


def levels_lora(levels: float, rank: int) -> Form:
    """Codes, a float16 scale a row, and an int8 correction with float16 scales (none at rank 0)."""

    def form(rows: int, cols: int) -> dict[str, Entry]:
        out: dict[str, Entry] = {"codes": codes(rows, cols, levels), "scale": ("float16", (rows,))}
        if rank:
            out |= {"lowrank_a": ("int8", (rows, rank)), "lowrank_a_scale": ("float16", (rows,))}
            out |= {"lowrank_b": ("int8", (rank, cols)), "lowrank_b_scale": ("float16", (rank,))}
        return out

    return form


FORMS: dict[str, Form] = {
    "ternary": grouped(3),
    # alpha folds into the norm before the matrix, so only beta is left to store beside the signs
    "fbi": lambda rows, cols: {"codes": codes(rows, cols, 2), "beta": ("float16", (cols,))},
}


def counted_size(spec: ModelSpec, layouts: Mapping[str, MatrixLayout], stated: Form | None = None) -> Size:
    """The file of `layouts`, with the projections in the form `stated` instead of theirs where it is given."""
    entries: dict[str, Entry] = {}
    projection_bytes = weights = 0
    dtypes = preset_dtypes("dfssm")
    for name, (rows, cols) in spec.matrices().items():
        in_layer = ".mixer." in name
        if in_layer and stated is not None:
            mine = {f"{name}.{part}": entry for part, entry in stated(rows, cols).items()}
        else:
            mine = layouts[name].tensors(name)
        if in_layer:
            weights += rows * cols
            projection_bytes += sum(DTYPES[d].itemsize * math.prod(shape) for d, shape in mine.values())
        entries |= mine
    entries |= {name: (dtypes[kind], shape) for name, (shape, kind) in spec.vectors().items()}
    return Size(sum(file_bytes(entries, metadata=METADATA, checksums=True)), projection_bytes, weights)
