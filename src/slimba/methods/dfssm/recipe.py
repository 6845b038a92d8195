"""Settings of `dfssm`; `slimba/recipes/dfssm.yaml` is the default and explains every key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from slimba.errors import UserError
from slimba.formats import LowRank, MatrixLayout, Segment
from slimba.models.spec import ModelSpec
from slimba.training.schedule import DECAYS

__all__ = ["DfssmRecipe", "layouts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DfssmRecipe:
    METHOD: ClassVar[str] = "dfssm"

    rank: int
    int8_rows: tuple[str, ...]
    embedding: Literal["int4", "int8", "float16"]
    window: int
    batch: int
    micro_batch: int
    activation_checkpointing: Literal["auto", "on", "off"]
    calibration_windows: int
    init_rounds: int
    col_floor: float
    lr_latent: float
    lr_scale: float
    lr_other: float
    warmup: float
    decay: str
    ste_clip: float
    grad_clip: float
    hidden_weight: float
    hidden_until: float
    round_from: float
    freeze_from: float

    def __post_init__(self) -> None:
        checks = [
            (self.rank >= 0, "rank must be 0 or more"),
            (self.window >= 1, "window must be at least 1"),
            (self.batch >= 1, "batch must be at least 1"),
            (self.micro_batch >= 0, "micro_batch must be 0 (off) or more"),
            (self.calibration_windows >= 1, "calibration_windows must be at least 1"),
            (self.init_rounds >= 1, "init_rounds must be at least 1"),
            (0 < self.col_floor <= 1, "col_floor must be above 0 and at most 1"),
            (min(self.lr_latent, self.lr_scale, self.lr_other) >= 0, "learning rates must be 0 or more"),
            (0 <= self.warmup < 1, "warmup is a fraction of the steps, from 0 to below 1"),
            (self.decay in DECAYS, f"decay must be one of {', '.join(DECAYS)}"),
            (self.ste_clip > 0 and self.grad_clip > 0, "ste_clip and grad_clip must be above 0"),
            (self.hidden_weight >= 0, "hidden_weight must be 0 or more"),
            (0 <= self.hidden_until <= 1, "hidden_until is a fraction of the steps"),
            (
                0 <= self.round_from <= 1 and 0 <= self.freeze_from <= 1,
                "round_from and freeze_from are fractions of the steps",
            ),
        ]
        for good, message in checks:
            if not good:
                raise UserError(f"recipe: {message}")


ROWS = ("z", "x", "B", "C", "dt")  # a Mamba-1 has B, C and dt in x_proj and dt_proj, which are int8 anyway


def layouts(spec: ModelSpec, recipe: DfssmRecipe) -> dict[str, MatrixLayout]:
    """The layout of every matrix of `spec` under `recipe`.

    The low-rank correction covers the sign rows only: int8 rows have nothing for it to correct. A column scale is
    stored only where no norm stands before the matrix (Mamba-1's out_proj, a Mamba-2 without a last norm).
    """
    unknown = [r for r in recipe.int8_rows if r not in ROWS]
    if unknown:
        raise UserError(f"recipe: int8_rows names {unknown[0]!r}, known are {', '.join(ROWS)}")
    out: dict[str, MatrixLayout] = {}
    for name, (rows, cols) in spec.matrices().items():
        short = name.rpartition(".")[2]
        if short in ("x_proj", "dt_proj"):
            out[name] = MatrixLayout.plain(rows, cols, "int8")
        elif short in ("in_proj", "out_proj"):
            out[name] = _projection(spec, recipe, short, rows, cols)
        else:
            out[name] = MatrixLayout.plain(rows, cols, recipe.embedding)
    return out


def _projection(spec: ModelSpec, recipe: DfssmRecipe, short: str, rows: int, cols: int) -> MatrixLayout:
    segments: list[Segment] = []
    names = spec.in_proj_rows if short == "in_proj" else {"out": rows}
    for row_name, count in names.items():
        fmt = "int8" if short == "in_proj" and row_name in recipe.int8_rows else "sign"
        if segments and segments[-1].format == fmt:
            segments[-1] = Segment(segments[-1].rows + count, fmt)
        else:
            segments.append(Segment(count, fmt))
    lowrank = None
    if recipe.rank:
        if recipe.rank > min(rows, cols):
            raise UserError(f"recipe: rank {recipe.rank} is more than {short} of {rows} x {cols} can have")
        ends, at = [], 0
        for s in segments:
            if s.format == "sign":
                ends += [at, at + s.rows]
            at += s.rows
        lowrank = LowRank(recipe.rank, min(ends), max(ends)) if ends else None
    return MatrixLayout(cols, tuple(segments), lowrank, col_scale=spec.norm_before(short) is None)
