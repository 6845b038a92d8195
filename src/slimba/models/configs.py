"""Config dictionaries of transformers and mamba_ssm to `ModelSpec` and back, and the published sizes. No torch.

A key that changes the mathematics is honoured or refused by name. Other keys are treated as the library that reads the
file treats them: mamba_ssm stops at one that it does not know, and so do we (those it knows and that change nothing are
in the IGNORED lists); transformers' networks read no key but those that `_from_transformers` reads and those that only
concern initialisation and kernels, which a test holds against the installed release.

Where the two libraries differ, or releases of one do:

* Size of a gated-norm group (Mamba-2 with more than one group): d_inner // n_groups, which is what mamba_ssm trains
  with and what transformers does today. Its releases before pull request 40861 took one RMS over all of d_inner, for
  every config, so neither a key nor the version in a config tells what the weights were trained with. For a model that
  was trained by such a release, put `"norm_group_size": <d_inner>` into its config.json; the key is honoured.
* `norm_before_gate` and `rms_norm` in a transformers Mamba-2 config: early releases wrote the first as true by default,
  but the network always gated first. It is ignored there, and honoured in mamba_ssm's `ssm_cfg`.
* mamba_ssm fixes every eps at 1e-5 and pads the vocabulary up to `pad_vocab_size_multiple`; transformers stores both.

Tests: `pytest tests/models/test_configs.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from slimba.errors import UserError
from slimba.models.config_keys import Keys
from slimba.models.spec import ModelSpec

__all__ = ["from_config", "named_spec", "to_mamba_ssm_config", "to_transformers_config"]

# transformers' class defaults, for keys that a config leaves out.
TRANSFORMERS_DEFAULTS: dict[str, dict[str, Any]] = {
    "mamba": {"vocab_size": 50280, "hidden_size": 768, "state_size": 16, "num_hidden_layers": 32,
              "tie_word_embeddings": True, "token_ids": (0, 0, 0)},
    "falcon_mamba": {"vocab_size": 50280, "hidden_size": 768, "state_size": 16, "num_hidden_layers": 32,
                     "tie_word_embeddings": True, "token_ids": (0, 0, 0)},
    "mamba2": {"vocab_size": 32768, "hidden_size": 4096, "state_size": 128, "num_hidden_layers": 64,
               "tie_word_embeddings": False, "token_ids": (0, 2, 1)},
}  # fmt: skip

# Known to mamba_ssm, of no consequence for the network's output: initialisation, kernels' choices, bookkeeping.
IGNORED_MAMBA_SSM = frozenset((
    "architectures", "attn_cfg", "fused_add_norm", "model_type", "torch_dtype", "dtype",
))  # fmt: skip
IGNORED_SSM_CFG = frozenset((
    "A_init_range", "conv_init", "dt_min", "dt_max", "dt_init_floor", "dt_init", "dt_scale", "use_fast_path",
    "use_mem_eff_path", "layer_idx", "process_group", "sequence_parallel", "device", "dtype",
))  # fmt: skip

# Keys that change the mathematics in a way that no network here has: name -> values that switch them off.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "d_ssm": (None,),
    "d_intermediate": (None, 0),
    "attn_layer_idx": (None, []),
    "learnable_init_states": (None, False),
    "bidirectional": (None, False),
    "rms_norm": (None, True),  # False means LayerNorm between the blocks
    "auto_map": (None,),  # a model with code of its own
}
# These mamba_ssm reads from ssm_cfg; transformers' networks have no such choice, so there they are refused.
MAMBA_SSM_ONLY: dict[str, tuple[Any, ...]] = {
    "rmsnorm": (None, True),
    "D_has_hdim": (None, False),
    "dt_limit": (None,),
}
MAMBA2_ONLY: dict[str, tuple[Any, ...]] = {"n_groups": (None, 1), "ngroups": (None, 1), "time_step_limit": (None,)}


def from_config(config: Mapping[str, Any], *, tensor_shapes: Mapping[str, tuple[int, ...]] | None = None) -> ModelSpec:
    """The spec of a config.json, whose layout is told by its keys.

    `tensor_shapes` (names as stored) settles only whether the head is tied where a transformers config does not say.
    Raises UserError, naming the key, for what Slimba does not support and for another tool's quantised model.
    """
    quantisation = config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else quantisation
        if method != "slimba":
            raise UserError(f"config.json: quant_method {method!r} is another tool's; give the unquantised model")
        if "spec" in quantisation:
            return ModelSpec.from_dict(quantisation["spec"])
    model_type = config.get("model_type")
    if "d_model" in config and "n_layer" in config and "hidden_size" not in config:
        return _from_mamba_ssm(config)
    if model_type in TRANSFORMERS_DEFAULTS:
        return _from_transformers(config, tensor_shapes)
    known = ", ".join(TRANSFORMERS_DEFAULTS)
    if model_type is None:
        raise UserError(f"config.json: neither a model_type ({known}) nor mamba_ssm's d_model and n_layer")
    raise UserError(
        f"config.json: model_type {model_type!r} is not supported, known are {known} and mamba_ssm's layout"
    )


def _from_transformers(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None) -> ModelSpec:
    model_type = config["model_type"]
    default = TRANSFORMERS_DEFAULTS[model_type]
    keys = Keys(config, "config.json")
    keys.refuse(UNSUPPORTED | MAMBA_SSM_ONLY)
    keys.silu_only("hidden_act")
    d_model = keys.whole("hidden_size", default["hidden_size"])
    d_inner = keys.expanded(d_model)
    for name in ("intermediate_size", "d_inner"):
        if (given := keys.whole(name, d_inner)) != d_inner:
            raise UserError(f"config.json: {name} is {given}, but expand times hidden_size is {d_inner}")
    tied = default["tie_word_embeddings"] if shapes is None else "lm_head.weight" not in shapes
    fields: dict[str, Any] = {
        "n_layer": keys.whole("num_hidden_layers", default["num_hidden_layers"]),
        "d_model": d_model,
        "d_inner": d_inner,
        "d_state": keys.whole("state_size", default["state_size"]),
        "vocab_size": keys.whole("vocab_size", default["vocab_size"]),
        "d_conv": keys.whole("conv_kernel", 4),
        "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
        "conv_bias": keys.flag("use_conv_bias", True),
        "proj_bias": keys.flag("use_bias", False),
        "tie_embeddings": keys.flag("tie_word_embeddings", tied),
        "residual_in_fp32": keys.flag("residual_in_fp32", True),
        **keys.token_ids(default["token_ids"]),
    }
    if model_type == "mamba2":
        heads, headdim = keys.whole("num_heads", 128), keys.whole("head_dim", 64)
        if heads * headdim != d_inner:
            raise UserError(f"config.json: num_heads {heads} times head_dim {headdim} is not the inner width {d_inner}")
        return _mamba2(keys, fields, headdim, keys.whole("n_groups", 8), keys.limits("time_step_limit"))
    if (limits := keys.limits("time_step_limit")) != (0.0, math.inf):
        raise UserError(f"config.json: time_step_limit {limits} is not supported for {model_type}")
    keys.refuse(MAMBA2_ONLY)
    if model_type == "falcon_mamba":
        fields["bcdt_norm_eps"] = keys.number("mixer_rms_eps", 1e-6)
    elif "mixer_rms_eps" in keys.left:
        raise UserError("config.json: mixer_rms_eps belongs to model_type falcon_mamba, not to mamba")
    return ModelSpec(architecture="mamba1", dt_rank=_dt_rank(keys, "time_step_rank", d_model), **fields)


def _from_mamba_ssm(config: Mapping[str, Any]) -> ModelSpec:
    keys = Keys(config, "config.json")
    keys.refuse(UNSUPPORTED)
    ssm_cfg = keys.take("ssm_cfg", {})
    if not isinstance(ssm_cfg, Mapping):
        raise UserError(f"config.json: ssm_cfg is {ssm_cfg!r}, it must be an object")
    ssm = Keys(ssm_cfg, "config.json: ssm_cfg")
    layer = ssm.take("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise UserError(f"config.json: ssm_cfg: layer {layer!r} is not supported, known are Mamba1 and Mamba2")
    ssm.silu_only("activation")
    d_model = keys.whole("d_model", 0)
    d_inner = ssm.expanded(d_model)
    if ssm.left.get("d_ssm") == d_inner:
        del ssm.left["d_ssm"]  # the SSM on every channel, as without the key
    ssm.refuse({"d_ssm": (None,), "learnable_init_states": (None, False)})
    vocab, multiple = keys.whole("vocab_size", 50277), keys.whole("pad_vocab_size_multiple", 8)
    if multiple < 1:
        raise UserError(f"config.json: pad_vocab_size_multiple is {multiple}, it must be at least 1")
    fields: dict[str, Any] = {
        "n_layer": keys.whole("n_layer", 0),
        "d_model": d_model,
        "d_inner": d_inner,
        "d_state": ssm.whole("d_state", 128 if layer == "Mamba2" else 16),
        "vocab_size": -(-vocab // multiple) * multiple,
        "d_conv": ssm.whole("d_conv", 4),
        "conv_bias": ssm.flag("conv_bias", True),
        "proj_bias": ssm.flag("bias", False),
        "tie_embeddings": keys.flag("tie_embeddings", True),
        "residual_in_fp32": keys.flag("residual_in_fp32", True),
        **keys.token_ids((None, None, None)),
    }
    if layer == "Mamba2":
        fields["gated_norm"] = ssm.flag("rmsnorm", True)
        fields["norm_before_gate"] = ssm.flag("norm_before_gate", False)
        fields["d_has_hdim"] = ssm.flag("D_has_hdim", False)
        spec = _mamba2(ssm, fields, ssm.whole("headdim", 64), ssm.whole("ngroups", 1), ssm.limits("dt_limit"))
    else:
        spec = ModelSpec(architecture="mamba1", dt_rank=_dt_rank(ssm, "dt_rank", d_model), **fields)
    for rest, ignored in ((ssm, IGNORED_SSM_CFG), (keys, IGNORED_MAMBA_SSM)):
        if unknown := sorted(set(rest.left) - ignored):
            raise UserError(f"{rest.where}: unknown key {unknown[0]!r}, which may change the network; remove it if not")
    return spec


def _mamba2(keys: Keys, fields: dict[str, Any], headdim: int, n_groups: int, limits: tuple[float, float]) -> ModelSpec:
    d_inner = fields["d_inner"]
    if n_groups < 1 or d_inner % n_groups:
        raise UserError(f"{keys.where}: {n_groups} groups do not divide the inner width {d_inner}")
    return ModelSpec(
        architecture="mamba2",
        headdim=headdim,
        n_groups=n_groups,
        chunk_size=keys.whole("chunk_size", 256),
        norm_group_size=keys.whole("norm_group_size", d_inner // n_groups),
        dt_limit=limits,
        **fields,
    )


def _dt_rank(keys: Keys, name: str, d_model: int) -> int:
    return math.ceil(d_model / 16) if keys.left.get(name) == "auto" else keys.whole(name, math.ceil(d_model / 16))


def _expand(spec: ModelSpec, target: str) -> int:
    """Both libraries store d_inner as a whole multiple of d_model."""
    if spec.d_inner % spec.d_model:
        raise UserError(
            f"{target} cannot express d_inner {spec.d_inner}: it is no whole multiple of d_model {spec.d_model}"
        )
    return spec.d_inner // spec.d_model


def _refuse(target: str, checks: dict[str, bool]) -> None:
    for what, refused in checks.items():
        if refused:
            raise UserError(f"{target} cannot express {what}; keep this model in Slimba's layout")


def to_transformers_config(spec: ModelSpec) -> dict[str, Any]:
    """config.json keys for transformers 5. Raises UserError, naming it, for what those networks cannot do."""
    target = "transformers"
    out: dict[str, Any] = {
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.n_layer,
        "state_size": spec.d_state,
        "expand": _expand(spec, target),
        "vocab_size": spec.vocab_size,
        "conv_kernel": spec.d_conv,
        "layer_norm_epsilon": spec.norm_eps,
        "use_conv_bias": spec.conv_bias,
        "use_bias": spec.proj_bias,
        "hidden_act": "silu",
        "residual_in_fp32": spec.residual_in_fp32,
        "tie_word_embeddings": spec.tie_embeddings,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": spec.eos_token_id,
        "pad_token_id": spec.pad_token_id,
        "add_bos_token": spec.add_bos,
    }
    if spec.architecture == "mamba1":
        falcon = spec.bcdt_norm_eps is not None
        head = {
            "model_type": "falcon_mamba" if falcon else "mamba",
            "architectures": ["FalconMambaForCausalLM" if falcon else "MambaForCausalLM"],
        }
        out["time_step_rank"] = spec.dt_rank
        out["intermediate_size"] = spec.d_inner
        return head | out | ({"mixer_rms_eps": spec.bcdt_norm_eps} if falcon else {})
    checks = {
        "a Mamba-2 without gated norm": not spec.gated_norm,
        "norm_before_gate": spec.norm_before_gate,
        "D_has_hdim": spec.d_has_hdim,
        f"norm_group_size {spec.norm_group_size} with {spec.n_groups} groups": (
            spec.norm_group_size != spec.d_inner // spec.n_groups
        ),
    }
    _refuse(target, checks)
    out |= {"num_heads": spec.n_heads, "head_dim": spec.headdim, "n_groups": spec.n_groups}
    out["chunk_size"] = spec.chunk_size
    if spec.dt_limit != (0.0, math.inf):  # the default is left out: JSON has no infinity
        out["time_step_limit"] = [{"__float__": "Infinity"} if v == math.inf else v for v in spec.dt_limit]
    return {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]} | out


def to_mamba_ssm_config(spec: ModelSpec) -> dict[str, Any]:
    """config.json keys for mamba_ssm. Raises UserError, naming it, for what that library cannot do.

    The layout has no place for token ids and the beginning-of-text policy; they live in the tokenizer's files.
    """
    target = "mamba_ssm"
    checks = {
        f"norm_eps {spec.norm_eps} (it is always 1e-05)": spec.norm_eps != 1e-5,
        "Falcon-Mamba's norms on B, C and dt": spec.bcdt_norm_eps is not None,
    }
    if spec.architecture == "mamba2" and spec.gated_norm:
        checks[f"norm_group_size {spec.norm_group_size} with {spec.n_groups} groups"] = (
            spec.norm_group_size != spec.d_inner // spec.n_groups
        )
    _refuse(target, checks)
    ssm: dict[str, Any] = {"layer": "Mamba2" if spec.architecture == "mamba2" else "Mamba1"}
    values: dict[str, tuple[Any, Any]] = {  # name: (value, default); defaults are left out
        "d_state": (spec.d_state, 128 if spec.architecture == "mamba2" else 16),
        "d_conv": (spec.d_conv, 4),
        "expand": (_expand(spec, target), 2),
        "conv_bias": (spec.conv_bias, True),
        "bias": (spec.proj_bias, False),
    }
    if spec.architecture == "mamba2":
        values |= {
            "headdim": (spec.headdim, 64),
            "ngroups": (spec.n_groups, 1),
            "chunk_size": (spec.chunk_size, 256),
            "rmsnorm": (spec.gated_norm, True),
            "norm_before_gate": (spec.norm_before_gate, False),
            "D_has_hdim": (spec.d_has_hdim, False),
            "dt_limit": (list(spec.dt_limit), [0.0, math.inf]),
        }
    else:
        values["dt_rank"] = (spec.dt_rank, math.ceil(spec.d_model / 16))
    ssm |= {name: value for name, (value, default) in values.items() if value != default}
    return {
        "d_model": spec.d_model,
        "d_intermediate": 0,
        "n_layer": spec.n_layer,
        "vocab_size": spec.vocab_size,
        "ssm_cfg": ssm,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": spec.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": next(m for m in (16, 8, 1) if spec.vocab_size % m == 0),
        "tie_embeddings": spec.tie_embeddings,
    }


# Published by state-spaces: (d_model, n_layer). All with expand 2, tied embeddings and the GPT-NeoX tokenizer.
SIZES: dict[str, tuple[int, int]] = {
    "mamba2-130m": (768, 24),
    "mamba2-370m": (1024, 48),
    "mamba2-780m": (1536, 48),
    "mamba2-1.3b": (2048, 48),
    "mamba2-2.7b": (2560, 64),
    "mamba-130m": (768, 24),
    "mamba-370m": (1024, 48),
    "mamba-790m": (1536, 48),
    "mamba-1.4b": (2048, 48),
    "mamba-2.8b": (2560, 64),
}


def named_spec(name: str) -> ModelSpec:
    """The spec of a published size, e.g. "mamba2-1.3b". Raises UserError listing the names it knows."""
    if name == "falcon-mamba-7b":
        config = {"model_type": "falcon_mamba", "hidden_size": 4096, "num_hidden_layers": 64, "vocab_size": 65024}
        return from_config(config | {"tie_word_embeddings": False})
    if name not in SIZES:
        raise UserError(f"unknown shape {name!r}, known are {', '.join(SIZES)} and falcon-mamba-7b")
    d_model, n_layer = SIZES[name]
    second = name.startswith("mamba2")
    return from_config(
        {
            "d_model": d_model,
            "n_layer": n_layer,
            "vocab_size": 50277,
            "pad_vocab_size_multiple": 16 if second else 8,
            "ssm_cfg": {"layer": "Mamba2" if second else "Mamba1"},
        }
    )
