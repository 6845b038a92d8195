"""Named layouts: which format every matrix of a model gets under `dfssm`, `dfssm-published`, `int8`, ... No torch.

    layouts = preset_layouts(spec, "dfssm")               # one MatrixLayout per spec.matrices()
    dtypes = preset_dtypes("dfssm")                       # dtype of the small tensors by kind

`sign_layouts` builds the layouts of any one-bit recipe; the preset `dfssm` is what the default recipe asks of it.
`dfssm-published` is the published design, which has signs and the correction in every row of both projections and an
int8 embedding. `integer_layer` builds those of the method quamba2, `w8a8`, `w4a8` and `w4a16` are its modes. The other
presets store every matrix in the format they are named after.

Run the tests: `pytest tests/checkpoints/test_presets.py`.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from itertools import accumulate
from typing import Any

from slimba.errors import UserError
from slimba.formats.hadamard import block_of
from slimba.formats.matrix import LowRank, MatrixLayout, Plane, Segment
from slimba.models.spec import ModelSpec, VectorKind

__all__ = [
    "INTEGER",
    "PRESETS",
    "ROWS",
    "TRANSFORMED",
    "integer_layer",
    "preset_dtypes",
    "preset_layouts",
    "preset_numerics",
    "sign_layouts",
]

FLOATS = ("float32", "float16", "bfloat16")
# rows of in_proj by name, and those of out_proj; a Mamba-1 has B, C and dt in x_proj and dt_proj, int8 in any recipe
ROWS = ("z", "x", "B", "C", "dt", "out")
EMBEDDING = {"dfssm": "int4", "dfssm-published": "int8"}
# what the default recipe, recipes/dfssm.yaml, asks of `sign_layouts`
DEFAULT: dict[str, Any] = {"formats": {"dt": "int8"}, "plane": 0.33, "plane_rows": ("x", "B", "C", "out")}
RANK = {"dfssm": 0, "dfssm-published": 16}
INTEGER = {"w8a8": ("int8", "int8"), "w4a8": ("int4", "int8"), "w4a16": ("int4", "float32")}  # weights, activations
TRANSFORMED = ("in_proj", "x_proj", "out_proj")  # matrices whose input may be transformed; dt_proj's is narrow
PRESETS = (*EMBEDDING, *INTEGER, *FLOATS, "int8", "int4")


def preset_layouts(
    spec: ModelSpec, name: str, *, rank: int | None = None, embedding: str | None = None
) -> dict[str, MatrixLayout]:
    """The layout of every matrix of `spec` under the preset `name`.

    `rank` is R of the low-rank correction of the sign matrices (0: none), by default the preset's own. `embedding`
    overrides the format of the embedding and of an untied head. UserError for an unknown preset or format and for a
    negative rank.
    """
    _check(name)
    rank = RANK.get(name, 0) if rank is None else rank
    if rank < 0:
        raise UserError(f"rank is {rank}, it must be 0 (no low-rank correction) or more")
    table = embedding or ("int8" if name in INTEGER else EMBEDDING.get(name, name))
    if name == "dfssm":
        return sign_layouts(spec, rank=rank, embedding=table, **DEFAULT)
    if name == "dfssm-published":
        return sign_layouts(spec, rank=rank, embedding=table, column_scale=False)
    layer = integer_layer(spec, INTEGER[name][0]) if name in INTEGER else {}
    out: dict[str, MatrixLayout] = {}
    for matrix, (rows, cols) in spec.matrices().items():
        short = matrix.rsplit(".", 1)[-1]
        is_table = short in ("embeddings", "lm_head")
        out[matrix] = layer.get(short) or MatrixLayout.plain(rows, cols, table if is_table else name)
    return out


def integer_layer(
    spec: ModelSpec,
    weights: str,
    *,
    x_proj: str = "int8",
    transformed: Container[str] = TRANSFORMED,
    **properties: Any,
) -> dict[str, MatrixLayout]:
    """The layouts of a layer's matrices by short name: int8 or int4 weights, inputs transformed where they are named.

    With int4 weights a Mamba-1's x_proj is stored as `x_proj`, and its dt_proj, which has few columns, as int8.
    `properties` are fields of all the layouts (input_scale, activations).
    """
    out = {}
    for short, (rows, cols) in spec.layer_matrices().items():
        fmt = {"dt_proj": "int8", "x_proj": x_proj}.get(short, weights) if weights == "int4" else weights
        block = block_of(cols) if short in transformed and block_of(cols) > 1 else 0
        out[short] = MatrixLayout(cols, (Segment(rows, fmt),), hadamard=block, **properties)
    return out


def preset_numerics(name: str) -> dict[str, str]:
    """What a file in this preset says of its activations and its state."""
    return {"activations": INTEGER[name][1] if name in INTEGER else "float32", "state": "float32"}


def sign_layouts(
    spec: ModelSpec,
    *,
    rank: int,
    embedding: str,
    formats: Mapping[str, str] = {},
    plane: float = 0.0,
    plane_rows: tuple[str, ...] = (),
    column_scale: bool = True,
) -> dict[str, MatrixLayout]:
    """The layout of every matrix of a one-bit model: rows are signs unless `formats` names another format for them.

    The correction of rank `rank` covers the sign rows (the span from the first to the last), and the second sign plane
    those of `plane_rows` that are signs, in the share `plane` of their columns. A column scale is stored only where no
    norm stands before the matrix to hold it (Mamba-1's out_proj, a Mamba-2 without a last norm). UserError for an
    unknown name of rows, a rank beyond a matrix, plane rows that have others between them.
    """
    for row in (*formats, *plane_rows):
        if row not in ROWS:
            raise UserError(f"unknown rows {row!r}, known are {', '.join(ROWS)}")
    out: dict[str, MatrixLayout] = {}
    for matrix, (rows, cols) in spec.matrices().items():
        short = matrix.rsplit(".", 1)[-1]
        if short in ("in_proj", "out_proj"):
            names = spec.in_proj_rows if short == "in_proj" else {"out": rows}
            kinds = {row: formats.get(row, "sign") for row in names}
            out[matrix] = MatrixLayout(
                cols,
                _segments(names, kinds),
                _lowrank(short, names, kinds, rank, cols),
                column_scale and "sign" in kinds.values() and spec.norm_before(short) is None,
                _plane(names, kinds, plane, plane_rows, cols),
            )
        else:  # x_proj and dt_proj of a Mamba-1: 6 % of its weights, and the most sensitive ones
            out[matrix] = MatrixLayout.plain(rows, cols, "int8" if short.endswith("_proj") else embedding)
    return out


def preset_dtypes(name: str) -> dict[VectorKind, str]:
    """Dtype of the small tensors by kind: the preset's own for a float preset, else float16 with float32 for ssm."""
    _check(name)
    if name in FLOATS:
        return {"norm": name, "conv": name, "ssm": name, "bias": name}
    return {"norm": "float16", "conv": "float16", "ssm": "float32", "bias": "float16"}


def _check(name: str) -> None:
    if name not in PRESETS:
        raise UserError(f"unknown format {name!r}, known are {', '.join(PRESETS)}")


def _segments(names: Mapping[str, int], kinds: Mapping[str, str]) -> tuple[Segment, ...]:
    """Neighbours of one format are one segment."""
    out: list[Segment] = []
    for row, count in names.items():
        if out and out[-1].format == kinds[row]:
            out[-1] = Segment(out[-1].rows + count, kinds[row])
        else:
            out.append(Segment(count, kinds[row]))
    return tuple(out)


def _spans(names: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """First row and end of every name."""
    ends = list(accumulate(names.values()))
    return {row: (end - count, end) for (row, count), end in zip(names.items(), ends, strict=True)}


def _lowrank(short: str, names: Mapping[str, int], kinds: Mapping[str, str], rank: int, cols: int) -> LowRank | None:
    signs = [_spans(names)[row] for row in names if kinds[row] == "sign"]
    if not rank or not signs:
        return None
    if rank > min(sum(names.values()), cols):
        raise UserError(f"rank {rank} is more than {short} of {sum(names.values())} x {cols} can have")
    return LowRank(rank, signs[0][0], signs[-1][1])


def _plane(
    names: Mapping[str, int], kinds: Mapping[str, str], share: float, wanted: tuple[str, ...], cols: int
) -> Plane | None:
    if not 0 <= share <= 1:
        raise UserError(f"plane is {share}, it must be a share of the columns from 0 to 1")
    here = [row for row in names if row in wanted and kinds[row] == "sign"]
    if not share or not here:
        return None
    spans = _spans(names)
    start, stop = spans[here[0]][0], spans[here[-1]][1]
    between = [row for row in names if start <= spans[row][0] < stop]
    if between != here:
        raise UserError(f"plane_rows: {', '.join(here)} are not next to each other; name those between them or fewer")
    # whole bytes of signs, at least one
    return Plane(cols if share == 1 else min(cols, max(8, round(share * cols / 8) * 8)), start, stop)
