"""SSD of Mamba-2 with gradients, all chunks at once. Naive twin: `models/scan.py` (`ssd_recurrence`).

    y, starts = ssd_forward(xbc, dt_raw, dt_bias, A_log, D, shape)
    grads     = ssd_backward(dy, xbc, dt_raw, dt_bias, A_log, D, starts, shape, d_xbc, d_raw)

    dt = softplus(dt_raw + dt_bias);  A = -exp(A_log)
    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T;  y_t = C_t S_t + D x_t

Forward, with s = cumsum(dt A) in a chunk of Q tokens and E = exp(s): what every chunk adds to the state; the states at
the chunk starts, by a scan over chunks; then y = (C B^T * exp(s_i - s_j) dt_j for i >= j) x + E C S_start. Backward the
same in reverse: what every chunk's outputs ask of the state before it, a scan from the last chunk, then the rest.
Scans are elementwise over [N, P]; nothing of size Q x Q goes through memory.

Products run in x's dtype with float32 sums; decays and states are float32. N, P and Q are powers of two, at least 16.
Legend: B batch, L length, H heads, P headdim, N d_state, G groups, Q chunk, c chunks.
Tests: `pytest tests/kernels/test_triton.py` (by Triton's interpreter, on a CPU).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import triton
import triton.language as tl

__all__ = ["Shape", "ssd_backward", "ssd_forward"]

CHUNK = 64
SCAN_TILE = 512  # numbers of a state that one program of a scan takes


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one call; `xbc` holds x [H * P], B [G * N] and C [G * N] of a token side by side."""

    heads: int
    headdim: int
    groups: int
    d_state: int

    @property
    def d_inner(self) -> int:
        return self.heads * self.headdim

    @property
    def channels(self) -> int:
        return self.d_inner + 2 * self.groups * self.d_state


@triton.jit
def _softplus(v):
    e = tl.exp(tl.minimum(v, 20.0))
    return tl.where(v > 20.0, v, tl.where(e < 0.01, e * (1.0 - e * (0.5 - e * 0.33333333)), tl.log(1.0 + e)))


@triton.jit
def _decays(dt_raw, dt_bias, a_log, seq, h, t, length, s_db, s_dl):
    """A of the head; of the chunk's tokens the raw step with its bias, dt and s = cumsum(dt A); s at the end."""
    a = -tl.exp(tl.load(a_log + h).to(tl.float32))
    inside = t < length
    raw = tl.load(dt_raw + seq * s_db + t * s_dl + h, mask=inside, other=0.0).to(tl.float32)
    raw += tl.load(dt_bias + h).to(tl.float32)
    dt = tl.where(inside, _softplus(raw), 0.0)
    return a, raw, dt, tl.cumsum(dt * a, 0), tl.sum(dt * a, 0)


@triton.jit
def _rows(base, first, t, width, length, s_b, s_l, seq):
    """[tokens, width] from column `first` of a [B, L, ...] tensor; zeros beyond the sequence."""
    at = base + seq * s_b + t[:, None] * s_l + first + width[None, :]
    return tl.load(at, mask=(t < length)[:, None], other=0.0)


