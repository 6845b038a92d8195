"""The language model as a whole: names, states, causality, precision, first weights, loading.

Run: `pytest tests/models/test_lm.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from helpers.tiny import tiny_checkpoint, tiny_spec
from slimba.errors import UserError
from slimba.models.lm import SSMForCausalLM, init_weights, load_weights

NETWORKS: list[tuple[str, dict[str, Any]]] = [
    ("mamba2", {}),
    ("mamba2", {"n_groups": 2, "norm_group_size": 32, "tie_embeddings": False, "proj_bias": True, "headdim": 32}),
    ("mamba2", {"n_groups": 4, "norm_group_size": 64, "d_has_hdim": True, "norm_before_gate": True, "d_conv": 3}),
    ("mamba2", {"gated_norm": False, "conv_bias": False, "dt_limit": (0.02, 0.1), "d_conv": 1}),
    ("mamba1", {}),
    ("mamba1", {"bcdt_norm_eps": 1e-6, "tie_embeddings": False, "proj_bias": True}),
]


def network(architecture: str = "mamba2", **fields: Any) -> SSMForCausalLM:
    ckpt = tiny_checkpoint(architecture, **fields)
    model = SSMForCausalLM(ckpt.spec)
    load_weights(model, ckpt)
    return model.eval().requires_grad_(False)


def tokens(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 304, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize(("architecture", "fields"), NETWORKS)
def test_names_are_the_canonical_ones(architecture: str, fields: dict[str, Any]) -> None:
    spec = tiny_spec(architecture, **fields)
    expected = {name + ".weight": shape for name, shape in spec.matrices().items()}
    expected |= {name: shape for name, (shape, _) in spec.vectors().items()}
    model = SSMForCausalLM(spec)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == expected
    assert sum(p.numel() for p in model.parameters()) == spec.n_params()


@pytest.mark.parametrize(("architecture", "fields"), NETWORKS)
def test_pieces_of_any_length_equal_the_whole(architecture: str, fields: dict[str, Any]) -> None:
    """Token by token, and pieces shorter and longer than the convolution's window and the chunk."""
    model = network(architecture, **fields)
    ids = tokens(31)
    whole = model(ids)
    for split in ([1] * 31, [3, 1, 2, 17, 8], [30, 1]):
        state = model.new_state(2)
        pieces = [model(piece, state) for piece in ids.split(split, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("architecture", "fields"), NETWORKS)
def test_a_token_changes_no_earlier_logits(architecture: str, fields: dict[str, Any]) -> None:
    model = network(architecture, **fields)
    ids = tokens(24)
    before = model(ids)
    for at in (0, 8, 15, 23):
        changed = ids.clone()
        changed[:, at] = (changed[:, at] + 1) % 304
        after = model(changed)
        assert torch.equal(after[:, :at], before[:, :at])
        assert (after[:, at:] - before[:, at:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("architecture", ["mamba2", "mamba1"])
def test_chunk_size_is_speed_not_result(architecture: str) -> None:
    model = network(architecture)
    ids = tokens(45)
    expected = model(ids)
    for chunk in (1, 5, 16, 1000):
        model.set_chunk_size(chunk)
        torch.testing.assert_close(model(ids), expected, atol=2e-5, rtol=1e-5)
    with pytest.raises(UserError, match="chunk_size is 0"):
        model.set_chunk_size(0)


def test_a_cloned_state_goes_its_own_way() -> None:
    model = network()
    state = model.new_state(2)
    model(tokens(5), state)
    other = state.clone()
    kept = [layer.ssm.clone() for layer in other.layers]
    first = model(tokens(3), state)
    assert all(torch.equal(a, layer.ssm) for a, layer in zip(kept, other.layers, strict=True))
    assert torch.equal(model(tokens(3), other), first)
    assert state.batch == 2
    state.reset()
    torch.testing.assert_close(model(tokens(5), state), model(tokens(5)), atol=2e-5, rtol=1e-5)


def test_a_bfloat16_state_is_rounded_but_close() -> None:
    model = network()
    ids = tokens(20)
    state = model.new_state(2, dtype=torch.bfloat16)
    logits = torch.cat([model(piece, state) for piece in ids.split(1, dim=1)], dim=1)
    assert state.layers[0].ssm.dtype == torch.bfloat16
    error = (logits - model(ids)).abs().max()
    assert 0 < error < 0.2


def test_features_hidden_and_head() -> None:
    model = network("mamba2", n_layer=3)
    ids = tokens(6)
    features, hidden = model.features(ids)
    logits, again = model(ids, return_hidden=True)
    assert torch.equal(model.head(features), logits)
    assert len(hidden) == len(again) == 3
    assert torch.equal(model.backbone.norm_f(hidden[-1]), features)
    assert model.head_weight is model.backbone.embeddings.weight


@pytest.mark.parametrize("architecture", ["mamba2", "mamba1"])
def test_autocast_keeps_the_residual_stream_in_float32(architecture: str) -> None:
    model = network(architecture)
    ids = tokens(19)
    expected = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        features, hidden = model.features(ids)
        logits = model.head(features)
    assert {h.dtype for h in hidden} == {torch.float32}
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_bfloat16_weights(residual_in_fp32: bool) -> None:
    model = network("mamba2", residual_in_fp32=residual_in_fp32)
    expected = model(tokens(9))
    logits, hidden = model.bfloat16()(tokens(9), return_hidden=True)
    assert hidden[-1].dtype == (torch.float32 if residual_in_fp32 else torch.bfloat16)
    assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(("architecture", "fields"), NETWORKS)
def test_every_parameter_gets_a_gradient(architecture: str, fields: dict[str, Any]) -> None:
    model = network(architecture, **fields).requires_grad_(True)
    if architecture == "mamba2":
        model.set_chunk_size(8)
    model(tokens(20)).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name


def test_gradients_equal_those_through_the_recurrence() -> None:
    """Chunked forward against token-by-token forward, whose state carries the gradient along."""
    ids = tokens(13)
    grads = []
    for split in (13, 1):
        model = network("mamba2", n_groups=2, norm_group_size=32).requires_grad_(True)
        state = model.new_state(2)
        torch.cat([model(piece, state) for piece in ids.split(split, dim=1)], dim=1).square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, g in grads[0].items():
        torch.testing.assert_close(g, grads[1][name], atol=1e-5, rtol=1e-3, msg=name)


def test_projections_and_norms_can_be_replaced() -> None:
    """What a method does: put its own layer in place, of the same signature."""

    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *x: torch.Tensor) -> torch.Tensor:
            return self.inner(*x) * 0.5

    model = network()
    ids = tokens(4)
    last = model(ids)
    for place in ("in_proj", "out_proj", "norm"):
        mixer = model.backbone.layers[1].mixer
        setattr(mixer, place, Scaled(getattr(mixer, place)))
        logits = model(ids)
        state = model.new_state(2)
        steps = torch.cat([model(piece, state) for piece in ids.split(1, dim=1)], dim=1)
        assert not torch.allclose(logits, last)
        torch.testing.assert_close(steps, logits, atol=2e-5, rtol=1e-5)
        last = logits


@pytest.mark.parametrize(("architecture", "fields"), NETWORKS)
def test_first_weights(architecture: str, fields: dict[str, Any]) -> None:
    models = [SSMForCausalLM(tiny_spec(architecture, **fields)) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        init_weights(model, seed)
    a, b, c = (m.state_dict() for m in models)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["backbone.embeddings.weight"], c["backbone.embeddings.weight"])
    mixer = models[0].backbone.layers[0].mixer
    dt_bias = mixer.dt_bias if architecture == "mamba2" else mixer.dt_proj.bias
    dt = nn.functional.softplus(dt_bias)
    assert dt.min() >= 0.99e-3 and dt.max() <= 1.01e-1
    decay = mixer.A_log.exp()
    assert decay.min() >= 0.99 and decay.max() <= 16.01
    assert mixer.out_proj.weight.abs().max() < (mixer.spec.d_inner * mixer.spec.n_layer) ** -0.5
    assert 0.015 < a["backbone.embeddings.weight"].std() < 0.025
    loss = nn.functional.cross_entropy(models[0](tokens(16)).flatten(0, 1), tokens(16).flatten())
    assert abs(loss.item() - torch.tensor(304.0).log().item()) < 0.5


def test_loading_a_packed_model_equals_its_dequantised_weights() -> None:
    ckpt = tiny_checkpoint("mamba2", preset="dfssm")
    model = SSMForCausalLM(ckpt.spec)
    load_weights(model, ckpt)
    name = "backbone.layers.0.mixer.in_proj"
    assert torch.equal(model.state_dict()[name + ".weight"], torch.from_numpy(ckpt.matrix(name).dequantize()))
    for n in ckpt.spec.vectors():
        assert torch.equal(model.state_dict()[n], torch.from_numpy(ckpt.vector(n)))


def test_loading_another_network_is_refused_by_name() -> None:
    ckpt = tiny_checkpoint("mamba2")
    model = SSMForCausalLM(dataclasses.replace(ckpt.spec, norm_before_gate=True))
    with pytest.raises(UserError, match="norm_before_gate"):
        load_weights(model, ckpt)


def test_no_tokens_is_an_error() -> None:
    with pytest.raises(UserError, match="no tokens"):
        network()(tokens(0))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["mamba2", "mamba1"])
def test_the_network_compiles_as_one_graph(architecture: str) -> None:
    """No control flow depends on data: a whole training step can be traced, and captured in a CUDA graph."""
    model = network(architecture).requires_grad_(True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = compiled(tokens(21))
    torch.testing.assert_close(logits, model(tokens(21)), atol=2e-5, rtol=1e-5)
    logits.square().mean().backward()
