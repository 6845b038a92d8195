"""The trained baselines: what each puts in the place of our matrices, how it is trained, and what it would weigh.

Every arm reads the same windows of the same tokens in the same loop as `dfssm`, starts from the same teacher and trains
everything (norms, convolution, A, D, dt, embedding), with an int8 embedding. `lr` is the rate of the latents in units
of their scale; `RATES` says what the other rates are then.

dfssm      DF-SSM as published: 17 levels with clamp and annealing on 12.3 of 32.3 parts of the tokens, temperature 2,
           no hidden-state loss; then everything frozen and a LoRA of rank 16 trained on the rest
sign       DF-SSM's scaffold as signs from the start: a scale a row, no correction, all rows of both matrices
sign-lora  the same for 12.3 of 32.3 parts, then frozen and a LoRA of rank 16 on the rest
bimamba    FBI-Linear: signs with a scale and a shift a column
ternary    absmean ternary in groups of 128 columns

Departures from the published code that help the baseline: KL is a mean per token, thresholds are the paper's even ones,
annealing follows the optimiser step, no weight decay, the second stage goes on in the text instead of reading its start
again, the LoRA of sign-lora is screened around 3e-3 instead of 1e-3.
Tests: `pytest tests/benchmarks/test_run_baselines.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from counted import FORMS, Form, levels_lora
from student_layers import Fbi, Levels, Ternary, published_sign_export
from torch import nn

from slimba.formats import LowRank, Matrix, MatrixLayout, Segment
from slimba.models.spec import ModelSpec

__all__ = ["ARMS", "RANK", "Arm", "Rates", "Stage", "Variant", "arm_layouts"]

RANK = 16
SCAFFOLD_SHARE = 12.3 / 32.3  # published: 12.3M tokens for the scaffold, 20M for the LoRA


@dataclass(frozen=True, slots=True)
class Rates:
    latent: float
    scale: float
    other: float


@dataclass(frozen=True, slots=True)
class Stage:
    """A run of the loop over `share` of the tokens. `only_lora`: everything but the corrections is frozen."""

    share: float
    rates: Callable[[float], Rates]
    settings: Mapping[str, Any]  # keys of the recipe
    only_lora: bool = False


@dataclass(frozen=True, slots=True)
class Variant:
    """What one trained arm is exported as: a row of the table.

    `stated`: the form whose bytes are counted, where none of ours exists and the numbers are simulated in float32.
    """

    name: str
    export: Callable[[Any, int], Matrix]
    stated: Form | None = None
    about: str = ""


@dataclass(frozen=True, slots=True)
class Arm:
    make: Callable[[MatrixLayout, int], nn.Module]
    layout: Callable[[int, int], MatrixLayout]  # of a projection [rows, cols]
    stages: tuple[Stage, ...]
    variants: tuple[Variant, ...]
    lrs: tuple[float, ...]  # what is screened
    about: str = field(default="")


def signs(rows: int, cols: int) -> MatrixLayout:
    return MatrixLayout(cols, (Segment(rows, "sign"),))


def signs_lora(rows: int, cols: int) -> MatrixLayout:
    return MatrixLayout(cols, (Segment(rows, "sign"),), LowRank(min(RANK, rows, cols), 0, rows))


def floats(rows: int, cols: int) -> MatrixLayout:
    return MatrixLayout.plain(rows, cols, "float32")


def exported(module: Any, i: int) -> Matrix:
    return module.export(i)


def sign_export(keep_latent_sign: bool) -> Callable[[Any, int], Matrix]:
    def export(module: Any, i: int) -> Matrix:
        rows, cols = module.layout.rows, module.layout.cols
        return published_sign_export(module, i, signs_lora(rows, cols), keep_latent_sign=keep_latent_sign)

    return export


def ours(lr: float) -> Rates:
    """The proportions of our own recipe for signs: 1e-2, 1e-3, 1e-3."""
    return Rates(lr, 0.1 * lr, 0.1 * lr)


def published(lr: float) -> Rates:
    """DF-SSM has one rate for everything."""
    return Rates(lr, lr, lr)


def columns(lr: float) -> Rates:
    """FBI's alpha and beta carry what row scales carry elsewhere; their rate in units of alpha is `other`."""
    return Rates(lr, 0.1 * lr, 0.2 * lr)


HARNESS = {"round_from": 0.95, "freeze_from": 1.0}
PUBLISHED = {"temperature": 2.0, "round_from": 0.95, "freeze_from": 1.0}
LORA = {"round_from": 0.0, "freeze_from": 0.0}


def lora_rate(rate: float, of: float) -> Callable[[float], Rates]:
    """`rate` at the middle of the screened rates, moved along with them; published is 1e-3."""
    return lambda lr: Rates(0.0, 0.0, rate * lr / of)


ARMS: dict[str, Arm] = {
    "dfssm": Arm(
        make=lambda layout, n: Levels(layout, n, 17, rank=min(RANK, layout.rows, layout.cols), anneal=True),
        layout=floats,
        stages=(
            Stage(SCAFFOLD_SHARE, published, PUBLISHED),
            Stage(1 - SCAFFOLD_SHARE, lora_rate(1e-3, of=1e-3), PUBLISHED | LORA, only_lora=True),
        ),
        variants=(
            Variant("dfssm-17-levels", exported, levels_lora(17, RANK), "17 levels + LoRA r16"),
            Variant("dfssm-sign-export", sign_export(False), about="its sign export, as published"),
            Variant("dfssm-sign-export-kind", sign_export(True), about="its sign export, zeros by their latents"),
        ),
        lrs=(3e-4, 1e-3, 3e-3),
    ),
    "sign": Arm(
        make=lambda layout, n: Levels(layout, n, 2, ste_clip=1.5),
        layout=signs,
        stages=(Stage(1.0, ours, HARNESS),),
        variants=(Variant("sign", exported, about="signs, row scales, no correction"),),
        lrs=(3e-3, 1e-2, 3e-2),
    ),
    "sign-lora": Arm(
        make=lambda layout, n: Levels(layout, n, 2, rank=min(RANK, layout.rows, layout.cols), ste_clip=1.5),
        layout=signs_lora,
        stages=(
            Stage(SCAFFOLD_SHARE, ours, HARNESS),
            Stage(1 - SCAFFOLD_SHARE, lora_rate(3e-3, of=1e-2), LORA, only_lora=True),
        ),
        variants=(Variant("sign-lora", exported, about="signs, then LoRA r16 on the frozen scaffold"),),
        lrs=(3e-3, 1e-2, 3e-2),
    ),
    "bimamba": Arm(
        make=Fbi,
        layout=floats,
        stages=(Stage(1.0, columns, HARNESS),),
        variants=(Variant("bimamba", exported, FORMS["fbi"], "FBI-Linear, distilled"),),
        lrs=(3e-3, 1e-2, 3e-2),
    ),
    "ternary": Arm(
        make=Ternary,
        layout=floats,
        stages=(Stage(1.0, ours, HARNESS),),
        variants=(Variant("ternary-g128", exported, FORMS["ternary"], "ternary, groups of 128"),),
        lrs=(3e-3, 1e-2, 3e-2),
    ),
}


def arm_layouts(spec: ModelSpec, arm: Arm, embedding: str) -> dict[str, MatrixLayout]:
    """Layouts while training: the arm's for projections, `embedding` for embedding and head."""
    return {
        name: arm.layout(*shape) if ".mixer." in name else MatrixLayout.plain(*shape, embedding)
        for name, shape in spec.matrices().items()
    }
