"""The named layouts: what is stored how. Run: pytest tests/checkpoints/test_presets.py"""

from __future__ import annotations

import pytest

from slimba.errors import UserError
from slimba.formats.presets import PRESETS, preset_dtypes, preset_layouts, preset_numerics
from slimba.models.spec import ModelSpec

MAMBA2 = ModelSpec(
    architecture="mamba2",
    n_layer=2,
    d_model=48,
    d_inner=96,
    d_state=16,
    vocab_size=50,
    headdim=32,
    n_groups=1,
    norm_group_size=96,
    tie_embeddings=False,
)
MAMBA1 = ModelSpec(architecture="mamba1", n_layer=1, d_model=48, d_inner=96, d_state=16, vocab_size=50, dt_rank=3)
IN, OUT = "backbone.layers.0.mixer.in_proj", "backbone.layers.0.mixer.out_proj"


def test_dfssm() -> None:
    layouts = preset_layouts(MAMBA2, "dfssm", rank=4)
    assert set(layouts) == set(MAMBA2.matrices())
    assert layouts[IN].describe() == "sign:224 int8:3 +r4 +plane:128x16"
    assert (layouts[IN].lowrank.start, layouts[IN].lowrank.stop) == (0, 224)  # type: ignore[union-attr]
    assert layouts[OUT].describe() == "sign +r4 +plane:48x32"
    assert layouts["backbone.embeddings"].describe() == layouts["lm_head"].describe() == "int4"


def test_dfssm_published() -> None:
    layouts = preset_layouts(MAMBA2, "dfssm-published")
    assert layouts[IN].describe() == layouts[OUT].describe() == "sign +r16"
    assert layouts[IN].lowrank.stop == 227  # type: ignore[union-attr]
    assert layouts["backbone.embeddings"].describe() == "int8"


def test_mamba1() -> None:
    layouts = preset_layouts(MAMBA1, "dfssm", rank=2, embedding="int8")
    assert [layouts[n].describe() for n in MAMBA1.matrices()] == [
        "int8",
        "sign +r2 +plane:96x16",
        "int8",
        "int8",
        "sign +r2 +plane:48x32 *col",
    ]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("spec", [MAMBA1, MAMBA2])
def test_every_preset_fits_every_matrix(name: str, spec: ModelSpec) -> None:
    layouts = preset_layouts(spec, name)
    assert {n: (x.rows, x.cols) for n, x in layouts.items()} == spec.matrices()
    assert set(preset_dtypes(name)) == {"norm", "conv", "ssm", "bias"}


def test_no_correction_and_bad_settings() -> None:
    assert preset_layouts(MAMBA2, "dfssm")[OUT].describe() == "sign +plane:48x32"
    assert preset_layouts(MAMBA2, "dfssm-published", rank=0)[OUT].describe() == "sign"
    with pytest.raises(UserError, match="unknown format 'nf4'"):
        preset_layouts(MAMBA2, "nf4")
    with pytest.raises(UserError, match="unknown format 'nf4'"):
        preset_dtypes("nf4")
    with pytest.raises(UserError, match="rank is -1"):
        preset_layouts(MAMBA2, "dfssm", rank=-1)
    with pytest.raises(UserError, match="unknown weight format 'int5'"):
        preset_layouts(MAMBA2, "dfssm", embedding="int5")


@pytest.mark.parametrize(("name", "weights", "activations"), [("w8a8", "int8", "int8"), ("w4a16", "int4", "float32")])
def test_modes_of_quamba2(name: str, weights: str, activations: str) -> None:
    layouts = preset_layouts(MAMBA2, name)
    for layer in range(MAMBA2.n_layer):
        for short in ("in_proj", "out_proj"):
            layout = layouts[f"backbone.layers.{layer}.mixer.{short}"]
            assert [s.format for s in layout.segments] == [weights]
            assert layout.hadamard == (layout.cols & -layout.cols) > 1
    assert layouts["backbone.embeddings"].describe() == "int8"
    assert preset_numerics(name) == {"activations": activations, "state": "float32"}
    first = "backbone.layers.0.mixer."
    mamba1 = preset_layouts(MAMBA1, name)
    assert {mamba1[first + n].segments[0].format for n in ("x_proj", "dt_proj")} == {"int8"}
    assert mamba1[first + "dt_proj"].hadamard == 0 < mamba1[first + "out_proj"].hadamard
