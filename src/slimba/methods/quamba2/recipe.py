"""Settings of `quamba2`; `slimba/recipes/quamba2.yaml` is the default and explains every key.

A mode says how the projections of a layer are stored and what enters them; formats/presets.py turns it into layouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from slimba.errors import UserError
from slimba.formats import MatrixLayout
from slimba.formats.presets import INTEGER, TRANSFORMED, integer_layer
from slimba.models.spec import ModelSpec

__all__ = ["QuambaRecipe", "folds", "layer_layouts", "stage_layouts", "table_layouts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuambaRecipe:
    METHOD: ClassVar[str] = "quamba2"

    mode: Literal["w8a8", "w4a8", "w4a16", "mixed"]
    rounding: Literal["gptq", "nearest"]
    damping: float
    hadamard: tuple[str, ...]
    residual: Literal["auto", "fold", "off"]
    embedding: Literal["int4", "int8", "float16"]
    head: Literal["int4", "int8", "float16"]
    x_proj: Literal["int8", "int4"]
    int8_scale: Literal["row", "tensor"]
    input_scale: Literal["token", "static"]
    ssm_inputs: Literal["float32", "tensor", "group", "cluster", "channel"]
    clusters: int
    percentile: float
    state: Literal["float32", "bfloat16", "int8"]
    window: int
    windows: int
    check_windows: int
    micro_batch: int
    choices: tuple[str, ...]
    bits: float
    latency_table: str
    latency: float
    population: int
    generations: int
    search_windows: int

    def __post_init__(self) -> None:
        unknown = [n for n in self.hadamard if n not in TRANSFORMED]
        wrong = [m for m in self.choices if m not in INTEGER]
        checks = [
            (self.damping > 0, "damping must be above 0"),
            (not unknown, f"hadamard names {unknown[:1]}, known are {', '.join(TRANSFORMED)}"),
            (not wrong, f"choices names {wrong[:1]}, known are {', '.join(INTEGER)}"),
            (self.mode != "mixed" or len(set(self.choices)) > 1, "mixed needs at least two choices"),
            (self.clusters >= 1, "clusters must be at least 1"),
            (0.5 < self.percentile <= 1, "percentile is a share above 0.5 and at most 1, which is the largest value"),
            (self.window >= 1, "window must be at least 1"),
            (self.windows >= 1, "windows must be at least 1"),
            (self.check_windows >= 0, "check_windows must be 0 (no check) or more"),
            (self.micro_batch >= 1, "micro_batch must be at least 1"),
            (self.bits > 0, "bits must be above 0"),
            (not self.latency_table or self.latency > 0, "latency must be above 0 where there is a latency_table"),
            (self.population >= 4, "population must be at least 4"),
            (self.generations >= 1, "generations must be at least 1"),
            (self.search_windows >= 1, "search_windows must be at least 1"),
        ]
        for good, message in checks:
            if not good:
                raise UserError(f"recipe: {message}")

    @property
    def modes(self) -> tuple[str, ...]:
        """Those that a layer may have."""
        return tuple(dict.fromkeys(self.choices)) if self.mode == "mixed" else (self.mode,)

    @property
    def activations(self) -> str:
        """What the file says of the model's activations; layers that keep float32 say so themselves."""
        return "int8" if any(INTEGER[m][1] == "int8" for m in self.modes) else "float32"


def folds(spec: ModelSpec, recipe: QuambaRecipe) -> bool:
    """Whether the residual stream is rotated in the weights, which a tied head must be untied for."""
    return recipe.residual == "fold" or (recipe.residual == "auto" and not spec.tie_embeddings)


def layer_layouts(spec: ModelSpec, recipe: QuambaRecipe, mode: str) -> dict[str, MatrixLayout]:
    """The layout of a layer's matrices by short name, for a layer in `mode`."""
    weights, activations = INTEGER[mode]
    keeps_float = recipe.activations == "int8" and activations == "float32"
    return integer_layer(
        spec,
        weights,
        x_proj=recipe.x_proj,
        transformed=set(recipe.hadamard) - ({"in_proj"} if folds(spec, recipe) else set()),
        input_scale=recipe.input_scale == "static" and activations == "int8",
        activations="float32" if keeps_float else "",
    )


def table_layouts(spec: ModelSpec, recipe: QuambaRecipe) -> dict[str, MatrixLayout]:
    """The layouts of the embedding and of an own head; `spec` is the packed model's."""
    names = {"backbone.embeddings": recipe.embedding} | ({} if spec.tie_embeddings else {"lm_head": recipe.head})
    return {name: MatrixLayout.plain(spec.vocab_size, spec.d_model, fmt) for name, fmt in names.items()}


def stage_layouts(spec: ModelSpec, before: Mapping[str, MatrixLayout], recipe: QuambaRecipe) -> dict[str, MatrixLayout]:
    """The layout of every matrix after the recipe; of `mixed`, as if all layers had the first choice.

    UserError where the stages before have left anything that is not float.
    """
    for name, layout in before.items():
        if not layout.is_plain_float:
            formats = " and ".join(dict.fromkeys(s.format for s in layout.segments))
            raise UserError(
                f"quamba2 begins from a float model, but {name} is {formats} by then; let quamba2 be the first stage,"
                " or round the rows that are left with the method ptq"
            )
    packed = dataclasses.replace(spec, tie_embeddings=spec.tie_embeddings and not folds(spec, recipe))
    layer = layer_layouts(packed, recipe, recipe.modes[0])
    tables = table_layouts(packed, recipe)
    return {name: tables.get(name) or layer[name.rpartition(".")[2]] for name in packed.matrices()}
