"""The Mamba-2 mixer (arXiv 2405.21060, figure 6 right).

    z, x, B, C, dt = in_proj(u);   x, B, C = silu(conv(x, B, C));   dt = clamp(softplus(dt + dt_bias), dt_limit)
    S_t = exp(dt A) S_{t-1} + dt x B^T,   y = S C + D x,   A = -exp(A_log);   out = out_proj(norm(y * silu(z)))

Legend: B batch, L length, D d_model, I d_inner, H heads, P headdim, N d_state, G groups, K d_conv.
Tests: `pytest tests/models`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from slimba.kernels import triton
from slimba.models.norms import GatedRMSNorm
from slimba.models.scan import causal_conv1d, ssd_chunked, ssd_recurrence, ssd_stored
from slimba.models.spec import ModelSpec
from slimba.models.state import LayerState

__all__ = ["Mamba2Mixer"]

DEFAULT_CHUNK = 64  # the spec's chunk (256) is the choice of fused GPU kernels; see ssd_chunked


class Mamba2Mixer(nn.Module):
    """u [B, L, D] -> [B, L, D]. in_proj, out_proj and norm may be replaced by modules of the same signature."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.chunk_size = min(spec.chunk_size, DEFAULT_CHUNK)
        channels = spec.d_conv_channels
        self.in_proj = nn.Linear(spec.d_model, sum(spec.in_proj_rows.values()), bias=spec.proj_bias)
        # holds the parameters; the arithmetic is scan.causal_conv1d
        self.conv1d = nn.Conv1d(channels, channels, spec.d_conv, groups=channels, bias=spec.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(spec.n_heads))
        self.A_log = nn.Parameter(torch.empty(spec.n_heads))
        self.D = nn.Parameter(torch.empty(spec.d_inner if spec.d_has_hdim else spec.n_heads))
        self.norm = (
            GatedRMSNorm(spec.d_inner, spec.norm_group_size, spec.norm_eps, spec.norm_before_gate)
            if spec.gated_norm
            else None
        )
        self.out_proj = nn.Linear(spec.d_inner, spec.d_model, bias=spec.proj_bias)
        self.round_scan: Callable[[torch.Tensor], torch.Tensor] | None = None  # what an engine does to x, B and C

    def forward(self, u: torch.Tensor, state: LayerState | None = None) -> torch.Tensor:
        """With a state: continue from it, and leave it as it is after the last token of u."""
        if state is not None and u.shape[1] == 1 and state.held is None:
            return self.step(u[:, 0], state)[:, None]
        if state is None and (fused := self.fused(u)) is not None:
            return self.out_proj(fused)
        z, raw, dt = self.project(u)
        xbc, window = causal_conv1d(raw, self.conv1d.weight, self.conv1d.bias, state.conv if state else None)
        x, B, C = self.split(F.silu(xbc))
        step, A = self.time_step(dt), self.A
        if state is not None and state.held is not None:
            y, last = ssd_stored(x, step, A, B, C, state.ssm, state.held)
        else:
            y, last = ssd_chunked(x, step, A, B, C, self.chunk_size, state.ssm if state else None)
        if state is not None:
            state.update(window, last)
        return self.out_proj(self.gate(y, x, z))

    def step(self, u: torch.Tensor, state: LayerState) -> torch.Tensor:
        """One token: u [B, D] -> [B, D]; the state moves on by one."""
        z, raw, dt = self.project(u[:, None])
        window = torch.cat([state.conv, raw.to(state.conv.dtype)], dim=1)  # [B, K, channels]
        xbc = (window * self.conv1d.weight[:, 0].T.float()).sum(1, keepdim=True)
        if self.conv1d.bias is not None:
            xbc = xbc + self.conv1d.bias.float()
        x, B, C = self.split(F.silu(xbc.to(raw.dtype)))
        y, last = ssd_recurrence(x, self.time_step(dt), self.A, B, C, state.ssm)
        state.update(window[:, 1:], last)
        return self.out_proj(self.gate(y, x, z))[:, 0]

    def fused(self, u: torch.Tensor) -> torch.Tensor | None:
        """What goes into out_proj, by the Triton kernels; None where they do not apply (they are for training)."""
        kernels = triton.optional("mixer") if u.is_cuda else None
        narrow = torch.is_autocast_enabled("cuda") or u.dtype != torch.float32
        if kernels is None or not narrow or self.round_scan is not None or not kernels.usable(self.spec):
            return None
        assert self.norm is not None and self.conv1d.bias is not None  # `usable` says so
        taps, bias = self.conv1d.weight, self.conv1d.bias
        out: torch.Tensor = kernels.inner(
            self.in_proj(u), taps, bias, self.dt_bias, self.A_log, self.D, self.norm.weight, self.spec
        )
        return out

    # ------------------------------------------------------------ the parts that both share

    @property
    def A(self) -> torch.Tensor:
        """[H], negative, float32."""
        return -self.A_log.float().exp()

    def project(self, u: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[B, L, D] -> z [B, L, I], x B C together [B, L, I + 2 G N], dt [B, L, H]."""
        s = self.spec
        return self.in_proj(u).split([s.d_inner, s.d_conv_channels, s.n_heads], dim=-1)

    def split(self, xbc: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, L, I + 2 G N] -> x [B, L, H, P], B and C [B, L, G, N]."""
        s, (batch, length, _) = self.spec, xbc.shape
        if self.round_scan is not None:
            xbc = self.round_scan(xbc)
        gn = s.n_groups * s.d_state
        x, B, C = xbc.split([s.d_inner, gn, gn], dim=-1)
        grouped = (batch, length, s.n_groups, s.d_state)
        return x.reshape(batch, length, s.n_heads, s.headdim), B.reshape(grouped), C.reshape(grouped)

    def time_step(self, dt: torch.Tensor) -> torch.Tensor:
        """float32, positive, within the spec's limits."""
        dt = F.softplus(dt.float() + self.dt_bias.float())
        return dt if self.spec.dt_limit == (0.0, math.inf) else dt.clamp(*self.spec.dt_limit)

    def gate(self, y: torch.Tensor, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """The skip D x, the gate and the norm: [B, L, I] in z's dtype."""
        y = (y + x * self.D.float().view(self.spec.n_heads, -1)).flatten(2)  # D [H, 1] or [H, P]
        return (y * F.silu(z.float())).to(z.dtype) if self.norm is None else self.norm(y, z)
