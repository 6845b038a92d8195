"""Configs of transformers and mamba_ssm: sizes, defaults, round trips, and what is refused by name.

Run: `pytest tests/models/test_configs.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from helpers.tiny import tiny_spec
from slimba.errors import UserError
from slimba.models.configs import SIZES, from_config, named_spec, to_mamba_ssm_config, to_transformers_config
from slimba.models.spec import ModelSpec

MAMBA_SSM: dict[str, Any] = {
    "d_model": 64,
    "d_intermediate": 0,
    "n_layer": 2,
    "vocab_size": 50277,
    "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
MAMBA2: dict[str, Any] = {
    "model_type": "mamba2",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 16,
    "n_groups": 2,
    "vocab_size": 100,
}
MAMBA1: dict[str, Any] = {"model_type": "mamba", "hidden_size": 40, "num_hidden_layers": 2, "vocab_size": 100}


def ssm(**ssm_cfg: Any) -> dict[str, Any]:
    return MAMBA_SSM | {"ssm_cfg": ssm_cfg}


# ------------------------------------------------------------------ published sizes


@pytest.mark.parametrize(
    ("name", "params", "vocab"),
    [
        ("mamba2-1.3b", 1_343_757_312, 50288),
        ("mamba2-130m", 128_989_632, 50288),
        ("mamba2-2.7b", 2_702_599_680, 50288),
        ("mamba-130m", 129_135_360, 50280),
        ("mamba-2.8b", 2_768_345_600, 50280),
        ("falcon-mamba-7b", 7_272_665_088, 65024),
    ],
)
def test_parameters_of_published_sizes(name: str, params: int, vocab: int) -> None:
    spec = named_spec(name)
    assert (spec.n_params(), spec.vocab_size) == (params, vocab)


def test_projection_weights_of_the_main_size() -> None:
    matrices = named_spec("mamba2-1.3b").matrices()
    assert sum(r * c for name, (r, c) in matrices.items() if name.endswith(("in_proj", "out_proj"))) == 1_239_416_832


def test_an_unknown_size_lists_the_known_ones() -> None:
    with pytest.raises(UserError) as e:
        named_spec("mamba2-13b")
    assert all(name in str(e.value) for name in [*SIZES, "falcon-mamba-7b"])


# ------------------------------------------------------------------ defaults


def test_mamba_ssm_defaults() -> None:
    two = from_config(MAMBA_SSM)
    assert (two.architecture, two.d_inner, two.d_state, two.headdim, two.n_heads) == ("mamba2", 128, 128, 64, 2)
    assert (two.n_groups, two.d_conv, two.chunk_size, two.norm_group_size) == (1, 4, 256, 128)
    assert (two.vocab_size, two.norm_eps, two.tie_embeddings) == (50288, 1e-5, True)
    one = from_config({"d_model": 100, "n_layer": 2, "vocab_size": 50277, "ssm_cfg": {}})
    assert (one.architecture, one.d_inner, one.d_state, one.dt_rank, one.vocab_size) == ("mamba1", 200, 16, 7, 50280)


def test_transformers_defaults() -> None:
    bare = from_config({"model_type": "mamba2"})
    assert (bare.d_model, bare.n_heads, bare.headdim, bare.n_groups, bare.tie_embeddings) == (4096, 128, 64, 8, False)
    assert (bare.norm_group_size, bare.dt_limit, bare.eos_token_id) == (1024, (0.0, math.inf), 2)
    one = from_config(MAMBA1)
    assert (one.architecture, one.d_inner, one.dt_rank, one.tie_embeddings, one.bcdt_norm_eps) == (
        "mamba1", 80, 3, True, None,
    )  # fmt: skip
    assert from_config(MAMBA1 | {"model_type": "falcon_mamba"}).bcdt_norm_eps == 1e-6


def test_defaults_are_the_installed_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for model_type, name in (("mamba", "Mamba"), ("falcon_mamba", "FalconMamba"), ("mamba2", "Mamba2")):
        written = json.loads(getattr(transformers, f"{name}Config")().to_json_string(use_diff=False))
        assert from_config({"model_type": model_type}) == from_config(written)


def test_every_key_of_transformers_is_read_or_harmless() -> None:
    """A key that a new release adds must be looked at before it counts as harmless."""
    transformers = pytest.importorskip("transformers")
    harmless = {
        # initialisation
        "initializer_range", "rescale_prenorm_residual", "time_step_init_scheme", "time_step_scale", "time_step_min",
        "time_step_max", "time_step_floor",
        # how it is computed, what is returned
        "use_cache", "use_mambapy", "use_associative_scan",
    }  # fmt: skip
    read = {
        "hidden_size", "num_hidden_layers", "state_size", "vocab_size", "conv_kernel", "layer_norm_epsilon", "expand",
        "use_conv_bias", "use_bias", "tie_word_embeddings", "residual_in_fp32", "hidden_act", "bos_token_id",
        "eos_token_id", "pad_token_id", "intermediate_size", "num_heads", "head_dim", "n_groups", "time_step_limit",
        "chunk_size", "time_step_rank", "mixer_rms_eps",
    }  # fmt: skip
    generic = set(transformers.PretrainedConfig().to_dict()) | {"model_type"}
    for name in ("Mamba", "FalconMamba", "Mamba2"):
        keys = set(getattr(transformers, f"{name}Config")().to_dict())
        assert keys - generic - harmless - read == set()


# ------------------------------------------------------------------ keys that change the mathematics are honoured


@pytest.mark.parametrize(
    ("ssm_cfg", "field", "value"),
    [
        ({"d_state": 64}, "d_state", 64),
        ({"headdim": 32}, "n_heads", 4),
        ({"ngroups": 2}, "norm_group_size", 64),
        ({"expand": 4}, "d_inner", 256),
        ({"d_conv": 3}, "d_conv", 3),
        ({"rmsnorm": False}, "gated_norm", False),
        ({"norm_before_gate": True}, "norm_before_gate", True),
        ({"D_has_hdim": True}, "d_has_hdim", True),
        ({"dt_limit": [0.001, 0.1]}, "dt_limit", (0.001, 0.1)),
        ({"bias": True}, "proj_bias", True),
        ({"conv_bias": False}, "conv_bias", False),
        ({"chunk_size": 64}, "chunk_size", 64),
        ({"activation": "swish"}, "d_state", 128),
        ({"d_ssm": None}, "d_inner", 128),
        ({"d_ssm": 128}, "d_inner", 128),
        ({"A_init_range": [1, 4], "dt_min": 0.01, "use_mem_eff_path": False, "conv_init": 0.1}, "d_inner", 128),
    ],
)
def test_ssm_cfg_is_honoured(ssm_cfg: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(from_config(ssm(layer="Mamba2", **ssm_cfg)), field) == value


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"use_bias": True}, "proj_bias", True),
        ({"use_conv_bias": False}, "conv_bias", False),
        ({"time_step_limit": [0.001, 0.1]}, "dt_limit", (0.001, 0.1)),
        ({"time_step_limit": [0.001, {"__float__": "Infinity"}]}, "dt_limit", (0.001, math.inf)),
        ({"time_step_limit": [0.0, math.inf]}, "dt_limit", (0.0, math.inf)),
        ({"layer_norm_epsilon": 1e-6}, "norm_eps", 1e-6),
        ({"residual_in_fp32": False}, "residual_in_fp32", False),
        ({"norm_group_size": 128}, "norm_group_size", 128),
        ({}, "norm_group_size", 64),
        (
            {"norm_before_gate": True, "rms_norm": True},
            "norm_before_gate",
            False,
        ),  # written, never read, by old releases
        ({"eos_token_id": [5, 6]}, "eos_token_id", 5),
        ({"eos_token_id": None}, "eos_token_id", None),
        ({"add_bos_token": True}, "add_bos", True),
        ({"intermediate_size": 128}, "d_inner", 128),
    ],
)
def test_transformers_keys_are_honoured(change: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(from_config(MAMBA2 | change), field) == value


def test_tying_follows_the_tensors_where_the_config_is_silent() -> None:
    assert from_config(MAMBA2, tensor_shapes={"backbone.embeddings.weight": (100, 64)}).tie_embeddings
    assert not from_config(MAMBA2, tensor_shapes={"lm_head.weight": (100, 64)}).tie_embeddings
    assert not from_config(MAMBA2 | {"tie_word_embeddings": False}, tensor_shapes={}).tie_embeddings


def test_a_hub_config_with_keys_of_both_layouts() -> None:
    """state-spaces/mamba-*-hf carry mamba_ssm's names too; transformers' own are what counts."""
    extra = {"d_model": 40, "n_layer": 2, "d_inner": 80, "ssm_cfg": {}, "rms_norm": True, "fused_add_norm": True}
    assert from_config(MAMBA1 | extra | {"intermediate_size": 80}) == from_config(MAMBA1)


# ------------------------------------------------------------------ or refused by name


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (ssm(layer="Mamba2", d_ssm=64), "d_ssm"),
        (ssm(layer="Mamba2", learnable_init_states=True), "learnable_init_states"),
        (ssm(layer="Mamba2", activation="relu"), "activation"),
        (ssm(layer="Mamba2", some_new_trick=1), "some_new_trick"),
        (ssm(layer="Mamba2", dt_rank=4), "dt_rank"),
        (ssm(layer="Mamba2", ngroups=3), "3 groups"),
        (ssm(layer="Mamba2", headdim=48), "headdim 48"),
        (ssm(layer="Mamba2", d_state="big"), "d_state"),
        (ssm(layer="Mamba2", rmsnorm="no"), "rmsnorm"),
        (ssm(layer="Mamba2", dt_limit=[0.1]), "dt_limit"),
        (ssm(layer="Mamba2", dt_limit=[0.2, 0.1]), "dt_limit"),
        (ssm(layer="Mamba2", expand=1.01), "expand"),
        (ssm(layer="Mamba1", rmsnorm=True), "rmsnorm"),
        (ssm(layer="Mamba1", dt_limit=[0.0, 1.0]), "dt_limit"),
        (ssm(layer="Mamba3"), "Mamba3"),
        (MAMBA_SSM | {"ssm_cfg": "Mamba2"}, "ssm_cfg"),
        (MAMBA_SSM | {"attn_layer_idx": [1]}, "attn_layer_idx"),
        (MAMBA_SSM | {"d_intermediate": 256}, "d_intermediate"),
        (MAMBA_SSM | {"rms_norm": False}, "rms_norm"),
        (MAMBA_SSM | {"bidirectional": True}, "bidirectional"),
        (MAMBA_SSM | {"logit_scale": 2.0}, "logit_scale"),
        (MAMBA_SSM | {"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple"),
        (MAMBA_SSM | {"n_layer": 0}, "n_layer"),
        (MAMBA2 | {"hidden_act": "gelu"}, "hidden_act"),
        (MAMBA2 | {"rms_norm": False}, "rms_norm"),
        (MAMBA2 | {"d_ssm": 64}, "d_ssm"),
        (MAMBA2 | {"rmsnorm": False}, "rmsnorm"),
        (MAMBA2 | {"D_has_hdim": True}, "D_has_hdim"),
        (MAMBA2 | {"attn_layer_idx": [0]}, "attn_layer_idx"),
        (MAMBA2 | {"intermediate_size": 64}, "intermediate_size"),
        (MAMBA2 | {"num_heads": 7}, "num_heads"),
        (MAMBA2 | {"norm_group_size": 48}, "norm_group_size"),
        (MAMBA2 | {"auto_map": {"AutoModel": "own.py"}}, "auto_map"),
        (MAMBA2 | {"eos_token_id": "</s>"}, "eos_token_id"),
        (MAMBA1 | {"time_step_limit": [0.0, 0.1]}, "time_step_limit"),
        (MAMBA1 | {"n_groups": 2}, "n_groups"),
        (MAMBA1 | {"mixer_rms_eps": 1e-6}, "mixer_rms_eps"),
        (MAMBA1 | {"time_step_rank": "full"}, "time_step_rank"),
        (MAMBA2 | {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        (MAMBA2 | {"quantization_config": {"bits": 4}}, "quant_method"),
        ({"model_type": "llama", "hidden_size": 64}, "llama"),
        ({"hidden_size": 64}, "model_type"),
    ],
)
def test_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as e:
        from_config(config)
    assert named in str(e.value)
    assert "\n" not in str(e.value)


# ------------------------------------------------------------------ and back

SPECS = [
    tiny_spec("mamba2"),
    tiny_spec("mamba2", n_groups=2, norm_group_size=32, proj_bias=True, conv_bias=False, tie_embeddings=False),
    tiny_spec("mamba2", dt_limit=(0.01, 0.5), d_conv=3, headdim=8, residual_in_fp32=False),
    tiny_spec("mamba2", dt_limit=(0.01, math.inf), d_inner=128),
    tiny_spec("mamba1"),
    tiny_spec("mamba1", dt_rank=7, proj_bias=True, d_state=4),
    named_spec("mamba2-1.3b"),
    named_spec("mamba-790m"),
]


def without_text(spec: ModelSpec) -> ModelSpec:
    """mamba_ssm's layout has no place for token ids."""
    return dataclasses.replace(spec, bos_token_id=None, eos_token_id=None, pad_token_id=None, add_bos=False)


