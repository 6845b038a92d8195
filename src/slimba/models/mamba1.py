"""The Mamba mixer (arXiv 2312.00752, figure 3), with Falcon-Mamba's weightless norms where the spec has them.

    x, z = in_proj(u);   x = silu(conv(x));   dt, B, C = x_proj(x);   dt = softplus(dt_proj(dt))
    h_t = exp(dt A) h_{t-1} + dt x B,   y = <h, C> + D x,   A = -exp(A_log);   out = out_proj(y * silu(z))

Legend: B batch, L length, D d_model, I d_inner, N d_state, K d_conv. Tests: `pytest tests/models`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from slimba.kernels import triton
from slimba.models.norms import rms_normalise
from slimba.models.scan import causal_conv1d, selective_recurrence, selective_scan
from slimba.models.spec import ModelSpec
from slimba.models.state import LayerState

__all__ = ["Mamba1Mixer"]


class Mamba1Mixer(nn.Module):
    """u [B, L, D] -> [B, L, D]. in_proj, x_proj and out_proj may be replaced by modules that do the same."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.chunk_size = 64  # see selective_scan
        self.in_proj = nn.Linear(spec.d_model, 2 * spec.d_inner, bias=spec.proj_bias)
        # holds the parameters; the arithmetic is scan.causal_conv1d
        self.conv1d = nn.Conv1d(spec.d_inner, spec.d_inner, spec.d_conv, groups=spec.d_inner, bias=spec.conv_bias)
        self.x_proj = nn.Linear(spec.d_inner, spec.dt_rank + 2 * spec.d_state, bias=False)
        self.dt_proj = nn.Linear(spec.dt_rank, spec.d_inner, bias=True)
        self.A_log = nn.Parameter(torch.empty(spec.d_inner, spec.d_state))
        self.D = nn.Parameter(torch.empty(spec.d_inner))
        self.out_proj = nn.Linear(spec.d_inner, spec.d_model, bias=spec.proj_bias)
        self.round_scan: Callable[[torch.Tensor], torch.Tensor] | None = None  # what an engine does to x

    def forward(self, u: torch.Tensor, state: LayerState | None = None) -> torch.Tensor:
        """With a state: continue from it, and leave it as it is after the last token of u."""
        if state is not None and u.shape[1] == 1:
            return self.step(u[:, 0], state)[:, None]
        if state is None and (fused := self.fused(u)) is not None:
            return self.out_proj(fused)
        raw, z = self.in_proj(u).chunk(2, dim=-1)
        x, window = causal_conv1d(raw, self.conv1d.weight, self.conv1d.bias, state.conv if state else None)
        x = self.activate(x)
        dt, B, C = self.select(x)
        y, last = selective_scan(x, dt, self.A, B, C, self.chunk_size, state.ssm if state else None)
        if state is not None:
            state.update(window, last)
        return self.out_proj(self.gate(y, x, z))

    def step(self, u: torch.Tensor, state: LayerState) -> torch.Tensor:
        """One token: u [B, D] -> [B, D]; the state moves on by one."""
        raw, z = self.in_proj(u[:, None]).chunk(2, dim=-1)
        window = torch.cat([state.conv, raw.to(state.conv.dtype)], dim=1)  # [B, K, I]
        x = (window * self.conv1d.weight[:, 0].T.float()).sum(1, keepdim=True)
        if self.conv1d.bias is not None:
            x = x + self.conv1d.bias.float()
        x = self.activate(x.to(raw.dtype))
        dt, B, C = self.select(x)
        y, last = selective_recurrence(x, dt, self.A, B, C, state.ssm)
        state.update(window[:, 1:], last)
        return self.out_proj(self.gate(y, x, z))[:, 0]

    def fused(self, u: torch.Tensor) -> torch.Tensor | None:
        """What goes into out_proj, by the Triton kernels; None where they do not apply (they are for training)."""
        kernels = triton.optional("mixer1") if u.is_cuda else None
        narrow = torch.is_autocast_enabled("cuda") or u.dtype != torch.float32
        if kernels is None or not narrow or self.round_scan is not None or not kernels.usable(self.spec):
            return None
        raw, z = self.in_proj(u).chunk(2, dim=-1)
        x = kernels.conv_silu(raw, self.conv1d.weight, self.conv1d.bias)
        dt, B, C = self.selection(x)
        dt = F.linear(dt, self.dt_proj.weight)  # the kernel adds the bias, in float32
        out: torch.Tensor = kernels.scan(x, dt, B, C, z, self.dt_proj.bias, self.A_log, self.D)
        return out

    # ------------------------------------------------------------ the parts that both share

    @property
    def A(self) -> torch.Tensor:
        """[I, N], negative, float32."""
        return -self.A_log.float().exp()

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        """After the convolution: [B, L, I]."""
        x = F.silu(x)
        return x if self.round_scan is None else self.round_scan(x)

    def select(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [B, L, I] -> dt [B, L, I] float32 and positive, B and C [B, L, N]."""
        dt, B, C = self.selection(x)
        return F.softplus(self.dt_proj(dt).float()), B, C

    def selection(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [B, L, I] -> the input of dt_proj [B, L, dt_rank], B and C [B, L, N]."""
        s = self.spec
        dt, B, C = self.x_proj(x).split([s.dt_rank, s.d_state, s.d_state], dim=-1)
        if s.bcdt_norm_eps is not None:
            dt, B, C = (rms_normalise(t, s.bcdt_norm_eps).to(t.dtype) for t in (dt, B, C))
        return dt, B, C

    def gate(self, y: torch.Tensor, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """The skip D x and the gate: [B, L, I] in z's dtype."""
        return ((y + x * self.D.float()) * F.silu(z.float())).to(z.dtype)
