"""What a model remembers between calls: constant in size, whatever the length of the text before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from slimba.models.spec import ModelSpec

__all__ = ["STATE_BLOCK", "HeldTokens", "LayerState", "ModelState"]

STATE_BLOCK = 16  # tokens between two storings of a Mamba-2 state in fewer bits

Rounding = Callable[[torch.Tensor], torch.Tensor]


@dataclass(slots=True)
class HeldTokens:
    """What a stored Mamba-2 state does not hold yet: its last j < 16 tokens (docs/decisions.md, recurrent state).

    u float32 [B, j, H, P] = hold(dt x), b [B, j, G, N] = hold(B), logs [B, j, H]: dt A summed up since
    the last storing. `store` rounds a state [B, H, P, N] to what is stored.
    """

    u: torch.Tensor
    b: torch.Tensor
    logs: torch.Tensor
    hold: Rounding
    store: Rounding

    @classmethod
    def none(
        cls, spec: ModelSpec, batch: int, device: torch.device | str, hold: Rounding, store: Rounding
    ) -> HeldTokens:
        return cls(
            torch.zeros(batch, 0, spec.n_heads, spec.headdim, device=device),
            torch.zeros(batch, 0, spec.n_groups, spec.d_state, device=device),
            torch.zeros(batch, 0, spec.n_heads, device=device),
            hold,
            store,
        )


@dataclass(slots=True)
class LayerState:
    """One layer's memory. Mixers replace the tensors by those after the last token they saw.

    conv float32 [B, K-1, channels]: the convolution's last inputs. ssm [B, H, P, N] (Mamba-2) or [B, I, N] (Mamba-1),
    in the dtype it was made with: an update is computed in float32 and rounded to it. With `held`, ssm is what
    was stored last.
    """

    conv: torch.Tensor
    ssm: torch.Tensor
    held: HeldTokens | None = None  # of a Mamba-2 whose state is stored in fewer bits

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
        return LayerState(self.conv.clone(), self.ssm.clone(), replace(self.held) if self.held else None)


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