@pytest.mark.parametrize("spec", SPECS)
def test_round_trips(spec: ModelSpec) -> None:
    spec = dataclasses.replace(spec, bos_token_id=3, add_bos=True)
    assert from_config(json.loads(json.dumps(to_transformers_config(spec)))) == spec
    assert from_config(json.loads(json.dumps(to_mamba_ssm_config(spec)))) == without_text(spec)


def test_falcon_mamba_round_trip() -> None:
    spec = tiny_spec("mamba1", bcdt_norm_eps=1e-6)
    assert from_config(to_transformers_config(spec)) == spec


def test_our_own_config_is_read_from_its_spec() -> None:
    spec = tiny_spec("mamba2", norm_before_gate=True)
    config = {"model_type": "mamba2", "quantization_config": {"quant_method": "slimba", "spec": spec.to_dict()}}
    assert from_config(json.loads(json.dumps(config))) == spec


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (tiny_spec("mamba2", norm_before_gate=True), "norm_before_gate"),
        (tiny_spec("mamba2", gated_norm=False), "gated norm"),
        (tiny_spec("mamba2", d_has_hdim=True), "D_has_hdim"),
        (tiny_spec("mamba2", n_groups=2), "norm_group_size 64"),
        (tiny_spec("mamba2", d_model=24), "d_inner 64"),
    ],
)
def test_what_transformers_cannot_express(spec: ModelSpec, named: str) -> None:
    with pytest.raises(UserError, match=f"transformers cannot express .*{named}"):
        to_transformers_config(spec)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (tiny_spec("mamba1", bcdt_norm_eps=1e-6), "norms on B, C and dt"),
        (tiny_spec("mamba2", norm_eps=1e-6), "norm_eps 1e-06"),
        (tiny_spec("mamba2", n_groups=4, norm_group_size=32), "norm_group_size 32"),
        (tiny_spec("mamba1", d_model=24), "d_inner 64"),
    ],
)
def test_what_mamba_ssm_cannot_express(spec: ModelSpec, named: str) -> None:
    with pytest.raises(UserError, match=f"mamba_ssm cannot express .*{named}"):
        to_mamba_ssm_config(spec)
