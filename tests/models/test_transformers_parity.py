"""Rung 1 of the correctness ladder: our networks equal transformers' (its slow path, float32) on tiny random models.

The config is the one that `to_transformers_config` writes and the weights go over by name, so both are tested too.

One deviation of transformers, seen in 5.23 and tested below so that a change is noticed: with a cache its Mamba-2 takes
single tokens without the limits on dt, so its own steps disagree with its own full pass. Its grouped B, C and norm, its
chunks, and prefill that continues from a cache are right.

Run: `pytest tests/models/test_transformers_parity.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.tiny import tiny_checkpoint
from slimba.models.configs import from_config, to_transformers_config
from slimba.models.lm import SSMForCausalLM, load_weights

transformers = pytest.importorskip("transformers")

CLASSES = {
    "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
    "falcon_mamba": (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM),
    "mamba2": (transformers.Mamba2Config, transformers.Mamba2ForCausalLM),
}
MAMBA2 = [  # (length, fields of the spec)
    (37, {}),
    (1, {}),
    (16, {"d_inner": 64, "headdim": 32, "d_state": 64}),
    (29, {"d_inner": 128, "headdim": 64, "d_state": 128, "d_model": 64, "tie_embeddings": False}),
    (45, {"d_inner": 128, "headdim": 16, "n_groups": 2, "norm_group_size": 64, "d_model": 64, "chunk_size": 7}),
    (33, {"d_inner": 128, "headdim": 32, "n_groups": 4, "norm_group_size": 32, "d_model": 64, "d_state": 128}),
    (41, {"d_inner": 256, "headdim": 64, "n_groups": 4, "norm_group_size": 64, "d_model": 64, "d_state": 64}),
    (21, {"proj_bias": True, "tie_embeddings": False, "d_conv": 3, "norm_eps": 1e-3}),
    (21, {"conv_bias": False, "n_layer": 3, "d_state": 24, "d_conv": 2}),
    (50, {"dt_limit": (0.05, 0.2)}),
]
MAMBA1 = [
    (37, {}),
    (1, {"tie_embeddings": False}),
    (70, {"d_state": 8, "dt_rank": 5, "proj_bias": True}),
    (23, {"conv_bias": False, "d_conv": 3, "d_model": 48, "d_inner": 96}),
    (37, {"bcdt_norm_eps": 1e-6}),
    (65, {"bcdt_norm_eps": 1e-2, "tie_embeddings": False, "d_state": 5}),
]


def twins(architecture: str, fields: dict[str, Any]) -> tuple[SSMForCausalLM, Any]:
    """Our network and transformers', with the same weights."""
    ckpt = tiny_checkpoint(architecture, **fields)
    ours = SSMForCausalLM(ckpt.spec)
    load_weights(ours, ckpt)
    config = to_transformers_config(ckpt.spec)
    assert from_config(config) == ckpt.spec
    config_class, model_class = CLASSES[config["model_type"]]
    theirs = model_class(config_class(**config)).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if ckpt.spec.tie_embeddings else [])
    theirs.tie_weights()
    return ours.eval(), theirs


def tokens(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 304, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize(
    ("architecture", "length", "fields"), [("mamba2", *c) for c in MAMBA2] + [("mamba1", *c) for c in MAMBA1]
)
@torch.no_grad()
def test_logits_and_hidden_states(architecture: str, length: int, fields: dict[str, Any]) -> None:
    ours, theirs = twins(architecture, fields)
    ids = tokens(length)
    logits, hidden = ours(ids, return_hidden=True)
    expected = theirs(ids, use_cache=False, output_hidden_states=True)
    assert logits.std() > 0.5, "the comparison needs logits of ordinary size"
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=1e-4)
    for mine, other in zip(hidden[:-1], expected.hidden_states, strict=False):  # theirs ends with the normed one
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [("mamba2", MAMBA2[0][1]), ("mamba2", MAMBA2[5][1]), ("mamba1", {}), ("mamba1", {"bcdt_norm_eps": 1e-6})],
)
@torch.no_grad()
def test_steps_with_a_state(architecture: str, fields: dict[str, Any]) -> None:
    ours, theirs = twins(architecture, fields)
    ids = tokens(12)
    state = ours.new_state(2)
    logits = ours(ids[:, :8], state)
    expected = theirs(ids[:, :8], use_cache=True)
    for t in range(8, 12):
        torch.testing.assert_close(logits[:, -1], expected.logits[:, -1], atol=1e-4, rtol=1e-4)
        logits = ours(ids[:, t : t + 1], state)
        expected = theirs(ids[:, t : t + 1], cache_params=expected.cache_params, use_cache=True)


@torch.no_grad()
def test_transformers_steps_ignore_the_dt_limit_and_ours_do_not() -> None:
    ours, theirs = twins("mamba2", {"dt_limit": (0.05, 0.2)})
    ids = tokens(9)
    full = ours(ids)
    state = ours.new_state(2)
    ours(ids[:, :8], state)
    torch.testing.assert_close(ours(ids[:, 8:], state)[:, 0], full[:, -1], atol=1e-5, rtol=1e-5)
    cache = theirs(ids[:, :8], use_cache=True).cache_params
    step = theirs(ids[:, 8:], cache_params=cache, use_cache=True).logits[:, -1]
    assert (step - full[:, -1]).abs().max() > 1e-3


@torch.no_grad()
def test_one_norm_group_over_several_groups_is_another_network() -> None:
    """Why ModelSpec carries norm_group_size: releases of transformers disagree, and it matters."""
    fields = {"n_groups": 4, "norm_group_size": 16}
    ours, theirs = twins("mamba2", fields)
    ids = tokens(10)
    whole = tiny_checkpoint("mamba2", n_groups=4, norm_group_size=64)
    other = SSMForCausalLM(whole.spec)
    other.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(ids), theirs(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    assert (other(ids) - ours(ids)).abs().max() > 1e-2
