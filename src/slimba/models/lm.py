"""The language model: embedding, blocks, final norm, head. Its state_dict keys are the canonical tensor names.

    model = SSMForCausalLM(spec); load_weights(model, checkpoint)
    logits = model(ids)                                                  # a whole sequence: [B, L, V]
    state = model.new_state(batch=1)
    logits = model(ids[:, :5], state); logits = model(ids[:, 5:], state)  # the same, in pieces of any length

Tests: `pytest tests/models`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.errors import UserError
from slimba.models.mamba1 import Mamba1Mixer
from slimba.models.mamba2 import Mamba2Mixer
from slimba.models.norms import RMSNorm
from slimba.models.spec import ModelSpec
from slimba.models.state import LayerState, ModelState

__all__ = ["ModelState", "SSMForCausalLM", "init_weights", "load_weights"]


class Block(nn.Module):
    """One residual block: u [B, L, D] + mixer(norm(u)). A float32 u stays float32, under autocast too."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.norm = RMSNorm(spec.d_model, spec.norm_eps)
        self.mixer = Mamba2Mixer(spec) if spec.architecture == "mamba2" else Mamba1Mixer(spec)

    def forward(self, u: torch.Tensor, state: LayerState | None = None) -> torch.Tensor:
        return u + self.mixer(self.norm(u), state).to(u.dtype)


