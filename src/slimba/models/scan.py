"""The scans in plain PyTorch: naive recurrences and their parallel forms, all with gradients.

SSD (Mamba-2, arXiv 2405.21060) and selective scan (Mamba, arXiv 2312.00752):

    Mamba-2, per head:     S_t = exp(dt_t A) S_{t-1} + (dt_t x_t) B_t^T,   y_t = S_t C_t
    Mamba-1, per channel:  h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t,       y_t = <h_t, C_t>

The skip D x is the mixer's. Decays are float32 everywhere, states are float32; the matrix products of `ssd_chunked` run
in x's dtype (bfloat16 under autocast). No control flow depends on data, so everything can be compiled or captured.

Legend: B batch, L length, H heads, P headdim, N d_state, G groups, R = H / G heads of a group, I d_inner, K d_conv,
Q chunk, c chunks. Arguments called `B` and `C` are the paper's B and C. Tests: `pytest tests/models/test_scan.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from slimba.models.state import STATE_BLOCK, HeldTokens

__all__ = ["causal_conv1d", "selective_recurrence", "selective_scan", "ssd_chunked", "ssd_recurrence", "ssd_stored"]


def causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, window: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Depthwise causal convolution that can continue.

    x [B, L, channels], weight [channels, 1, K] (oldest tap first), bias [channels]; `window` [B, K-1, channels] holds
    the inputs before x, zeros when None. Returns y [B, L, channels] in x's dtype and the window after x, in the
    window's dtype. A sum of K shifted products in x's dtype: on a CPU twice as fast as conv1d, forward and backward.
    """
    taps, length = weight.shape[-1], x.shape[1]
    weight = weight.to(x.dtype)  # mixed dtypes would cast every shifted copy of x under autocast
    padded = F.pad(x, (0, 0, taps - 1, 0)) if window is None else torch.cat([window.to(x.dtype), x], dim=1)
    y = padded[:, :length] * weight[:, 0, 0]
    for k in range(1, taps):
        y = torch.addcmul(y, padded[:, k : k + length], weight[:, 0, k])
    if bias is not None:
        y = y + bias.to(x.dtype)
    after = padded[:, length:]
    return y, after if window is None else after.to(window.dtype)


# ------------------------------------------------------------------ Mamba-2


