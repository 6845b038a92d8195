"""Settings of `dfssm`; `slimba/recipes/dfssm.yaml` is the default and explains every key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from slimba.errors import UserError
from slimba.formats import MatrixLayout
from slimba.formats.presets import ROWS, sign_layouts
from slimba.models.spec import ModelSpec
from slimba.training.schedule import DECAYS

__all__ = ["DfssmRecipe", "formats", "layouts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DfssmRecipe:
    METHOD: ClassVar[str] = "dfssm"

    rank: int
    int8_rows: tuple[str, ...]
    int4_rows: tuple[str, ...]
    float_rows: tuple[str, ...]
    plane: float
    plane_rows: tuple[str, ...]
    embedding: Literal["int4", "int8", "float16"]
    window: int
    batch: int
    micro_batch: int
    activation_checkpointing: Literal["auto", "on", "off"]
    calibration_windows: int
    init_rounds: int
    col_floor: float
    optimizer_latent: Literal["adamw", "muon"]
    lr_latent: float
    lr_scale: float
    lr_other: float
    warmup: float
    decay: str
    estimator: Literal["clip", "tanh", "blend"]
    ste_clip: float
    beta2: float
    grad_clip: float
    hidden_weight: float
    hidden_until: float
    blockwise_until: float
    temperature: float
    label_weight: float
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
                0 <= self.blockwise_until < 1 and (self.blockwise_until == 0 or self.hidden_weight > 0),
                "blockwise_until is a fraction of the steps below 1, and needs a hidden_weight above 0",
            ),
            (self.temperature > 0, "temperature must be above 0"),
            (self.temperature == 1 or self.label_weight == 0, "label_weight needs a temperature of 1"),
            (0 <= self.label_weight <= 1, "label_weight is a share from 0 to 1"),
            (0 < self.beta2 < 1, "beta2 must be between 0 and 1"),
            (
                0 <= self.round_from <= 1 and 0 <= self.freeze_from <= 1,
                "round_from and freeze_from are fractions of the steps",
            ),
        ]
        for good, message in checks:
            if not good:
                raise UserError(f"recipe: {message}")


def layouts(spec: ModelSpec, recipe: DfssmRecipe) -> dict[str, MatrixLayout]:
    """The layout of every matrix of `spec` under `recipe`: formats/presets.py has the rules."""
    for key in ("int8_rows", "int4_rows", "float_rows", "plane_rows"):
        unknown = [r for r in getattr(recipe, key) if r not in ROWS]
        if unknown:
            raise UserError(f"recipe: {key} names {unknown[0]!r}, known are {', '.join(ROWS)}")
    formats: dict[str, str] = {}
    for key, format in (("int8_rows", "int8"), ("int4_rows", "int4"), ("float_rows", "float16")):
        for row in getattr(recipe, key):
            if formats.setdefault(row, format) != format:
                raise UserError(f"recipe: {row} is in {key} and in {formats[row].rstrip('16')}_rows")
    return sign_layouts(
        spec,
        rank=recipe.rank,
        embedding=recipe.embedding,
        formats=formats,
        plane=recipe.plane,
        plane_rows=recipe.plane_rows,
    )


def formats(spec: ModelSpec, before: Mapping[str, MatrixLayout], recipe: DfssmRecipe) -> dict[str, MatrixLayout]:
    """The layouts after the recipe from those before it, which must be float."""
    for name, layout in before.items():
        if not layout.is_plain_float:
            raise UserError(
                f"dfssm begins from a float model, but {name} is {layout.describe()}; put it before the others"
            )
    return layouts(spec, recipe)
