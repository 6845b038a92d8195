"""ModelSpec: shapes, JSON, and impossible descriptions. Run: `pytest tests/models/test_spec.py`."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from helpers.tiny import tiny_spec
from slimba.errors import UserError
from slimba.models.configs import named_spec
from slimba.models.spec import ModelSpec


def test_shapes_of_the_main_size() -> None:
    spec = named_spec("mamba2-1.3b")
    assert (spec.n_heads, spec.d_conv_channels) == (64, 4352)
    assert spec.in_proj_rows == {"z": 4096, "x": 4096, "B": 128, "C": 128, "dt": 64}
    assert spec.layer_matrices() == {"in_proj": (8512, 2048), "out_proj": (2048, 4096)}
    assert spec.vectors()["backbone.layers.47.mixer.conv1d.weight"] == ((4352, 1, 4), "conv")
    assert "lm_head" not in spec.matrices()


def test_shapes_of_a_mamba1() -> None:
    spec = named_spec("falcon-mamba-7b")
    assert spec.in_proj_rows == {"x": 8192, "z": 8192}
    assert spec.layer_matrices()["x_proj"] == (256 + 2 * 16, 8192)
    assert spec.layer_matrices()["dt_proj"] == (8192, 256)
    assert spec.matrices()["lm_head"] == (65024, 4096)


@pytest.mark.parametrize(
    "spec",
    [
        tiny_spec("mamba2", dt_limit=(0.01, 0.5)),
        tiny_spec("mamba2", n_groups=2),
        tiny_spec("mamba1", bcdt_norm_eps=1e-6),
    ],
)
def test_json_round_trip(spec: ModelSpec) -> None:
    text = json.dumps(spec.to_dict(), allow_nan=False)  # infinity is not JSON
    assert ModelSpec.from_dict(json.loads(text)) == spec


def test_an_infinite_limit_is_null_in_json() -> None:
    assert tiny_spec("mamba2").to_dict()["dt_limit"] == [0.0, None]
    assert ModelSpec.from_dict(tiny_spec("mamba2").to_dict()).dt_limit == (0.0, math.inf)


@pytest.mark.parametrize(
    ("architecture", "changes", "named"),
    [
        ("mamba2", {"n_layer": 0}, "n_layer"),
        ("mamba2", {"d_conv": 0}, "d_conv"),
        ("mamba2", {"headdim": 24}, "headdim 24"),
        ("mamba2", {"n_groups": 3}, "n_groups 3"),
        ("mamba2", {"norm_group_size": 48}, "norm_group_size 48"),
        ("mamba1", {"dt_rank": 0}, "dt_rank"),
    ],
)
def test_impossible_shapes_are_refused_by_name(architecture: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        tiny_spec(architecture, **changes)


def test_unknown_and_missing_keys_are_refused_by_name() -> None:
    data = tiny_spec("mamba2").to_dict()
    with pytest.raises(UserError, match="n_experts"):
        ModelSpec.from_dict(data | {"n_experts": 4})
    with pytest.raises(UserError, match="d_model"):
        ModelSpec.from_dict({k: v for k, v in data.items() if k != "d_model"})
    with pytest.raises(UserError, match="transformer"):
        ModelSpec.from_dict(data | {"architecture": "transformer"})
