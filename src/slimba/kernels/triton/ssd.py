"""SSD of Mamba-2 with gradients, one program a head and sequence. Naive twin: `models/scan.py` (`ssd_recurrence`).

    y, starts = ssd_forward(xbc, dt_raw, dt_bias, A_log, D, shape)
    grads     = ssd_backward(dy, xbc, dt_raw, dt_bias, A_log, D, starts, shape)

    dt = softplus(dt_raw + dt_bias);  A = -exp(A_log)
    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T;  y_t = C_t S_t + D x_t

A program walks over the chunks of its sequence with the state [N, P] in registers, so nothing of size Q x Q and no
state but those at the chunk starts (for the gradient) goes through memory. Inside a chunk of Q tokens, with
s = cumsum(dt A) and E = exp(s):  y = (C B^T * exp(s_i - s_j) dt_j for i >= j) x + E C S_start.

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
    return tl.where(v > 20.0, v, tl.log(1.0 + tl.exp(tl.minimum(v, 20.0))))


@triton.jit
def _ssd_fwd_kernel(
    xbc, dt_raw, dt_bias, a_log, d, y, starts,
    length, n_chunks, heads, per_group, d_inner, gn,
    s_xb, s_xl, s_db, s_dl,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    seq, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = h // per_group
    q, p, n = tl.arange(0, Q), tl.arange(0, P), tl.arange(0, N)
    a = -tl.exp(tl.load(a_log + h).to(tl.float32))
    bias = tl.load(dt_bias + h).to(tl.float32)
    skip = tl.load(d + h).to(tl.float32)
    state = tl.zeros([N, P], tl.float32)
    for c in range(n_chunks):
        t = c * Q + q
        inside = t < length
        row = xbc + seq * s_xb + t[:, None] * s_xl
        x = tl.load(row + h * P + p[None, :], mask=inside[:, None], other=0.0)
        b_q = tl.load(row + d_inner + group * N + n[None, :], mask=inside[:, None], other=0.0)
        c_q = tl.load(row + d_inner + gn + group * N + n[None, :], mask=inside[:, None], other=0.0)
        raw = tl.load(dt_raw + seq * s_db + t * s_dl + h, mask=inside, other=0.0).to(tl.float32)
        dt = tl.where(inside, _softplus(raw + bias), 0.0)
        s = tl.cumsum(dt * a, 0)
        last = tl.sum(dt * a, 0)
        if KEEP:
            at = starts + ((seq * heads + h) * n_chunks + c) * N * P
            tl.store(at + n[:, None] * P + p[None, :], state.to(starts.dtype.element_ty))
        past = q[:, None] >= q[None, :]
        decay = tl.exp(tl.where(past, s[:, None] - s[None, :], float("-inf")))
        scores = tl.dot(c_q, tl.trans(b_q), input_precision=PRECISION)
        mixing = scores * decay * dt[None, :]
        out = tl.dot(mixing.to(x.dtype), x, input_precision=PRECISION)
        out += tl.dot(c_q, state.to(x.dtype), input_precision=PRECISION) * tl.exp(s)[:, None]
        out += skip * x.to(tl.float32)
        tl.store(y + (seq * length + t[:, None]) * d_inner + h * P + p[None, :], out.to(y.dtype.element_ty),
                 mask=inside[:, None])  # fmt: skip
        weight = tl.exp(last - s) * dt
        b_w = (b_q.to(tl.float32) * weight[:, None]).to(x.dtype)
        state = state * tl.exp(last) + tl.dot(tl.trans(b_w), x, input_precision=PRECISION)


@triton.jit
def _ssd_bwd_kernel(
    dy, xbc, dt_raw, dt_bias, a_log, d, starts, dx, db, dc, d_raw, d_bias, d_a, d_d,
    length, n_chunks, heads, per_group, d_inner, gn,
    s_xb, s_xl, s_db, s_dl, s_ob, s_ol, s_rb, s_rl,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    seq, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = h // per_group
    q, p, n = tl.arange(0, Q), tl.arange(0, P), tl.arange(0, N)
    a = -tl.exp(tl.load(a_log + h).to(tl.float32))
    bias = tl.load(dt_bias + h).to(tl.float32)
    skip = tl.load(d + h).to(tl.float32)
    d_state = tl.zeros([N, P], tl.float32)  # gradient of the state after the chunk
    sum_bias = 0.0
    sum_a = 0.0
    sum_d = 0.0
    for back in range(n_chunks):
        c = n_chunks - 1 - back
        t = c * Q + q
        inside = t < length
        row = xbc + seq * s_xb + t[:, None] * s_xl
        x = tl.load(row + h * P + p[None, :], mask=inside[:, None], other=0.0)
        b_q = tl.load(row + d_inner + group * N + n[None, :], mask=inside[:, None], other=0.0)
        c_q = tl.load(row + d_inner + gn + group * N + n[None, :], mask=inside[:, None], other=0.0)
        g = tl.load(dy + (seq * length + t[:, None]) * d_inner + h * P + p[None, :], mask=inside[:, None], other=0.0)
        raw = tl.load(dt_raw + seq * s_db + t * s_dl + h, mask=inside, other=0.0).to(tl.float32)
        dt = tl.where(inside, _softplus(raw + bias), 0.0)
        s = tl.cumsum(dt * a, 0)
        last = tl.sum(dt * a, 0)
        at = starts + ((seq * heads + h) * n_chunks + c) * N * P
        start = tl.load(at + n[:, None] * P + p[None, :])
        past = q[:, None] >= q[None, :]
        decay = tl.exp(tl.where(past, s[:, None] - s[None, :], float("-inf")))

        # inside the chunk: y += M x with M = (C B^T) decay dt_j
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
        from_start = tl.exp(s)
        d_c_off = tl.dot(g, tl.trans(start), input_precision=PRECISION) * from_start[:, None]
        d_s += tl.sum(d_c_off * c_q.to(tl.float32), 1)
        d_c += d_c_off

        # into the state at the end: S' = exp(last) S + sum_j w_j B_j x_j^T
        narrow = d_state.to(x.dtype)
        b_ds = tl.dot(b_q, narrow, input_precision=PRECISION)  # [Q, P]
        to_end = tl.exp(last - s)
        weight = to_end * dt
        d_weight = tl.sum(b_ds * x.to(tl.float32), 1)
        d_x += b_ds * weight[:, None]
        d_b += tl.dot(x, tl.trans(narrow), input_precision=PRECISION) * weight[:, None]
        d_dt += d_weight * to_end
        moved = d_weight * weight
        d_s -= moved
        whole = tl.exp(last)
        d_last = tl.sum(moved, 0) + whole * tl.sum(tl.sum(start.to(tl.float32) * d_state, 1), 0)
        c_e = (c_q.to(tl.float32) * from_start[:, None]).to(x.dtype)
        d_state = d_state * whole + tl.dot(tl.trans(c_e), g, input_precision=PRECISION)

        # s = cumsum(dt A): its gradient is summed from behind
        d_la = tl.sum(d_s, 0) - tl.cumsum(d_s, 0) + d_s + d_last
        d_dt += d_la * a
        sum_a += tl.sum(d_la * dt, 0)
        sum_d += tl.sum(tl.sum(g.to(tl.float32) * x.to(tl.float32), 1), 0)
        d_x += skip * g.to(tl.float32)
        slope = 1.0 / (1.0 + tl.exp(-(raw + bias)))
        d_pre = tl.where(inside, d_dt * slope, 0.0)
        sum_bias += tl.sum(d_pre, 0)
        tl.store(d_raw + seq * s_rb + t * s_rl + h, d_pre.to(d_raw.dtype.element_ty), mask=inside)
        out = dx + seq * s_ob + t[:, None] * s_ol + h * P + p[None, :]
        tl.store(out, d_x.to(dx.dtype.element_ty), mask=inside[:, None])
        by_head = ((seq * length + t[:, None]) * heads + h) * N + n[None, :]
        tl.store(db + by_head, d_b.to(db.dtype.element_ty), mask=inside[:, None])
        tl.store(dc + by_head, d_c.to(dc.dtype.element_ty), mask=inside[:, None])
    tl.store(d_bias + seq * heads + h, sum_bias)
    tl.store(d_a + seq * heads + h, sum_a * a)  # dA_log = dA * A
    tl.store(d_d + seq * heads + h, sum_d)


def _precision(x: torch.Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"  # of no meaning for 16-bit operands


def ssd_forward(
    xbc: torch.Tensor,
    dt_raw: torch.Tensor,
    dt_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    shape: Shape,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """xbc [B, L, channels] and dt_raw [B, L, H] (last dimension contiguous), dt_bias, A_log, D [H].

    Returns y [B, L, H * P] in xbc's dtype, and with `keep` the states at the chunk starts [B, H, c, N, P].
    """
    b, length, _ = xbc.shape
    chunks = -(-length // CHUNK)
    y = xbc.new_empty(b, length, shape.d_inner)
    starts = xbc.new_empty(b, shape.heads, chunks, shape.d_state, shape.headdim) if keep else None
    _ssd_fwd_kernel[(b, shape.heads)](
        xbc, dt_raw, dt_bias, A_log, D, y, starts if starts is not None else y,
        length, chunks, shape.heads, shape.heads // shape.groups, shape.d_inner, shape.groups * shape.d_state,
        xbc.stride(0), xbc.stride(1), dt_raw.stride(0), dt_raw.stride(1),
        P=shape.headdim, N=shape.d_state, Q=CHUNK, KEEP=keep, PRECISION=_precision(xbc), num_warps=4, num_stages=2,
    )  # fmt: skip
    return y, starts


def ssd_backward(
    dy: torch.Tensor,
    xbc: torch.Tensor,
    dt_raw: torch.Tensor,
    dt_bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    starts: torch.Tensor,
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
    chunks = starts.shape[2]
    db, dc = (xbc.new_empty(b, length, h, n) for _ in range(2))
    d_bias, d_a, d_d = (xbc.new_empty(b, h, dtype=torch.float32) for _ in range(3))
    _ssd_bwd_kernel[(b, h)](
        dy, xbc, dt_raw, dt_bias, A_log, D, starts, d_xbc, db, dc, d_raw, d_bias, d_a, d_d,
        length, chunks, h, h // g, shape.d_inner, g * n,
        xbc.stride(0), xbc.stride(1), dt_raw.stride(0), dt_raw.stride(1),
        d_xbc.stride(0), d_xbc.stride(1), d_raw.stride(0), d_raw.stride(1),
        P=shape.headdim, N=n, Q=CHUNK, PRECISION=_precision(xbc), num_warps=8, num_stages=1,
    )  # fmt: skip
    i = shape.d_inner
    for at, parts in ((i, db), (i + g * n, dc)):
        total = parts.view(b, length, g, h // g, n).sum(3, dtype=torch.float32)
        d_xbc[..., at : at + g * n].copy_(total.view(b, length, g * n))
    return d_bias.sum(0), d_a.sum(0), d_d.sum(0)
