"""Selective scan of Mamba-1 with gradients, all chunks at once. Naive twin: `models/scan.py` (`selective_recurrence`).

    out, kept = scan_forward(x, raw, dt_bias, A_log, B, C, D, z)
    grads     = scan_backward(d_out, x, A_log, B, C, D, z, kept, d_z)

    dt = softplus(raw + dt_bias);  A = -exp(A_log)
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t;  y_t = <h_t, C_t> + D x_t;  out_t = y_t silu(z_t)

Every channel has N decays of its own at every token, so there is no matrix form as in `ssd.py`. A program takes a chunk
of Q tokens of some channels and walks through it with their states in registers. Forward: every chunk from an empty
state, for the state at its end; the states at the chunk starts, by a scan over chunks; every chunk again from its
start, for the outputs. Only those starts are kept. Backward: the states before every token once more, into memory that
is free afterwards; from behind what every chunk's outputs ask of the state before it; the scan over chunks; the rest.

States, decays and sums are float32; what is read and written per token has x's dtype. Any L, I and N.
Legend: B batch, L length, I d_inner, N d_state, Q chunk, c chunks. In the kernels N and W are the sizes of a program's
tile of states and channels. Tests: `pytest tests/kernels/test_triton_selective.py` (by Triton's interpreter, on a CPU).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import triton
import triton.language as tl
from slimba.kernels.triton.ssd import _softplus

__all__ = ["Kept", "scan_backward", "scan_forward"]

CHUNK = 64
TILE = 512  # numbers of a state that a program holds: 16 in each thread of its one warp
TOKENS, CHANNELS = 32, 64  # of one program of the gate's gradient


@triton.jit
def _state_tile(first, channels, n_state, N: tl.constexpr, W: tl.constexpr):
    """Numbers of the tile's states n [N, 1] and channels i [1, W], and which of them there are [N, W]."""
    n = tl.arange(0, N)[:, None]
    i = first + tl.arange(0, W)[None, :]
    return n, i, (n < n_state) & (i < channels)


@triton.jit
def _decay_rates(a_log, n, i, ok, n_state):
    """A [N, W], negative; 0 where there is no such state."""
    return tl.where(ok, -tl.exp(tl.load(a_log + i * n_state + n, mask=ok, other=0.0).to(tl.float32)), 0.0)