class Backbone(nn.Module):
    """Everything but the head."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.residual_in_fp32 = spec.residual_in_fp32
        self.recompute = False
        self.isolated = False  # no gradient from block to block: each is trained on its own
        self.embeddings = nn.Embedding(spec.vocab_size, spec.d_model)
        self.layers = nn.ModuleList(Block(spec) for _ in range(spec.n_layer))
        self.norm_f = RMSNorm(spec.d_model, spec.norm_eps)

    def forward(
        self, ids: torch.Tensor, state: ModelState | None = None, hidden: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """ids [B, L] -> normed features [B, L, D]. The residual stream after each block is appended to `hidden`."""
        if not ids.shape[1]:
            raise UserError("the model was given no tokens; it needs at least one")
        u = self.embeddings(ids)
        if self.residual_in_fp32:
            u = u.float()
        layer_states: Iterable[LayerState | None] = state.layers if state else [None] * len(self.layers)
        for block, layer_state in zip(self.layers, layer_states, strict=True):
            u = self.forget(block, u) if self.recompute and torch.is_grad_enabled() else block(u, layer_state)
            if hidden is not None:
                hidden.append(u)
            if self.isolated:
                u = u.detach()
        return self.norm_f(u)

    def forget(self, block: nn.Module, u: torch.Tensor) -> torch.Tensor:
        """The block without its activations, which are computed again for the gradient; from an empty state.

        The weights are handed over: those that functional_call lends have left the block by the time of the gradient.
        """
        weights = dict(block.named_parameters())
        return recomputed(
            torch.func.functional_call, block, weights, (u,), use_reentrant=False, preserve_rng_state=False
        )


class SSMForCausalLM(nn.Module):
    """A Mamba or Mamba-2 language model. Its weights are zero until `load_weights` or `init_weights` fills them."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        device = torch.get_default_device()
        with torch.device("meta"):  # skips torch's own random first weights, minutes of them at 1.3B
            self.backbone = Backbone(spec)
            self.lm_head = None if spec.tie_embeddings else nn.Linear(spec.d_model, spec.vocab_size, bias=False)
        self.to_empty(device=device)
        with torch.no_grad():
            for p in self.parameters():
                p.zero_()

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, D]; the embedding's where it is tied."""
        return self.backbone.embeddings.weight if self.lm_head is None else self.lm_head.weight

    def set_chunk_size(self, chunk_size: int) -> None:
        """Chunk of the scans: speed and memory, not the result. `ssd_chunked` and `selective_scan` say what is good."""
        if chunk_size < 1:
            raise UserError(f"chunk_size is {chunk_size}, it must be at least 1")
        for module in self.modules():
            if isinstance(module, Mamba1Mixer | Mamba2Mixer):
                module.chunk_size = chunk_size

    def set_recompute(self, recompute: bool) -> None:
        """Whether training keeps only the stream between the blocks and computes the rest again for the gradient."""
        self.backbone.recompute = recompute

    def new_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> ModelState:
        """The state before the first token. `dtype` is that of the SSM states; the device defaults to the weights'."""
        device = device or self.backbone.embeddings.weight.device
        return ModelState([LayerState.zeros(self.spec, batch, device, dtype) for _ in range(self.spec.n_layer)])

    def features(self, ids: torch.Tensor, state: ModelState | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """ids [B, L] -> what `head` takes [B, L, D], and the n_layer residual streams after each block."""
        hidden: list[torch.Tensor] = []
        return self.backbone(ids, state, hidden), hidden

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """[..., D] -> logits [..., V]."""
        return F.linear(features, self.head_weight.to(features.dtype))

    def forward(
        self, ids: torch.Tensor, state: ModelState | None = None, *, return_hidden: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """ids [B, L] -> logits [B, L, V], or (logits, hidden); continues from `state` and moves it on by L tokens."""
        hidden: list[torch.Tensor] | None = [] if return_hidden else None
        logits = self.head(self.backbone(ids, state, hidden))
        return logits if hidden is None else (logits, hidden)


# fields of a spec that leave the network's mathematics alone
TEXT_AND_SPEED = {"chunk_size", "bos_token_id", "eos_token_id", "pad_token_id", "add_bos"}


@torch.no_grad()
def load_weights(model: SSMForCausalLM, checkpoint: Checkpoint) -> None:
    """Fill `model` with the checkpoint's weights, dequantised. UserError when the two describe different networks."""
    ours, theirs = model.spec.to_dict(), checkpoint.spec.to_dict()
    for name in ours.keys() - TEXT_AND_SPEED:
        if ours[name] != theirs[name]:
            raise UserError(f"the model has {name} {ours[name]}, but the checkpoint has {theirs[name]}")
    params = dict(model.named_parameters())
    for name in model.spec.matrices():
        params[name + ".weight"].copy_(torch.from_numpy(checkpoint.matrix(name).dequantize()))
    for name in model.spec.vectors():
        params[name].copy_(torch.from_numpy(checkpoint.vector(name).copy()))


@torch.no_grad()
def init_weights(model: SSMForCausalLM, seed: int) -> None:
    """First weights for training from scratch, as published with Mamba (section 3.6) and Mamba-2.

    Embedding N(0, 0.02^2); projections and convolution uniform within 1/sqrt(fan-in), out_proj within that over
    sqrt(n_layer); softplus(dt bias) log-uniform in [1e-3, 1e-1]; A uniform in [1, 16] (Mamba-2) or 1..N (Mamba-1,
    S4D-real); D and norms one; biases of projections zero. Drawn on the CPU: the same on every device.
    """
    g = torch.Generator().manual_seed(seed)
    spec = model.spec

    def random(p: torch.Tensor) -> torch.Tensor:
        return torch.rand(p.shape, generator=g, device="cpu")

    for name, (_, cols) in spec.matrices().items():
        p, last = model.get_parameter(name + ".weight"), name.rpartition(".")[2]
        if last == "embeddings":
            p.copy_(torch.randn(p.shape, generator=g, device="cpu") * 0.02)
        else:
            bound = cols**-0.5 * (spec.n_layer**-0.5 if last == "out_proj" else 1)
            p.copy_((random(p) * 2 - 1) * bound)
    for name, (_, kind) in spec.vectors().items():
        p = model.get_parameter(name)
        if kind == "norm" or name.endswith(".D"):
            p.fill_(1)
        elif kind == "conv":
            p.copy_((random(p) * 2 - 1) * spec.d_conv**-0.5)
        elif kind == "bias":
            p.zero_()
        elif not name.endswith("A_log"):  # the bias of dt
            dt = torch.exp(random(p) * math.log(100.0)) * 1e-3
            p.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        elif spec.architecture == "mamba2":
            p.copy_(torch.log(random(p) * 15 + 1))
        else:
            p.copy_(torch.log(torch.arange(1.0, spec.d_state + 1, device="cpu")).expand_as(p))
