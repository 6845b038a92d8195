"""What is done to a float model before it is quantised: norms folded, the residual stream rotated, channels reordered.

    source = Source(teacher, fold=True)       # layer by layer, straight from the mapped file
    source.spec, source.embedding(), source.layer(3), source.head(), source.final_norm()

Each leaves the model's logits as they were (tests/methods/test_quamba2.py). With H the orthogonal transform of D
columns: an RMSNorm of weight one commutes with H, so its weight goes into the columns of what follows, W_in' = W_in
diag(g) H; embedding rows become E H, out_proj's rows H W_out (its bias too), an own head's rows W diag(g) H. A tied
head is untied, because the last norm's weight belongs to one of the two tables only.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache

import numpy as np
import torch

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.errors import UserError
from slimba.formats.hadamard import block_of, hadamard
from slimba.models.spec import ModelSpec

__all__ = ["Source", "reordered", "rotate"]

WHOLE = 64  # blocks up to this size are one product, larger ones two


@lru_cache(maxsize=16)
def _matrix(n: int, device: torch.device) -> torch.Tensor:
    return hadamard(torch.eye(n), n).to(device)


def rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    """The transform of formats/hadamard.py as products, which is faster in torch and not the same in the last bit.

    x [..., cols], block a power of two that divides cols. H of a * b columns is the Kronecker product of Ha and Hb.
    """
    if block <= WHOLE:
        return (x.reshape(*x.shape[:-1], -1, block) @ _matrix(block, x.device)).reshape(x.shape)
    a = 2 ** (int(math.log2(block)) // 2)
    y = x.reshape(*x.shape[:-1], -1, a, block // a) @ _matrix(block // a, x.device)
    return (_matrix(a, x.device) @ y).reshape(x.shape)


class Source:
    """The float tensors that are quantised, float32 on `device`, made from the teacher's file one layer at a time.

    `fold`: rotate the residual stream; `spec` is then the model with an own head.
    """

    def __init__(self, teacher: Checkpoint, *, fold: bool, device: torch.device | str = "cpu") -> None:
        self._teacher, self._fold, self._device = teacher, fold, device
        self.spec: ModelSpec = dataclasses.replace(teacher.spec, tie_embeddings=False) if fold else teacher.spec

    def embedding(self) -> torch.Tensor:
        """[V, D]"""
        return self._turned(self._matrix("backbone.embeddings"))

    def head(self) -> torch.Tensor | None:
        """[V, D]; None where it is the embedding."""
        if self.spec.tie_embeddings:
            return None
        head = self._matrix(self._teacher.head)
        return self._turned(head * self._vector("backbone.norm_f.weight")) if self._fold else head

    def final_norm(self) -> torch.Tensor:
        """[D]"""
        weight = self._vector("backbone.norm_f.weight")
        return torch.ones_like(weight) if self._fold else weight

    def layer(self, i: int) -> dict[str, torch.Tensor]:
        """Every tensor of layer i by its name within the layer: `norm.weight`, `mixer.in_proj.weight`, ..."""
        at = f"backbone.layers.{i}."
        out = {f"mixer.{n}.weight": self._matrix(f"{at}mixer.{n}") for n in self.spec.layer_matrices()}
        out |= {n[len(at) :]: self._vector(n) for n in self.spec.vectors() if n.startswith(at)}
        if self._fold:
            out["mixer.in_proj.weight"] = self._turned(out["mixer.in_proj.weight"] * out["norm.weight"])
            out["norm.weight"] = torch.ones_like(out["norm.weight"])
            out["mixer.out_proj.weight"] = self._turned(out["mixer.out_proj.weight"].T).T.contiguous()
            if "mixer.out_proj.bias" in out:
                out["mixer.out_proj.bias"] = self._turned(out["mixer.out_proj.bias"])
        return out

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        return rotate(x, block_of(self.spec.d_model)) if self._fold else x

    def _matrix(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._teacher.matrix(name).dequantize()).to(self._device)

    def _vector(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(self._teacher.vector(name))).to(self._device)


def reordered(
    layer: dict[str, torch.Tensor], spec: ModelSpec, channels: torch.Tensor, heads: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The layer of a Mamba-2 with its heads and their channels in another order: new position -> old one.

    channels int64 [I], heads int64 [H]; head h of the new order holds channels[h P : (h + 1) P], all of one old head.
    Heads must stay within their group of B and C, and within a group of the gated norm. UserError where the norm's
    groups are smaller.
    """
    inner, per_group = spec.d_inner, spec.d_inner // spec.n_groups
    if spec.gated_norm and spec.norm_group_size % per_group:
        raise UserError("channels cannot be reordered: a group of the gated norm is smaller than a group of B and C")
    conv = torch.cat([channels, torch.arange(inner, spec.d_conv_channels, device=channels.device)])
    rows = torch.cat([channels, inner + conv, inner + spec.d_conv_channels + heads])
    order = {"in_proj.weight": rows, "in_proj.bias": rows, "conv1d.weight": conv, "conv1d.bias": conv}
    order |= {"A_log": heads, "dt_bias": heads, "D": channels if spec.d_has_hdim else heads, "norm.weight": channels}
    out = dict(layer)
    for name, index in order.items():
        if (full := f"mixer.{name}") in layer:
            out[full] = layer[full][index]
    out["mixer.out_proj.weight"] = layer["mixer.out_proj.weight"][:, channels]
    return out