@triton.jit
def _ends_kernel(
    x, raw, bias, a_log, b, dt, ends, totals, length, n_chunks, channels, n_state, s_bb, s_bl,
    Q: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Each chunk from an empty state: the state at its end and the sum of its dt; dt itself for the other kernels."""
    chunk, seq = tl.program_id(0), tl.program_id(2).to(tl.int64)
    n, i, ok = _state_tile(tl.program_id(1) * W, channels, n_state, N, W)
    here = i < channels
    a = _decay_rates(a_log, n, i, ok, n_state)
    shift = tl.load(bias + i, mask=here, other=0.0).to(tl.float32)
    h = tl.zeros([N, W], tl.float32)
    total = tl.zeros([1, W], tl.float32)
    for t in range(chunk * Q, tl.minimum(chunk * Q + Q, length)):
        at = (seq * length + t) * channels + i
        step = _softplus(tl.load(raw + at, mask=here, other=0.0).to(tl.float32) + shift)
        tl.store(dt + at, step, mask=here)
        u = step * tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        h = tl.exp(step * a) * h + u * tl.load(b + seq * s_bb + t * s_bl + n, mask=n < n_state, other=0.0)
        total += step
    at = seq * n_chunks + chunk
    tl.store(ends + (at * n_state + n) * channels + i, h, mask=ok)
    tl.store(totals + at * channels + i, total, mask=here)


@triton.jit
def _chunks_kernel(
    parts, totals, a_log, out, n_chunks, channels, n_state, TILE: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """The state before each chunk; in reverse the gradient of the state after it. parts and out [B, c, N, I]."""
    seq = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * TILE + tl.arange(0, TILE)
    size = channels * n_state
    ok = e < size
    i = e % channels
    a = -tl.exp(tl.load(a_log + i * n_state + e // channels, mask=ok, other=0.0).to(tl.float32))
    state = tl.zeros([TILE], tl.float32)
    for k in range(n_chunks):
        at = seq * n_chunks + (n_chunks - 1 - k if REVERSE else k)
        tl.store(out + at * size + e, state, mask=ok)
        total = tl.load(totals + at * channels + i, mask=ok, other=0.0)
        state = tl.load(parts + at * size + e, mask=ok, other=0.0) + tl.exp(a * total) * state


@triton.jit
def _output_kernel(
    x, dt, a_log, b, c, d, z, starts, y, out, before,
    length, n_chunks, channels, n_state, s_bb, s_bl, s_cb, s_cl, s_zb, s_zl,
    STATES: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Each chunk from its start: y and the gated output, or with STATES the state before each token [B, L, N, I]."""
    chunk, seq = tl.program_id(0), tl.program_id(2).to(tl.int64)
    n, i, ok = _state_tile(tl.program_id(1) * W, channels, n_state, N, W)
    here = i < channels
    a = _decay_rates(a_log, n, i, ok, n_state)
    skip = tl.load(d + i, mask=here, other=0.0).to(tl.float32)
    h = tl.load(starts + ((seq * n_chunks + chunk) * n_state + n) * channels + i, mask=ok, other=0.0)
    for t in range(chunk * Q, tl.minimum(chunk * Q + Q, length)):
        at = (seq * length + t) * channels + i
        step = tl.load(dt + at, mask=here, other=0.0)
        xt = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        if STATES:
            tl.store(before + ((seq * length + t) * n_state + n) * channels + i, h.to(before.dtype.element_ty), mask=ok)
        h = tl.exp(step * a) * h + step * xt * tl.load(b + seq * s_bb + t * s_bl + n, mask=n < n_state, other=0.0)
        if not STATES:
            c_t = tl.load(c + seq * s_cb + t * s_cl + n, mask=n < n_state, other=0.0)
            value = tl.sum(h * c_t, 0)[None, :] + skip * xt
            gate = tl.load(z + seq * s_zb + t * s_zl + i, mask=here, other=0.0).to(tl.float32)
            tl.store(y + at, value.to(y.dtype.element_ty), mask=here)
            tl.store(out + at, (value * gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty), mask=here)


@triton.jit
def _gate_gradient_kernel(
    d_out, y, z, dy, d_z, length, channels, s_zb, s_zl, s_gb, s_gl, T: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    seq = tl.program_id(0).to(tl.int64)
    t = (tl.program_id(1) * T + tl.arange(0, T))[:, None]
    i = (tl.program_id(2) * C + tl.arange(0, C))[None, :]
    ok = (t < length) & (i < channels)
    at = (seq * length + t) * channels + i
    g = tl.load(d_out + at, mask=ok, other=0.0).to(tl.float32)
    gate = tl.load(z + seq * s_zb + t * s_zl + i, mask=ok, other=0.0).to(tl.float32)
    sig = 1.0 / (1.0 + tl.exp(-gate))
    tl.store(dy + at, (g * gate * sig).to(dy.dtype.element_ty), mask=ok)
    value = tl.load(y + at, mask=ok, other=0.0).to(tl.float32)
    d_gate = g * value * sig * (1.0 + gate * (1.0 - sig))
    tl.store(d_z + seq * s_gb + t * s_gl + i, d_gate.to(d_z.dtype.element_ty), mask=ok)


@triton.jit
def _asked_kernel(
    dy, dt, a_log, c, asked, length, n_chunks, channels, n_state, s_cb, s_cl,
    Q: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The gradient that each chunk's own outputs give the state before it."""
    chunk, seq = tl.program_id(0), tl.program_id(2).to(tl.int64)
    n, i, ok = _state_tile(tl.program_id(1) * W, channels, n_state, N, W)
    here = i < channels
    a = _decay_rates(a_log, n, i, ok, n_state)
    r = tl.zeros([N, W], tl.float32)
    count = tl.minimum(Q, length - chunk * Q)
    for k in range(count):
        t = chunk * Q + count - 1 - k
        at = (seq * length + t) * channels + i
        g = tl.load(dy + at, mask=here, other=0.0).to(tl.float32)
        r += g * tl.load(c + seq * s_cb + t * s_cl + n, mask=n < n_state, other=0.0)
        r *= tl.exp(tl.load(dt + at, mask=here, other=0.0) * a)
    tl.store(asked + ((seq * n_chunks + chunk) * n_state + n) * channels + i, r, mask=ok)


@triton.jit
def _gradient_kernel(
    dy, x, dt, a_log, b, c, d, before, afters, dx, d_raw, parts_b, parts_c, parts_a, sums,
    length, n_chunks, channels, n_state, s_bb, s_bl, s_cb, s_cl,
    Q: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Each chunk from behind; g is the gradient of h_t, r that of h_t through the tokens after t."""
    chunk, block, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, i, ok = _state_tile(block * W, channels, n_state, N, W)
    here = i < channels
    a = _decay_rates(a_log, n, i, ok, n_state)
    skip = tl.load(d + i, mask=here, other=0.0).to(tl.float32)
    place = ((seq * n_chunks + chunk) * n_state + n) * channels + i
    r = tl.load(afters + place, mask=ok, other=0.0)
    d_a = tl.zeros([N, W], tl.float32)
    d_bias = tl.zeros([1, W], tl.float32)
    d_skip = tl.zeros([1, W], tl.float32)
    count = tl.minimum(Q, length - chunk * Q)
    for k in range(count):
        t = chunk * Q + count - 1 - k
        at = (seq * length + t) * channels + i
        old = tl.load(before + ((seq * length + t) * n_state + n) * channels + i, mask=ok, other=0.0).to(tl.float32)
        step = tl.load(dt + at, mask=here, other=0.0)
        xt = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        dyt = tl.load(dy + at, mask=here, other=0.0).to(tl.float32)
        b_t = tl.load(b + seq * s_bb + t * s_bl + n, mask=n < n_state, other=0.0).to(tl.float32)
        c_t = tl.load(c + seq * s_cb + t * s_cl + n, mask=n < n_state, other=0.0).to(tl.float32)
        decay = tl.exp(step * a)
        old *= decay
        u = step * xt
        g = r + c_t * dyt
        row = ((block * tl.num_programs(2) + seq) * length + t) * n_state + n
        tl.store(parts_c + row, tl.sum((old + u * b_t) * dyt, 1)[:, None], mask=n < n_state)
        tl.store(parts_b + row, tl.sum(g * u, 1)[:, None], mask=n < n_state)
        d_u = tl.sum(g * b_t, 0)[None, :]
        moved = g * old  # the gradient of the exponent dt A
        d_a += moved * step
        d_pre = (xt * d_u + tl.sum(moved * a, 0)[None, :]) * (1.0 - tl.exp(-step))  # softplus' = 1 - exp(-softplus)
        tl.store(dx + at, (step * d_u + skip * dyt).to(dx.dtype.element_ty), mask=here)
        tl.store(d_raw + at, d_pre.to(d_raw.dtype.element_ty), mask=here)
        d_bias += d_pre
        d_skip += xt * dyt
        r = decay * g
    tl.store(parts_a + place, d_a * a, mask=ok)  # dA_log = dA * A
    at = (seq * n_chunks + chunk) * 2 * channels + i
    tl.store(sums + at, d_bias, mask=here)
    tl.store(sums + at + channels, d_skip, mask=here)


@dataclass(frozen=True, slots=True)
class Kept:
    """What the gradient needs of the forward pass: dt float32 and y [B, L, I], states at the chunk starts [B, c, N, I]
    and the sums of dt over the chunks [B, c, I], float32."""

    dt: torch.Tensor
    y: torch.Tensor
    starts: torch.Tensor
    totals: torch.Tensor


def _tile(channels: int, n_state: int) -> dict[str, int]:
    n = triton.next_power_of_2(n_state)
    return {"Q": CHUNK, "N": n, "W": min(max(8, TILE // n), triton.next_power_of_2(channels)), "num_warps": 1}


def _scan(parts: torch.Tensor, totals: torch.Tensor, A_log: torch.Tensor, reverse: bool) -> torch.Tensor:
    """parts [B, c, N, I], totals [B, c, I] -> the states between the chunks, as parts."""
    batch, chunks, n_state, channels = parts.shape
    out = torch.empty_like(parts)
    grid = (batch, triton.cdiv(n_state * channels, 256))
    _chunks_kernel[grid](parts, totals, A_log, out, chunks, channels, n_state, TILE=256, REVERSE=reverse, num_warps=2)
    return out


def scan_forward(
    x: torch.Tensor,
    raw: torch.Tensor,
    dt_bias: torch.Tensor,
    A_log: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
) -> tuple[torch.Tensor, Kept]:
    """x and raw [B, L, I] contiguous; B, C [B, L, N] and z [B, L, I] with a contiguous last dimension (views welcome).

    dt_bias and D [I], A_log [I, N] contiguous. Returns the gated output [B, L, I] in x's dtype, from an empty state.
    """
    batch, length, channels = x.shape
    n_state, chunks = B.shape[-1], triton.cdiv(length, CHUNK)
    tile, sizes = _tile(channels, n_state), (length, chunks, channels, n_state)
    grid = (chunks, triton.cdiv(channels, tile["W"]), batch)
    dt = x.new_empty(x.shape, dtype=torch.float32)
    ends = x.new_empty(batch, chunks, n_state, channels, dtype=torch.float32)
    totals = x.new_empty(batch, chunks, channels, dtype=torch.float32)
    _ends_kernel[grid](x, raw, dt_bias, A_log, B, dt, ends, totals, *sizes, B.stride(0), B.stride(1), **tile)
    starts = _scan(ends, totals, A_log, reverse=False)
    y, out = torch.empty_like(x), torch.empty_like(x)
    _output_kernel[grid](
        x, dt, A_log, B, C, D, z, starts, y, out, y, *sizes, *_strides(B, C, z), STATES=False, **tile
    )  # fmt: skip
    return out, Kept(dt, y, starts, totals)


def scan_backward(
    d_out: torch.Tensor,
    x: torch.Tensor,
    A_log: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    kept: Kept,
    d_z: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Writes the gradient of z into d_z (a view is welcome).

    Returns those of x, raw (x's dtype), dt_bias, A_log, B, C, D (float32). Sums over channels and chunks are of parts
    that each program writes, in a fixed order, so that a resumed run repeats bit for bit.
    """
    batch, length, channels = x.shape
    n_state, chunks = B.shape[-1], kept.starts.shape[1]
    tile, sizes = _tile(channels, n_state), (length, chunks, channels, n_state)
    blocks = triton.cdiv(channels, tile["W"])
    grid = (chunks, blocks, batch)
    dy = torch.empty_like(x)
    _gate_gradient_kernel[(batch, triton.cdiv(length, TOKENS), triton.cdiv(channels, CHANNELS))](
        d_out, kept.y, z, dy, d_z, length, channels, *_strides(z, d_z), T=TOKENS, C=CHANNELS, num_warps=4
    )
    before = x.new_empty(batch, length, n_state, channels)
    _output_kernel[grid](
        x, kept.dt, A_log, B, C, D, z, kept.starts, dy, dy, before, *sizes, *_strides(B, C, z), STATES=True, **tile
    )  # fmt: skip
    asked = torch.empty_like(kept.starts)
    _asked_kernel[grid](dy, kept.dt, A_log, C, asked, *sizes, *_strides(C), **tile)
    afters = _scan(asked, kept.totals, A_log, reverse=True)
    dx, d_raw = torch.empty_like(x), torch.empty_like(x)
    parts_b, parts_c = (x.new_empty(blocks, batch, length, n_state, dtype=torch.float32) for _ in range(2))
    parts_a, sums = torch.empty_like(asked), x.new_empty(batch, chunks, 2, channels, dtype=torch.float32)
    _gradient_kernel[grid](
        dy, x, kept.dt, A_log, B, C, D, before, afters, dx, d_raw, parts_b, parts_c, parts_a, sums,
        *sizes, *_strides(B, C), **tile,
    )  # fmt: skip
    d_bias, d_d = sums.sum((0, 1)).unbind(0)
    return dx, d_raw, d_bias, parts_a.sum((0, 1)).T.contiguous(), parts_b.sum(0), parts_c.sum(0), d_d


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Distances between sequences and between tokens, of each tensor [B, L, ...]."""
    return [t.stride(dim) for t in tensors for dim in (0, 1)]
