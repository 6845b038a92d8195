"""Settings of `ptq`, and the layouts they imply; `slimba/recipes/ptq.yaml` is the default and explains every key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import ClassVar, Literal

from slimba.errors import UserError
from slimba.formats import FORMATS, MatrixLayout, Segment
from slimba.formats.floats import FloatFormat
from slimba.formats.presets import ROWS
from slimba.models.spec import ModelSpec

__all__ = ["NAMES", "Piece", "PtqRecipe", "layouts", "pieces"]

# the row names of matrices that are not in_proj, by the matrix's short name
WHOLE = {"out_proj": "out", "x_proj": "x_proj", "dt_proj": "dt_proj", "embeddings": "embedding", "lm_head": "head"}
NAMES = tuple(dict.fromkeys((*ROWS, *WHOLE.values())))


@dataclass(frozen=True, kw_only=True, slots=True)
class PtqRecipe:
    METHOD: ClassVar[str] = "ptq"

    int4_rows: tuple[str, ...]
    int8_rows: tuple[str, ...]
    rounding: Literal["gptq", "nearest"]
    damping: float
    window: int
    windows: int
    micro_batch: int

    def __post_init__(self) -> None:
        named = (*self.int4_rows, *self.int8_rows)
        unknown = [n for n in named if n not in NAMES]
        checks = [
            (not unknown, f"unknown rows {unknown[:1]}, known are {', '.join(NAMES)}"),
            (bool(named), f"nothing is to be rounded; name rows in int4_rows or int8_rows ({', '.join(NAMES)})"),
            (len(set(named)) == len(named), "some rows are named twice in int4_rows and int8_rows"),
            (self.damping > 0, "damping must be above 0"),
            (self.window >= 1, "window must be at least 1"),
            (self.windows >= 1, "windows must be at least 1"),
            (self.micro_batch >= 1, "micro_batch must be at least 1"),
        ]
        for good, message in checks:
            if not good:
                raise UserError(f"recipe: {message}")

    @property
    def formats(self) -> dict[str, str]:
        """Format by the names of rows."""
        return dict.fromkeys(self.int4_rows, "int4") | dict.fromkeys(self.int8_rows, "int8")


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows start..stop of a matrix, within one segment of it; `format` is what they shall be stored in."""

    segment: int
    start: int
    stop: int
    format: str
    chosen: bool


def pieces(spec: ModelSpec, name: str, layout: MatrixLayout, recipe: PtqRecipe) -> list[Piece]:
    """The rows of the matrix `name` by what becomes of them. UserError for chosen rows that are not float."""
    short = name.rpartition(".")[2]
    rows = spec.in_proj_rows if short == "in_proj" else {WHOLE[short]: layout.rows}
    ends = dict(zip(rows, accumulate(rows.values()), strict=True))
    segment_ends = list(accumulate(s.rows for s in layout.segments))
    out, start = [], 0
    for stop in sorted({*ends.values(), *segment_ends}):
        row = next(r for r, end in ends.items() if stop <= end)
        k = next(i for i, end in enumerate(segment_ends) if stop <= end)
        before = layout.segments[k].format
        wanted = recipe.formats.get(row)
        if wanted and not isinstance(FORMATS[before], FloatFormat):
            raise UserError(f"the {row} rows of {name} are {before} already; ptq rounds rows that are float")
        out.append(Piece(k, start, stop, wanted or before, bool(wanted)))
        start = stop
    return out


def layouts(spec: ModelSpec, before: Mapping[str, MatrixLayout], recipe: PtqRecipe) -> dict[str, MatrixLayout]:
    """The layout of every matrix after the recipe, from those before it. UserError where it would change nothing."""
    out = {}
    for name, layout in before.items():
        parts = pieces(spec, name, layout, recipe)
        joined = [(f, list(group)) for f, group in groupby(parts, key=lambda p: p.format)]
        segments = tuple(Segment(sum(p.stop - p.start for p in group), f) for f, group in joined)
        out[name] = layout if not any(p.chosen for p in parts) else dataclasses.replace(layout, segments=segments)
    if out == dict(before):
        raise UserError(f"recipe: the model has none of the rows {', '.join(recipe.formats)}")
    return out
