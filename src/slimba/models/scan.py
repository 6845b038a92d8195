"""The scans, in plain PyTorch: naive recurrences and their parallel forms, all with gradients.

SSD (Mamba-2, arXiv 2405.21060) and selective scan (Mamba, arXiv 2312.00752):

    Mamba-2, per head:     S_t = exp(dt_t A) S_{t-1} + (dt_t x_t) B_t^T ,   y_t = S_t C_t
    Mamba-1, per channel:  h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t ,       y_t = <h_t, C_t>

(the skip D x is the mixer's). Legend: B batch, L length, H heads, P headdim, N state, G groups, I d_inner, Q chunk.
Run the tests: `pytest tests/models/test_scan.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["causal_conv1d", "selective_recurrence", "selective_scan", "ssd_chunked", "ssd_recurrence"]


def causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, window: torch.Tensor | None = None
) -> torch.Tensor:
    """Depthwise causal convolution. x [B, L, channels], weight [channels, K] (oldest tap first), bias [channels].

    `window` [B, K-1, channels] holds the inputs before x (zeros when None). Returns [B, L, channels].
    """
    taps = weight.shape[-1]
    length = x.shape[1]
    before = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if window is None else window.to(x.dtype)
    padded = torch.cat([before, x], dim=1)
    weight = weight.to(x.dtype)
    y = padded[:, :length] * weight[:, 0]
    for k in range(1, taps):
        y = y + padded[:, k : k + length] * weight[:, k]
    return y if bias is None else y + bias.to(x.dtype)


# ------------------------------------------------------------------ Mamba-2


def ssd_recurrence(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The naive twin of `ssd_chunked`: one token at a time, in float32.

    x [B, L, H, P], dt [B, L, H] (softplus and clamp done), A [H] (negative), B and C [B, L, G, N],
    initial_state [B, H, P, N]. Returns y [B, L, H, P] and the state after the last token.
    """
    b, length, h, p = x.shape
    per_group = h // B.shape[2]
    state = x.new_zeros(b, h, p, B.shape[3], dtype=torch.float32) if initial_state is None else initial_state.float()
    ys = []
    for t in range(length):
        b_t = B[:, t].float().repeat_interleave(per_group, dim=1)  # [B, H, N]
        c_t = C[:, t].float().repeat_interleave(per_group, dim=1)
        decay = torch.exp(dt[:, t].float() * A.float())  # [B, H]
        update = (dt[:, t].float().unsqueeze(-1) * x[:, t].float()).unsqueeze(-1) * b_t.unsqueeze(2)
        state = decay[..., None, None] * state + update
        ys.append((state * c_t.unsqueeze(2)).sum(-1))
    y = torch.stack(ys, dim=1) if ys else x.new_zeros(b, 0, h, p)
    return y.to(x.dtype), state