def ssd_recurrence(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token at a time: the naive twin of `ssd_chunked`, and the step of a mixer.

    x [B, L, H, P], dt [B, L, H] (softplus and clamp done), A [H] (negative), B and C [B, L, G, N], initial_state
    [B, H, P, N]. Returns y [B, L, H, P] in x's dtype and the float32 state after the last token.
    """
    b, length, h, p = x.shape
    per_group = h // B.shape[2]
    state = x.new_zeros(b, h, p, B.shape[3], dtype=torch.float32) if initial_state is None else initial_state.float()
    ys = []
    for t in range(length):
        b_t = B[:, t].float().repeat_interleave(per_group, dim=1)  # [B, H, N]
        c_t = C[:, t].float().repeat_interleave(per_group, dim=1)
        dt_t = dt[:, t].float()  # [B, H]
        decay = torch.exp(dt_t * A.float())
        update = (dt_t[..., None] * x[:, t].float())[..., None] * b_t[:, :, None]  # [B, H, P, N]
        state = decay[..., None, None] * state + update
        ys.append((state * c_t[:, :, None]).sum(-1))
    return torch.stack(ys, dim=1).to(x.dtype), state


def ssd_chunked(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SSD by chunks (section 6 of the Mamba-2 paper). Shapes and results as `ssd_recurrence`; any L >= 1.

    Inside a chunk y is a masked matrix product, Y_diag = (C B^T * decay) (dt x); from the chunks before it comes
    Y_off = decay * C S, where S is the state at the START of the chunk. C B^T is computed once per group.

    The largest intermediates are the masks [B, c, H, Q, Q] and the states [B, c, H, P, N], as large as each other at
    Q = sqrt(P N) (91 for P 64, N 128). `chunk_size` changes speed and memory, not the result: 32 to 64 is best for
    small models on a CPU, 64 to 128 on a GPU. A ragged last chunk is padded with dt = 0: no decay, nothing added.
    """
    b, length, h, p = x.shape
    g, n = B.shape[2], B.shape[3]
    r, q, dtype = h // g, min(chunk_size, length), x.dtype
    pad = -length % q
    c = (length + pad) // q
    dt = dt.float()
    x = x * dt[..., None].to(dtype)
    if pad:
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, pad))
    x = x.reshape(b, c, q, g, r * p)
    B = B.reshape(b, c, q, g, n).transpose(2, 3)  # [B, c, G, Q, N]
    C = C.reshape(b, c, q, g, n).transpose(2, 3)
    logs = (dt * A.float()).reshape(b, c, q, h).transpose(2, 3).cumsum(-1)  # [B, c, H, Q], never positive

    # From source (column) to target (row). Zeroed on the diagonal and above before exp: nothing positive is ever
    # exponentiated, and the diagonal, always 1, adds no cancelling gradients to logs. `scores` removes the future.
    mask = (logs[..., :, None] - logs[..., None, :]).tril(-1).exp().to(dtype)
    scores = (C @ B.transpose(-1, -2)).tril()  # [B, c, G, Q, Q]
    mixing = scores[:, :, :, None] * mask.reshape(b, c, g, r, q, q)
    y_diag = mixing @ x.reshape(b, c, q, g, r, p).permute(0, 1, 3, 4, 2, 5)  # [B, c, G, R, Q, P]

    # what each chunk adds to the state, decayed to the chunk's end; then the state at the start of each chunk
    to_end = (logs[..., -1:] - logs).exp().transpose(2, 3).to(dtype)  # [B, c, Q, H]
    weighted = (x.reshape(b, c, q, h, p) * to_end[..., None]).reshape(b, c, q, g, r * p)
    added = (weighted.permute(0, 1, 3, 4, 2) @ B).float().reshape(b, c, h, p, n)
    keep = logs[..., -1].exp()[..., None, None]  # [B, c, H, 1, 1]
    state = torch.zeros_like(added[:, 0]) if initial_state is None else initial_state.float()
    starts = []
    for i in range(c):
        starts.append(state)
        state = torch.addcmul(added[:, i], keep[:, i], state)
    start = torch.stack(starts, dim=1).to(dtype).reshape(b, c, g, r * p, n)
    y_off = (C @ start.transpose(-1, -2)).reshape(b, c, g, q, r, p)

    from_start = logs.exp().reshape(b, c, g, r, q).transpose(3, 4)[..., None].to(dtype)  # [B, c, G, Q, R, 1]
    y = torch.addcmul(y_diag.transpose(3, 4), y_off, from_start)  # [B, c, G, Q, R, P]
    return y.transpose(2, 3).reshape(b, c * q, h, p)[:, :length], state


