"""The language model: embedding, blocks, final norm, head. Its state_dict keys are the canonical tensor names.

    model = SSMForCausalLM(spec); load_weights(model, checkpoint); logits = model(ids)          # [B, L, V]
    state = model.new_state(batch=1); logits = model(ids[:, :5], state); logits = model(ids[:, 5:], state)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.models.mamba1 import Mamba1Mixer
from slimba.models.mamba2 import LayerState, Mamba2Mixer
from slimba.models.norms import RMSNorm
from slimba.models.spec import ModelSpec

__all__ = ["ModelState", "SSMForCausalLM", "init_weights", "load_weights"]


@dataclass(slots=True)
class ModelState:
    """One LayerState per block."""

    layers: list[LayerState]

    def clone(self) -> ModelState:
        return ModelState([layer.clone() for layer in self.layers])


class Block(nn.Module):
    """u + mixer(norm(u)); the residual stream stays in the dtype it came in."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.norm = RMSNorm(spec.d_model, spec.norm_eps)
        self.mixer = Mamba2Mixer(spec) if spec.architecture == "mamba2" else Mamba1Mixer(spec)

    def forward(self, u: torch.Tensor, state: LayerState | None = None) -> torch.Tensor:
        return u + self.mixer(self.norm(u), state)


class Backbone(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(spec.vocab_size, spec.d_model)
        self.layers = nn.ModuleList(Block(spec) for _ in range(spec.n_layer))
        self.norm_f = RMSNorm(spec.d_model, spec.norm_eps)


class SSMForCausalLM(nn.Module):
    """A Mamba or Mamba-2 language model."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = Backbone(spec)
        self.lm_head = None if spec.tie_embeddings else nn.Linear(spec.d_model, spec.vocab_size, bias=False)

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, D]; the embedding where it is tied."""
        return self.backbone.embeddings.weight if self.lm_head is None else self.lm_head.weight

    def set_chunk_size(self, chunk_size: int) -> None:
        """Chunk of the training-time scan: speed, not result."""
        for block in self.backbone.layers:
            block.mixer.chunk_size = chunk_size

    def new_state(self, batch: int, dtype: torch.dtype = torch.float32) -> ModelState:
        device = self.backbone.embeddings.weight.device
        return ModelState([block.mixer.new_state(batch, device, dtype) for block in self.backbone.layers])

    def features(
        self, ids: torch.Tensor, state: ModelState | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """ids [B, L] -> final normed features [B, L, D], and the residual stream after each block."""
        u = self.backbone.embeddings(ids).float()
        hidden = []
        for i, block in enumerate(self.backbone.layers):
            u = block(u, state.layers[i] if state else None)
            hidden.append(u)
        return self.backbone.norm_f(u), hidden

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """[..., D] -> logits [..., V]."""
        return F.linear(features, self.head_weight.to(features.dtype))

    def forward(
        self, ids: torch.Tensor, state: ModelState | None = None, *, return_hidden: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """ids [B, L] -> logits [B, L, V] (and the hidden states); continues from `state` and moves it on."""
        features, hidden = self.features(ids, state)
        logits = self.head(features)
        return (logits, hidden) if return_hidden else logits


@torch.no_grad()
def load_weights(model: SSMForCausalLM, checkpoint: Checkpoint) -> None:
    """Fill `model` with the checkpoint's weights, dequantised to float32."""
    weights = {n + ".weight": torch.from_numpy(checkpoint.matrix(n).dequantize()) for n in checkpoint.spec.matrices()}
    weights |= {n: torch.from_numpy(checkpoint.vector(n).copy()) for n in checkpoint.spec.vectors()}
    model.load_state_dict(weights, strict=True)


@torch.no_grad()
def init_weights(model: SSMForCausalLM, seed: int) -> None:
    """First weights for training from scratch, as published for Mamba (section 3.6) and Mamba-2.

    Embedding N(0, 0.02); projections uniform within 1/sqrt(fan-in), out_proj further over sqrt(n_layer); dt log-uniform
    in [1e-3, 1e-1]; A uniform in [1, 16] (Mamba-2) or 1..N (Mamba-1); D one; norms one; convolution uniform.
    """
    g = torch.Generator().manual_seed(seed)
    spec = model.spec

    def uniform(p: torch.Tensor, bound: float) -> None:
        p.copy_((torch.rand(p.shape, generator=g) * 2 - 1) * bound)

    model.backbone.embeddings.weight.copy_(torch.randn(model.backbone.embeddings.weight.shape, generator=g) * 0.02)
    if model.lm_head is not None:
        uniform(model.lm_head.weight, 1 / math.sqrt(spec.d_model))
    for block in model.backbone.layers:
        m = block.mixer
        uniform(m.in_proj.weight, 1 / math.sqrt(spec.d_model))
        uniform(m.out_proj.weight, 1 / math.sqrt(spec.d_inner) / math.sqrt(spec.n_layer))
        uniform(m.conv1d.weight, 1 / math.sqrt(spec.d_conv))
        for linear in (m.in_proj, m.out_proj):
            if linear.bias is not None:
                linear.bias.zero_()
        if m.conv1d.bias is not None:
            uniform(m.conv1d.bias, 1 / math.sqrt(spec.d_conv))
        dt_bias = m.dt_bias if spec.architecture == "mamba2" else m.dt_proj.bias
        dt = torch.exp(torch.rand(dt_bias.shape, generator=g) * math.log(100.0) + math.log(1e-3)).clamp_min(1e-4)
        dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        m.D.fill_(1)
        if spec.architecture == "mamba2":
            m.A_log.copy_(torch.log(torch.rand(m.A_log.shape, generator=g) * 15 + 1))
        else:
            m.A_log.copy_(torch.log(torch.arange(1, spec.d_state + 1).float()).expand_as(m.A_log))
            uniform(m.x_proj.weight, 1 / math.sqrt(spec.d_inner))
            uniform(m.dt_proj.weight, spec.dt_rank**-0.5)