def ssd_chunked(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SSD by chunks (listing 1 of the Mamba-2 paper). Shapes as in `ssd_recurrence`; any L.

    Within a chunk: a masked, decayed product of C and B (one per group, shared by its heads). Between chunks: the state
    at the START of a chunk, decayed to each of its positions. Decays are float32; the products run in x's dtype. The
    largest intermediate is [B, L/Q, H, Q, Q]; on a CPU chunks of 32-64 are fastest for small models, on a GPU 64-128.
    """
    b, length, h, p = x.shape
    g, n = B.shape[2], B.shape[3]
    q = max(1, min(chunk_size, length))
    pad = -length % q
    if pad:  # dt = 0 makes padding inert: decay 1, update 0
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, pad))
    chunks, per_group, dtype = (length + pad) // q, h // g, x.dtype

    dts = dt.float().view(b, chunks, q, g, per_group).permute(0, 1, 3, 4, 2)  # [B, c, G, H/G, Q]
    logs = torch.cumsum(dts * A.float().view(g, per_group, 1), dim=-1)
    bs = B.view(b, chunks, q, g, n).permute(0, 1, 3, 2, 4)  # [B, c, G, Q, N]
    cs = C.view(b, chunks, q, g, n).permute(0, 1, 3, 2, 4)
    xs = x.view(b, chunks, q, g, per_group, p).permute(0, 1, 3, 4, 2, 5)  # [B, c, G, H/G, Q, P]

    causal = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    # masked before exp: above the diagonal the difference is positive and could overflow
    decay = (logs.unsqueeze(-1) - logs.unsqueeze(-2)).masked_fill(~causal, float("-inf")).exp()
    mixing = ((cs @ bs.transpose(-1, -2)).unsqueeze(3) * decay * dts.unsqueeze(-2)).to(dtype)
    y = mixing @ xs

    to_end = (logs[..., -1:] - logs).exp() * dts
    added = (xs * to_end.unsqueeze(-1).to(dtype)).transpose(-1, -2) @ bs.unsqueeze(3)  # [B, c, G, H/G, P, N]
    keep = logs[..., -1].exp()
    if initial_state is None:
        state = torch.zeros(b, g, per_group, p, n, dtype=torch.float32, device=x.device)
    else:
        state = initial_state.float().reshape(b, g, per_group, p, n)
    starts = []
    for i in range(chunks):
        starts.append(state)
        state = keep[:, i, ..., None, None] * state + added[:, i].float()
    at_start = torch.stack(starts, dim=1).to(dtype)
    y = y + (cs.unsqueeze(3) @ at_start.transpose(-1, -2)) * logs.exp().unsqueeze(-1).to(dtype)
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(b, chunks * q, h, p)[:, :length]
    return y, state.reshape(b, h, p, n)


# ------------------------------------------------------------------ Mamba-1


def selective_recurrence(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The naive twin of `selective_scan`.

    x and dt [B, L, I] (softplus done), A [I, N] (negative), B and C [B, L, N], initial_state [B, I, N].
    Returns y [B, L, I] and the state after the last token, float32.
    """
    state = x.new_zeros(x.shape[0], *A.shape, dtype=torch.float32) if initial_state is None else initial_state.float()
    ys = []
    for t in range(x.shape[1]):
        step = dt[:, t].float().unsqueeze(-1)  # [B, I, 1]
        update = step * x[:, t].float().unsqueeze(-1) * B[:, t].float().unsqueeze(1)
        state = torch.exp(step * A.float()) * state + update
        ys.append((state * C[:, t].float().unsqueeze(1)).sum(-1))
    y = torch.stack(ys, dim=1) if ys else torch.zeros_like(x)
    return y.to(x.dtype), state


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int = 16,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selective scan by chunks: within a chunk a doubling scan over (decay, update) pairs, between chunks a loop.

    Shapes as in `selective_recurrence`. Every factor is a product of decays (at most 1), so nothing overflows. One
    chunk's [B, Q, I, N] float32 pairs are in memory at a time (and kept for the backward pass).
    """
    length = x.shape[1]
    state = x.new_zeros(x.shape[0], *A.shape, dtype=torch.float32) if initial_state is None else initial_state.float()
    ys = []
    for at in range(0, length, max(1, chunk_size)):
        part = slice(at, min(length, at + max(1, chunk_size)))
        step = dt[:, part].float().unsqueeze(-1)
        decay = torch.exp(step * A.float())  # [B, Q, I, N]
        update = step * x[:, part].float().unsqueeze(-1) * B[:, part].float().unsqueeze(2)
        reach = 1
        while reach < decay.shape[1]:
            # pair t absorbs the pair `reach` before it: (a, u) after (a', u') is (a a', a u' + u)
            grown = update[:, reach:] + decay[:, reach:] * update[:, :-reach]
            update = torch.cat([update[:, :reach], grown], dim=1)
            decay = torch.cat([decay[:, :reach], decay[:, reach:] * decay[:, :-reach]], dim=1)
            reach *= 2
        states = update + decay * state.unsqueeze(1)
        ys.append((states * C[:, part].float().unsqueeze(2)).sum(-1))
        state = states[:, -1]
    y = torch.cat(ys, dim=1) if ys else torch.zeros_like(x)
    return y.to(x.dtype), state