@triton.jit
def _added_kernel(
    xbc, dt_raw, dt_bias, a_log, added, decay,
    length, n_chunks, heads, per_group, d_inner, s_xb, s_xl, s_db, s_dl,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the state, sum_j exp(s_end - s_j) dt_j B_j x_j^T, and by what it multiplies it."""
    c, h, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, p, t = tl.arange(0, N), tl.arange(0, P), c * Q + tl.arange(0, Q)
    _a, _raw, dt, s, last = _decays(dt_raw, dt_bias, a_log, seq, h, t, length, s_db, s_dl)
    x = _rows(xbc, h * P, t, p, length, s_xb, s_xl, seq)
    b = _rows(xbc, d_inner + (h // per_group) * N, t, n, length, s_xb, s_xl, seq)
    b_w = (b.to(tl.float32) * (tl.exp(last - s) * dt)[:, None]).to(x.dtype)
    at = (seq * heads + h) * n_chunks + c
    out = tl.dot(tl.trans(b_w), x, input_precision=PRECISION)
    tl.store(added + at * N * P + n[:, None] * P + p[None, :], out)
    tl.store(decay + at, tl.exp(last))


@triton.jit
def _asked_kernel(
    dy, xbc, dt_raw, dt_bias, a_log, asked,
    length, n_chunks, heads, per_group, d_inner, gn, s_xb, s_xl, s_db, s_dl,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient that each chunk's own outputs give the state before it: sum_i exp(s_i) C_i dy_i^T."""
    c, h, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, p, t = tl.arange(0, N), tl.arange(0, P), c * Q + tl.arange(0, Q)
    _a, _raw, _dt, s, _last = _decays(dt_raw, dt_bias, a_log, seq, h, t, length, s_db, s_dl)
    g = _rows(dy, h * P, t, p, length, length * d_inner, d_inner, seq)
    cc = _rows(xbc, d_inner + gn + (h // per_group) * N, t, n, length, s_xb, s_xl, seq)
    c_e = (cc.to(tl.float32) * tl.exp(s)[:, None]).to(g.dtype)
    at = (seq * heads + h) * n_chunks + c
    out = tl.dot(tl.trans(c_e), g, input_precision=PRECISION)
    tl.store(asked + at * N * P + n[:, None] * P + p[None, :], out)


@triton.jit
def _scan_kernel(parts, decay, out, n_chunks, SIZE: tl.constexpr, TILE: tl.constexpr, REVERSE: tl.constexpr):
    """The state before each chunk, or in reverse the gradient of the state after it; parts and out [B * H, c, SIZE]."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    state = tl.zeros([TILE], tl.float32)
    for k in range(n_chunks):
        c = n_chunks - 1 - k if REVERSE else k
        at = row * n_chunks + c
        tl.store(out + at * SIZE + i, state.to(out.dtype.element_ty), mask=i < SIZE)
        part = tl.load(parts + at * SIZE + i, mask=i < SIZE, other=0.0)
        state = state * tl.load(decay + at) + part


@triton.jit
def _output_kernel(
    xbc, dt_raw, dt_bias, a_log, d, starts, y,
    length, n_chunks, heads, per_group, d_inner, gn, s_xb, s_xl, s_db, s_dl,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    c, h, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, p, q = tl.arange(0, N), tl.arange(0, P), tl.arange(0, Q)
    t = c * Q + q
    _a, _raw, dt, s, _last = _decays(dt_raw, dt_bias, a_log, seq, h, t, length, s_db, s_dl)
    x = _rows(xbc, h * P, t, p, length, s_xb, s_xl, seq)
    b = _rows(xbc, d_inner + (h // per_group) * N, t, n, length, s_xb, s_xl, seq)
    cc = _rows(xbc, d_inner + gn + (h // per_group) * N, t, n, length, s_xb, s_xl, seq)
    past = q[:, None] >= q[None, :]
    decay = tl.exp(tl.where(past, s[:, None] - s[None, :], float("-inf")))
    mixing = tl.dot(cc, tl.trans(b), input_precision=PRECISION) * decay * dt[None, :]
    out = tl.dot(mixing.to(x.dtype), x, input_precision=PRECISION)
    at = starts + ((seq * heads + h) * n_chunks + c) * N * P
    start = tl.load(at + n[:, None] * P + p[None, :])
    out += tl.dot(cc, start.to(x.dtype), input_precision=PRECISION) * tl.exp(s)[:, None]
    out += tl.load(d + h).to(tl.float32) * x.to(tl.float32)
    target = y + (seq * length + t[:, None]) * d_inner + h * P + p[None, :]
    tl.store(target, out.to(y.dtype.element_ty), mask=(t < length)[:, None])


@triton.jit
def _gradient_kernel(
    dy, xbc, dt_raw, dt_bias, a_log, d, starts, afters, dx, db, dc, d_raw, sums,
    length, n_chunks, heads, per_group, d_inner, gn,
    s_xb, s_xl, s_db, s_dl, s_ob, s_ol, s_rb, s_rl,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    c, h, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, p, q = tl.arange(0, N), tl.arange(0, P), tl.arange(0, Q)
    t = c * Q + q
    inside = t < length
    a, raw, dt, s, last = _decays(dt_raw, dt_bias, a_log, seq, h, t, length, s_db, s_dl)
    x = _rows(xbc, h * P, t, p, length, s_xb, s_xl, seq)
    b_q = _rows(xbc, d_inner + (h // per_group) * N, t, n, length, s_xb, s_xl, seq)
    c_q = _rows(xbc, d_inner + gn + (h // per_group) * N, t, n, length, s_xb, s_xl, seq)
    g = _rows(dy, h * P, t, p, length, length * d_inner, d_inner, seq)
    at = (seq * heads + h) * n_chunks + c
    start = tl.load(starts + at * N * P + n[:, None] * P + p[None, :])
    after = tl.load(afters + at * N * P + n[:, None] * P + p[None, :])

    # inside the chunk: y += M x with M = (C B^T) decay dt_j
    past = q[:, None] >= q[None, :]
    decay = tl.exp(tl.where(past, s[:, None] - s[None, :], float("-inf")))
    scores = tl.dot(c_q, tl.trans(b_q), input_precision=PRECISION) * decay
    d_m = tl.dot(g, tl.trans(x), input_precision=PRECISION)
    through = d_m * scores  # dM * M / dt_j
    d_dt = tl.sum(through, 0)
    paired = through * dt[None, :]
    d_s = tl.sum(paired, 1) - tl.sum(paired, 0)
    d_x = tl.dot(tl.trans((scores * dt[None, :]).to(x.dtype)), g, input_precision=PRECISION)
    d_scores = (d_m * decay * dt[None, :]).to(x.dtype)
    d_c = tl.dot(d_scores, b_q, input_precision=PRECISION)
    d_b = tl.dot(tl.trans(d_scores), c_q, input_precision=PRECISION)

    # from the state at the start: y += exp(s) C S
    d_c_off = tl.dot(g, tl.trans(start).to(x.dtype), input_precision=PRECISION) * tl.exp(s)[:, None]
    d_s += tl.sum(d_c_off * c_q.to(tl.float32), 1)
    d_c += d_c_off

    # into the state at the end: S' = exp(last) S + sum_j w_j B_j x_j^T
    narrow = after.to(x.dtype)
    b_ds = tl.dot(b_q, narrow, input_precision=PRECISION)  # [Q, P]
    to_end = tl.exp(last - s)
    weight = to_end * dt
    d_weight = tl.sum(b_ds * x.to(tl.float32), 1)
    d_x += b_ds * weight[:, None]
    d_b += tl.dot(x, tl.trans(narrow), input_precision=PRECISION) * weight[:, None]
    d_dt += d_weight * to_end
    moved = d_weight * weight
    d_s -= moved
    kept = tl.sum(tl.sum(start.to(tl.float32) * after.to(tl.float32), 1), 0)
    d_last = tl.sum(moved, 0) + tl.exp(last) * kept

    # s = cumsum(dt A): its gradient is summed from behind
    d_la = tl.sum(d_s, 0) - tl.cumsum(d_s, 0) + d_s + d_last
    d_dt += d_la * a
    d_pre = tl.where(inside, d_dt / (1.0 + tl.exp(-raw)), 0.0)
    tl.store(sums + at * 3, tl.sum(d_pre, 0))
    tl.store(sums + at * 3 + 1, tl.sum(d_la * dt, 0) * a)  # dA_log = dA * A
    tl.store(sums + at * 3 + 2, tl.sum(tl.sum(g.to(tl.float32) * x.to(tl.float32), 1), 0))
    d_x += tl.load(d + h).to(tl.float32) * g.to(tl.float32)
    tl.store(d_raw + seq * s_rb + t * s_rl + h, d_pre.to(d_raw.dtype.element_ty), mask=inside)
    out = dx + seq * s_ob + t[:, None] * s_ol + h * P + p[None, :]
    tl.store(out, d_x.to(dx.dtype.element_ty), mask=inside[:, None])
    by_head = ((seq * length + t[:, None]) * heads + h) * N + n[None, :]
    tl.store(db + by_head, d_b.to(db.dtype.element_ty), mask=inside[:, None])
    tl.store(dc + by_head, d_c.to(dc.dtype.element_ty), mask=inside[:, None])


def _sizes(xbc: torch.Tensor, shape: Shape) -> dict[str, int | str]:
    precision = "ieee" if xbc.dtype == torch.float32 else "tf32"  # of no meaning for 16-bit operands
    return {"P": shape.headdim, "N": shape.d_state, "Q": CHUNK, "PRECISION": precision}


def _scan(parts: torch.Tensor, decay: torch.Tensor, dtype: torch.dtype, reverse: bool) -> torch.Tensor:
    """parts [B, H, c, N, P] and decay [B, H, c] float32 -> the states between the chunks [B, H, c, N, P]."""
    b, h, chunks, n, p = parts.shape
    out = torch.empty_like(parts, dtype=dtype)
    tile = min(SCAN_TILE, n * p)
    _scan_kernel[(b * h, triton.cdiv(n * p, tile))](
        parts, decay, out, chunks, SIZE=n * p, TILE=tile, REVERSE=reverse, num_warps=4
    )
    return out


def ssd_forward(
    xbc: torch.Tensor,
    dt_raw: torch.Tensor,
    dt_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    shape: Shape,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """xbc [B, L, channels] and dt_raw [B, L, H] (last dimension contiguous), dt_bias, A_log, D [H].

    Returns y [B, L, H * P] in xbc's dtype, and for the gradient the states at the chunk starts [B, H, c, N, P] with the
    chunks' decays [B, H, c].
    """
    b, length, _ = xbc.shape
    h, g, chunks = shape.heads, shape.groups, -(-length // CHUNK)
    strides = (xbc.stride(0), xbc.stride(1), dt_raw.stride(0), dt_raw.stride(1))
    added = xbc.new_empty(b, h, chunks, shape.d_state, shape.headdim, dtype=torch.float32)
    decay = xbc.new_empty(b, h, chunks, dtype=torch.float32)
    _added_kernel[(chunks, h, b)](
        xbc, dt_raw, dt_bias, A_log, added, decay, length, chunks, h, h // g, shape.d_inner, *strides,
        **_sizes(xbc, shape), num_warps=4,
    )  # fmt: skip
    starts = _scan(added, decay, xbc.dtype, reverse=False)
    y = xbc.new_empty(b, length, shape.d_inner)
    _output_kernel[(chunks, h, b)](
        xbc, dt_raw, dt_bias, A_log, D, starts, y,
        length, chunks, h, h // g, shape.d_inner, g * shape.d_state, *strides, **_sizes(xbc, shape), num_warps=4,
    )  # fmt: skip
    return y, (starts, decay)


def ssd_backward(
    dy: torch.Tensor,
    xbc: torch.Tensor,
    dt_raw: torch.Tensor,
    dt_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor],
    shape: Shape,
    d_xbc: torch.Tensor,
    d_raw: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Writes the gradients of xbc and dt_raw into d_xbc and d_raw (views welcome, last dimension contiguous).

    Returns those of dt_bias, A_log and D, float32 [H]. B and C are shared by the heads of a group: each head writes its
    part and the parts are summed afterwards, in a fixed order, so that a resumed run repeats bit for bit.
    """
    b, length, _ = xbc.shape
    h, n, g = shape.heads, shape.d_state, shape.groups
    starts, decay = states
    chunks = starts.shape[2]
    sizes = (length, chunks, h, h // g, shape.d_inner, g * n)
    strides = (xbc.stride(0), xbc.stride(1), dt_raw.stride(0), dt_raw.stride(1))
    asked = torch.empty_like(starts, dtype=torch.float32)
    _asked_kernel[(chunks, h, b)](
        dy, xbc, dt_raw, dt_bias, A_log, asked, *sizes, *strides, **_sizes(xbc, shape), num_warps=4
    )
    afters = _scan(asked, decay, xbc.dtype, reverse=True)
    db, dc = (xbc.new_empty(b, length, h, n) for _ in range(2))
    sums = xbc.new_empty(b, h, chunks, 3, dtype=torch.float32)
    _gradient_kernel[(chunks, h, b)](
        dy, xbc, dt_raw, dt_bias, A_log, D, starts, afters, d_xbc, db, dc, d_raw, sums, *sizes, *strides,
        d_xbc.stride(0), d_xbc.stride(1), d_raw.stride(0), d_raw.stride(1), **_sizes(xbc, shape), num_warps=8,
    )  # fmt: skip
    i = shape.d_inner
    for at, parts in ((i, db), (i + g * n, dc)):
        total = parts.view(b, length, g, h // g, n).sum(3, dtype=torch.float32)
        d_xbc[..., at : at + g * n].copy_(total.view(b, length, g * n))
    d_bias, d_a, d_d = sums.sum((0, 2)).unbind(1)
    return d_bias, d_a, d_d
