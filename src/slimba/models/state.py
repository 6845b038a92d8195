"""What a model remembers between calls: constant in size, whatever the length of the text before."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slimba.models.spec import ModelSpec

__all__ = ["LayerState", "ModelState"]


@dataclass(slots=True)
class LayerState:
    """One layer's memory. Mixers replace the tensors by those after the last token they saw.

    conv float32 [B, K-1, channels]: the convolution's last inputs. ssm [B, H, P, N] (Mamba-2) or [B, I, N] (Mamba-1),
    in the dtype it was made with: an update is computed in float32 and rounded to it.
    """

    conv: torch.Tensor
    ssm: torch.Tensor

    @classmethod
    def zeros(
        cls, spec: ModelSpec, batch: int, device: torch.device | str | None, dtype: torch.dtype = torch.float32
    ) -> LayerState:
        heads = (spec.n_heads, spec.headdim) if spec.architecture == "mamba2" else (spec.d_inner,)
        return cls(
            torch.zeros(batch, spec.d_conv - 1, spec.d_conv_channels, device=device),
            torch.zeros(batch, *heads, spec.d_state, device=device, dtype=dtype),
        )

    def update(self, conv: torch.Tensor, ssm: torch.Tensor) -> None:
        self.conv, self.ssm = conv.to(self.conv.dtype), ssm.to(self.ssm.dtype)

    def clone(self) -> LayerState:
        return LayerState(self.conv.clone(), self.ssm.clone())


@dataclass(slots=True)
class ModelState:
    """One LayerState per block."""

    layers: list[LayerState]

    @property
    def batch(self) -> int:
        return self.layers[0].conv.shape[0]

    def clone(self) -> ModelState:
        return ModelState([layer.clone() for layer in self.layers])

    def reset(self) -> None:
        for layer in self.layers:
            layer.update(torch.zeros_like(layer.conv), torch.zeros_like(layer.ssm))
