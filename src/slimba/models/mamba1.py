"""The Mamba mixer (arXiv 2312.00752), with Falcon-Mamba's weightless norms on B, C and dt where the spec has them.

    x, z = in_proj(u);  x = SiLU(conv(x));  dt, B, C = x_proj(x);  dt = softplus(dt_proj(dt))
    y = scan(x, dt, -exp(A_log), B, C) + D x;  out = out_proj(y * SiLU(z))

Run the tests: `pytest tests/models`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from slimba.models.mamba2 import LayerState
from slimba.models.norms import rms_normalise
from slimba.models.scan import causal_conv1d, selective_scan
from slimba.models.spec import ModelSpec

__all__ = ["Mamba1Mixer"]


class Mamba1Mixer(nn.Module):
    """u [B, L, D] -> [B, L, D]. With a state it continues from it and leaves it after the last token."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.chunk_size = 16
        self.in_proj = nn.Linear(spec.d_model, 2 * spec.d_inner, bias=spec.proj_bias)
        self.conv1d = nn.Conv1d(spec.d_inner, spec.d_inner, spec.d_conv, groups=spec.d_inner, bias=spec.conv_bias)
        self.x_proj = nn.Linear(spec.d_inner, spec.dt_rank + 2 * spec.d_state, bias=False)
        self.dt_proj = nn.Linear(spec.dt_rank, spec.d_inner, bias=True)
        self.A_log = nn.Parameter(torch.zeros(spec.d_inner, spec.d_state))
        self.D = nn.Parameter(torch.ones(spec.d_inner))
        self.out_proj = nn.Linear(spec.d_inner, spec.d_model, bias=spec.proj_bias)

    def new_state(self, batch: int, device: torch.device, dtype: torch.dtype = torch.float32) -> LayerState:
        s = self.spec
        return LayerState(
            torch.zeros(batch, s.d_conv - 1, s.d_inner, device=device, dtype=dtype),
            torch.zeros(batch, s.d_inner, s.d_state, device=device),
        )

    def forward(self, u: torch.Tensor, state: LayerState | None = None) -> torch.Tensor:
        s = self.spec
        raw, z = self.in_proj(u).chunk(2, dim=-1)
        x = F.silu(causal_conv1d(raw, self.conv1d.weight[:, 0], self.conv1d.bias, state.conv if state else None))
        dt, B, C = self.x_proj(x).split([s.dt_rank, s.d_state, s.d_state], dim=-1)
        if s.bcdt_norm_eps is not None:
            dt, B, C = (rms_normalise(t, s.bcdt_norm_eps).to(t.dtype) for t in (dt, B, C))
        dt = F.softplus(F.linear(dt, self.dt_proj.weight.to(dt.dtype)).float() + self.dt_proj.bias.float())
        y, last = selective_scan(
            x, dt, -self.A_log.float().exp(), B, C, self.chunk_size, state.ssm if state else None
        )
        y = (y.float() + x.float() * self.D.float()) * F.silu(z.float())
        if state is not None:
            window = torch.cat([state.conv, raw.to(state.conv.dtype)], dim=1)
            state.conv = window[:, window.shape[1] - (s.d_conv - 1) :]
            state.ssm = last
        return self.out_proj(y.to(u.dtype))
