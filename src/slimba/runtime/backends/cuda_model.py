"""A checkpoint's weights in GPU memory, layer by layer, as both the decode step and the bulk pass use them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.models.spec import ModelSpec
from slimba.runtime.backends.cuda_device import Gpu
from slimba.runtime.backends.cuda_weights import DeviceMatrix, side_by_side

__all__ = ["CudaModel", "LayerWeights", "entries_of", "span_of"]

SPAN = 32  # most channels of a block of slimba_recur and slimba_scan: 4 rows in each of 8 warps


def span_of(channels: int) -> int:
    """The largest divisor of `channels` that is at most SPAN."""
    return next(n for n in range(min(SPAN, channels), 0, -1) if channels % n == 0)


def entries_of(d_state: int) -> str:
    """Ending of the kernels for rows of so many state entries."""
    return "quad" if d_state == 128 else "1" if d_state < 128 else "2"


@dataclass(slots=True)
class LayerWeights:
    """Matrices by short name, and small vectors in float32; conv is [K][channels], a is -exp(A_log)."""

    matrices: dict[str, DeviceMatrix]
    norm: torch.Tensor
    conv: torch.Tensor
    conv_bias: torch.Tensor | None
    a: torch.Tensor
    d: torch.Tensor
    dt_bias: torch.Tensor
    gated_norm: torch.Tensor | None


class CudaModel:
    """spec, layers, embedding, head (the embedding where they are tied) and norm_f."""

    def __init__(self, checkpoint: Checkpoint, gpu: Gpu, activations: str = "float32") -> None:
        self.spec: ModelSpec = checkpoint.spec
        self._checkpoint = checkpoint
        self._gpu = gpu
        self._activations = activations
        spec = self.spec
        self.embedding = self._matrix("backbone.embeddings")
        self.head = self.embedding if spec.tie_embeddings else self._matrix("lm_head")
        self.norm_f = self._vector("backbone.norm_f.weight")
        self.layers = [self._layer(f"backbone.layers.{i}.") for i in range(spec.n_layer)]
        del self._checkpoint

    @property
    def nbytes(self) -> int:
        own = [*(m for layer in self.layers for m in layer.matrices.values()), self.embedding]
        return sum(m.nbytes for m in own) + (self.head.nbytes if self.head is not self.embedding else 0)

    def _layer(self, at: str) -> LayerWeights:
        spec, mixer = self.spec, at + "mixer."
        mamba2 = spec.architecture == "mamba2"
        matrices = {}
        for short in spec.layer_matrices():
            biased = spec.proj_bias and short in ("in_proj", "out_proj")
            bias = self._checkpoint.vector(f"{mixer}{short}.bias") if biased else None
            matrices[short] = self._matrix(mixer + short, bias)
        # exp in float64: the decay is a power of it, so its error would grow with the length
        a = -np.exp(self._checkpoint.vector(mixer + "A_log").astype(np.float64))
        vectors = {
            "norm": self._vector(at + "norm.weight"),
            "conv": self._upload(self._checkpoint.vector(mixer + "conv1d.weight")[:, 0, :].T),
            "a": self._upload(a),
            "d": self._vector(mixer + "D"),
            "dt_bias": self._vector(mixer + ("dt_bias" if mamba2 else "dt_proj.bias")),
        }
        if spec.conv_bias:
            vectors["conv_bias"] = self._vector(mixer + "conv1d.bias")
        if mamba2 and spec.gated_norm:
            vectors["gated_norm"] = self._vector(mixer + "norm.weight")
        together, _ = side_by_side(list(vectors.values()))
        named: dict[str, torch.Tensor | None] = dict(zip(vectors, together, strict=True))
        absent = {name: None for name in ("conv_bias", "gated_norm") if name not in vectors}
        return LayerWeights(matrices, **named, **absent)  # type: ignore[arg-type]

    def _matrix(self, name: str, bias: np.ndarray | None = None) -> DeviceMatrix:
        matrix = self._checkpoint.matrix(name)
        return DeviceMatrix(matrix, self._gpu.device, self._gpu.blocks, bias, name, self._activations)

    def _vector(self, name: str) -> torch.Tensor:
        return self._upload(self._checkpoint.vector(name))

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array, np.float32, order="C")).to(self._gpu.device)
