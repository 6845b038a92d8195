"""The Mamba-2 mixer (arXiv 2405.21060). Legend: B batch, L length, D d_model, I d_inner, H heads, P headdim, N state, G groups.

    z, x, B, C, dt = in_proj(u);  x, B, C = SiLU(conv(x, B, C));  dt = clamp(softplus(dt + dt_bias))
    y = SSD(x, dt, -exp(A_log), B, C) + D x;  out = out_proj(norm(y * SiLU(z)))

Run the tests: `pytest tests/models`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from slimba.models.norms import GatedRMSNorm
from slimba.models.scan import causal_conv1d, ssd_chunked
from slimba.models.spec import ModelSpec

__all__ = ["LayerState", "Mamba2Mixer"]


@dataclass(slots=True)
class LayerState:
    """What one layer remembers: `conv` [B, K-1, channels] the last inputs of the convolution, `ssm` float32
    ([B, H, P, N] in Mamba-2, [B, I, N] in Mamba-1)."""

    conv: torch.Tensor
    ssm: torch.Tensor

    def clone(self) -> LayerState:
        return LayerState(self.conv.clone(), self.ssm.clone())


class Mamba2Mixer(nn.Module):
    """u [B, L, D] -> [B, L, D]. With a state it continues from it and leaves it after the last token."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        channels = spec.d_conv_channels
        self.chunk_size = spec.chunk_size  # may be set: it changes the speed, not the result
        self.in_proj = nn.Linear(spec.d_model, sum(spec.in_proj_rows.values()), bias=spec.proj_bias)
        self.conv1d = nn.Conv1d(channels, channels, spec.d_conv, groups=channels, bias=spec.conv_bias)
        self.dt_bias = nn.Parameter(torch.zeros(spec.n_heads))
        self.A_log = nn.Parameter(torch.zeros(spec.n_heads))
        self.D = nn.Parameter(torch.ones(spec.d_inner if spec.d_has_hdim else spec.n_heads))
        self.norm = (
            GatedRMSNorm(spec.d_inner, spec.norm_group_size, spec.norm_eps, spec.norm_before_gate)
            if spec.gated_norm
            else None
        )
        self.out_proj = nn.Linear(spec.d_inner, spec.d_model, bias=spec.proj_bias)

    def new_state(self, batch: int, device: torch.device, dtype: torch.dtype = torch.float32) -> LayerState:
        s = self.spec
        return LayerState(
            torch.zeros(batch, s.d_conv - 1, s.d_conv_channels, device=device, dtype=dtype),
            torch.zeros(batch, s.n_heads, s.headdim, s.d_state, device=device),
        )

    def forward(self, u: torch.Tensor, state: LayerState | None = None) -> torch.Tensor:
        s = self.spec
        z, xbc, dt = self.in_proj(u).split([s.d_inner, s.d_conv_channels, s.n_heads], dim=-1)
        y, gate = self.mix(z, xbc, dt, state)
        y = y * F.silu(gate.float()) if self.norm is None else self.norm(y, gate)
        return self.out_proj(y.to(u.dtype))

    def mix(
        self, z: torch.Tensor, xbc: torch.Tensor, dt: torch.Tensor, state: LayerState | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Convolution and SSD: y [B, L, I] before the gate, and z."""
        s = self.spec
        batch, length, _ = z.shape
        raw = xbc
        xbc = F.silu(causal_conv1d(xbc, self.conv1d.weight[:, 0], self.conv1d.bias, state.conv if state else None))
        gn = s.n_groups * s.d_state
        x, B, C = xbc.split([s.d_inner, gn, gn], dim=-1)
        x = x.view(batch, length, s.n_heads, s.headdim)
        dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*s.dt_limit)
        y, last = ssd_chunked(
            x,
            dt,
            -self.A_log.float().exp(),
            B.reshape(batch, length, s.n_groups, s.d_state),
            C.reshape(batch, length, s.n_groups, s.d_state),
            self.chunk_size,
            state.ssm if state else None,
        )
        skip = self.D.view(s.n_heads, -1).to(x.dtype)  # [H, 1] or [H, P]
        y = y + x * skip
        if state is not None:
            window = torch.cat([state.conv, raw.to(state.conv.dtype)], dim=1)
            state.conv = window[:, window.shape[1] - (s.d_conv - 1) :]
            state.ssm = last
        return y.reshape(batch, length, s.d_inner), z