def ssd_stored(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    stored: torch.Tensor,
    held: HeldTokens,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence on a state that is stored in fewer bits, every 16 tokens: docs/decisions.md, recurrent state.

    Shapes as `ssd_recurrence`; `stored` [B, H, P, N] float32 is the state at the last storing. Returns y and what is
    stored now; `held` is moved on in place. No gradients are wanted here.
    """
    per_group = x.shape[2] // B.shape[2]
    ys = []
    for first, last in _cut(held.u.shape[1], x.shape[1], STATE_BLOCK):
        new_dt, new_c = dt[:, first:last].float(), C[:, first:last].float()
        before = held.logs[:, -1:] if held.logs.shape[1] else torch.zeros_like(new_dt[:, :1])
        held.u = torch.cat([held.u, held.hold(new_dt[..., None] * x[:, first:last].float())], 1)
        held.b = torch.cat([held.b, held.hold(B[:, first:last].float())], 1)
        held.logs = torch.cat([held.logs, before + (new_dt * A.float()).cumsum(1)], 1)
        now = held.logs[:, -(last - first) :]  # [B, t, H]
        scores = torch.einsum("btgn,bign->btig", new_c, held.b).repeat_interleave(per_group, -1)
        future = torch.ones(scores.shape[1:3], dtype=torch.bool, device=x.device).triu(
            held.u.shape[1] - (last - first) + 1
        )
        weight = (now[:, :, None] - held.logs[:, None]).masked_fill(future[..., None], -torch.inf).exp() * scores
        c = new_c.repeat_interleave(per_group, 2)  # [B, t, H, N]
        old = torch.einsum("bhpn,bthn->bthp", stored, c) * now.exp()[..., None]
        ys.append(old + torch.einsum("btih,bihp->bthp", weight, held.u))
        if held.u.shape[1] == STATE_BLOCK:
            end = held.logs[:, -1]  # [B, H]
            gain = (end[:, None] - held.logs).exp()[..., None] * held.u
            b = held.b.repeat_interleave(per_group, 2)
            stored = held.store(end.exp()[..., None, None] * stored + torch.einsum("bihp,bihn->bhpn", gain, b))
            held.u, held.b, held.logs = held.u[:, :0], held.b[:, :0], held.logs[:, :0]
    return torch.cat(ys, 1).to(x.dtype), stored


def _cut(offset: int, length: int, step: int) -> Iterable[tuple[int, int]]:
    """Pieces of 0 .. length, cut where offset + position is a multiple of `step`."""
    return itertools.pairwise([0, *range(step - offset % step, length, step), length])


# ------------------------------------------------------------------ Mamba-1


def selective_recurrence(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token at a time: the naive twin of `selective_scan`, and the step of a mixer.

    x and dt [B, L, I] (softplus done), A [I, N] (negative), B and C [B, L, N], initial_state [B, I, N].
    Returns y [B, L, I] in x's dtype and the float32 state after the last token.
    """
    state = x.new_zeros(x.shape[0], *A.shape, dtype=torch.float32) if initial_state is None else initial_state.float()
    ys = []
    for t in range(x.shape[1]):
        dt_t = dt[:, t].float()[..., None]  # [B, I, 1]
        update = dt_t * x[:, t].float()[..., None] * B[:, t].float()[:, None]
        state = torch.exp(dt_t * A.float()) * state + update
        ys.append((state * C[:, t].float()[:, None]).sum(-1))
    return torch.stack(ys, dim=1).to(x.dtype), state


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int = 64,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selective scan by chunks of `chunk_size` tokens. Shapes and results as `selective_recurrence`; any L >= 1.

    Each token of each channel has N decays of its own, so there is no matrix form; a chunk is scanned in sqrt(Q)
    vectorised steps instead (`_scan_chunk`). Only one chunk's [B, Q, I, N] tensors exist at a time: for the gradient
    each chunk is computed again from its start state. 64 is right for a CPU, 256 for a GPU (fewer, larger kernels).
    """
    length = x.shape[1]
    x32, dt, A, B, C = x.float(), dt.float(), A.float(), B.float(), C.float()
    state = x32.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.float()
    ys = []
    for at in range(0, length, chunk_size):
        part = slice(at, min(length, at + chunk_size))
        inputs = (x32[:, part], dt[:, part], A, B[:, part], C[:, part], state)
        if torch.is_grad_enabled():
            y, state = checkpoint(_scan_chunk, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _scan_chunk(*inputs)
        ys.append(y)
    return torch.cat(ys, dim=1).to(x.dtype), state


def _scan_chunk(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk of `selective_scan` in two levels: q steps inside all m = L / q pieces at once, then m carries.

    Decays across a piece are exponentials of sums of dt A, never positive: nothing overflows, nothing is divided.
    """
    b, length, i = x.shape
    q = math.isqrt(length - 1) + 1
    pad = -length % q
    if pad:
        x, dt, B, C = (F.pad(t, (0, 0, 0, pad)) for t in (x, dt, B, C))
    m, n = (length + pad) // q, A.shape[1]
    dt_pieces = dt.reshape(b, m, q, i, 1)
    decay = torch.exp(dt_pieces * A)  # [B, m, q, I, N]
    update = ((dt * x)[..., None] * B[:, :, None]).reshape(b, m, q, i, n)

    local = [update[:, :, 0]]  # states as if every piece started from zero
    for t in range(1, q):
        local.append(torch.addcmul(update[:, :, t], decay[:, :, t], local[-1]))
    from_start = torch.exp(dt_pieces.cumsum(2) * A)
    starts = []
    for k in range(m):
        starts.append(state)
        state = torch.addcmul(local[-1][:, k], from_start[:, k, -1], state)
    states = torch.addcmul(torch.stack(local, dim=2), from_start, torch.stack(starts, dim=1)[:, :, None])
    y = states.reshape(b, m * q, i, n) @ C[..., None]  # [B, L, I, 1]
    return y[:, :length, :, 0], state
