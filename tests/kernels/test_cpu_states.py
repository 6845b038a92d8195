"""Recurrences on states stored in float32, bfloat16 and int8, every instruction set against NumPy, odd sizes.

Run: `pytest tests/kernels/test_cpu_states.py`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from kernels.test_cpu_kernels import ISAS, nan, raw
from slimba._core import kernels

TYPES = {"float32": 0, "bfloat16": 1, "int8": 2}  # kernels.h: StateType
BLOCK = 16  # kernels.h: kStateBlock


@dataclass
class Stored:
    """A state [rows, N] as it lies in memory."""

    dtype: str
    data: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, dtype: str, s: np.ndarray) -> Stored:
        """`s` rounded by the rule of kernels.h, in float32 like the kernels."""
        if dtype == "float32":
            return cls(dtype, s.copy(), nan(len(s)))
        if dtype == "bfloat16":
            return cls(dtype, s.astype(ml_dtypes.bfloat16), nan(len(s)))
        top = np.abs(s).max(axis=1, keepdims=True)
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.where(top < 1e-30, np.float32(0), np.float32(127) / top)
        scale = np.where(top < 1e-30, np.float32(0), top / np.float32(127))
        return cls(dtype, np.rint(s * inverse).astype(np.int8), scale[:, 0].copy())

    def floats(self) -> np.ndarray:
        values = self.data.astype(np.float32)
        return values * self.scale[:, None] if self.dtype == "int8" else values

    def copy(self) -> Stored:
        return Stored(self.dtype, self.data.copy(), self.scale.copy())

    def args(self) -> tuple[int, np.ndarray, np.ndarray]:
        return TYPES[self.dtype], raw(self.data), self.scale

    def step(self) -> np.ndarray:
        """The distance of neighbouring stored values, [rows, N] or [rows, 1]."""
        if self.dtype == "int8":
            return self.scale[:, None]
        return np.abs(self.floats()) * (2.0**-7 if self.dtype == "bfloat16" else 1e-5) + 1e-5


def assert_same(a: Stored, b: Stored) -> None:
    np.testing.assert_array_equal(raw(a.data), raw(b.data))
    np.testing.assert_array_equal(a.scale, b.scale)


class Memory:
    """All that one group of Mamba-2 heads remembers, and the kernel that moves it on."""

    def __init__(self, dtype: str, state: np.ndarray) -> None:
        """state [H, P, N] float32"""
        self.heads, self.headdim, self.n = state.shape
        self.stored = Stored.of(dtype, state.reshape(-1, self.n))
        held = ml_dtypes.bfloat16 if dtype != "float32" else np.float32
        self.u = np.zeros((self.heads, BLOCK, self.headdim), held)
        self.b = np.zeros((BLOCK, self.n), held)
        self.logs = np.zeros((self.heads, BLOCK), np.float32)
        self.filled = 0

    def run(self, isa: str, xbc: np.ndarray, dt: np.ndarray, a: np.ndarray, d: np.ndarray) -> np.ndarray:
        y = nan(len(xbc), self.heads * self.headdim)
        self.filled = kernels.ssm2(
            isa, xbc, dt, a, d, *self.stored.args(), self.filled, raw(self.u), raw(self.b), self.logs, y
        )
        return y

    def assert_same(self, other: Memory) -> None:
        assert self.filled == other.filled
        assert_same(self.stored, other.stored)
        for mine, theirs in ((self.u, other.u), (self.b, other.b)):
            np.testing.assert_array_equal(raw(mine), raw(theirs))
        np.testing.assert_array_equal(self.logs, other.logs)


def random_tokens(seed: int, tokens: int, heads: int, headdim: int, n: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    xbc = rng.standard_normal((tokens, heads * headdim + 2 * n)).astype(np.float32)
    dt = rng.uniform(0.01, 0.9, (tokens, heads)).astype(np.float32)
    a = -rng.uniform(0.01, 3, heads).astype(np.float32)
    return xbc, dt, a, rng.standard_normal((heads, headdim, n)).astype(np.float32)


SIZES = [(1, 1, 1), (2, 16, 16), (3, 5, 7), (2, 19, 64), (1, 33, 129), (2, 64, 128), (1, 17, 200), (2, 8, 96)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("heads,headdim,n", SIZES)
def test_mamba2_in_float32_is_the_recurrence(isa: str, heads: int, headdim: int, n: int) -> None:
    for tokens in (1, 2, 37):
        xbc, dt, a, start = random_tokens(tokens, tokens, heads, headdim, n)
        for d in (np.linspace(-1, 1, k).astype(np.float32) for k in (heads, heads * headdim)):
            s, want = start.astype(np.float64), []
            for t in range(tokens):
                x, b, c = np.split(xbc[t].astype(np.float64), [heads * headdim, heads * headdim + n])
                s *= np.exp(dt[t].astype(np.float64) * a)[:, None, None]
                s += (dt[t][:, None] * x.reshape(heads, headdim))[..., None] * b
                skip = d.reshape(heads, -1) * x.reshape(heads, headdim)
                want.append(((s @ c) + skip).reshape(-1))
            np.testing.assert_allclose(Memory("float32", start).run(isa, xbc, dt, a, d), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("heads,headdim,n", SIZES)
def test_mamba2_is_stored_every_sixteen_tokens(isa: str, dtype: str, heads: int, headdim: int, n: int) -> None:
    """Each block from the kernel's own state (roundings must not be compared across blocks), then cuts everywhere."""
    tokens = 53
    xbc, dt, a, start = random_tokens(headdim, tokens, heads, headdim, n)
    d = np.linspace(-1, 1, heads).astype(np.float32)
    held = (lambda v: v.astype(ml_dtypes.bfloat16).astype(np.float32)) if dtype != "float32" else (lambda v: v)
    memory, outputs = Memory(dtype, start), []
    for first in range(0, tokens, BLOCK):
        part = slice(first, min(first + BLOCK, tokens))
        s = memory.stored.floats().reshape(heads, headdim, n).astype(np.float64)
        x, b, c = np.split(xbc[part], [heads * headdim, heads * headdim + n], axis=1)
        u = held(dt[part][:, :, None] * x.reshape(-1, heads, headdim))
        logs = np.cumsum(dt[part] * a, axis=0, dtype=np.float64)
        got = memory.run(isa, xbc[part], dt[part], a, d)
        for t in range(len(x)):
            weight = np.exp(logs[t] - logs[: t + 1]) * (held(b[: t + 1]) @ c[t])[:, None]  # [i, H]
            want = np.exp(logs[t])[:, None] * (s @ c[t]) + np.einsum("ih,ihp->hp", weight, u[: t + 1])
            want += d[:, None] * x[t].reshape(heads, headdim)
            np.testing.assert_allclose(got[t], want.reshape(-1), rtol=1e-3, atol=1e-3)
        outputs.append(got)
        if len(x) < BLOCK:
            continue
        gain = np.exp(logs[-1] - logs)[..., None] * u
        s = np.exp(logs[-1])[:, None, None] * s + np.einsum("ihp,in->hpn", gain, held(b))
        want = Stored.of(dtype, s.reshape(-1, n).astype(np.float32))
        error = np.abs(memory.stored.floats() - want.floats())
        assert (error <= 1.01 * want.step()).all()
        assert np.isclose(memory.stored.floats(), want.floats(), rtol=1e-5, atol=1e-5).mean() > 0.98
    whole = Memory(dtype, start)
    np.testing.assert_array_equal(whole.run(isa, xbc, dt, a, d), np.concatenate(outputs))
    whole.assert_same(memory)
    cut, pieces = Memory(dtype, start), []
    for i, j in itertools.pairwise([0, 1, 2, 3, 15, 16, 31, 33, 34, tokens]):
        pieces.append(cut.run(isa, xbc[i:j], dt[i:j], a, d))
    np.testing.assert_array_equal(np.concatenate(pieces), np.concatenate(outputs))
    cut.assert_same(memory)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("channels,d_state", [(1, 1), (16, 16), (21, 5), (40, 33)])
def test_mamba1_rounds_after_every_token(isa: str, dtype: str, channels: int, d_state: int) -> None:
    rng, tokens = np.random.default_rng(3), 19
    x, dt = (rng.standard_normal((tokens, channels)).astype(np.float32) for _ in range(2))
    dt = np.abs(dt)
    bc = rng.standard_normal((tokens, 2 * d_state)).astype(np.float32)
    a = -rng.uniform(0.1, 3, (channels, d_state)).astype(np.float32)
    d = rng.standard_normal(channels).astype(np.float32)
    start = Stored.of(dtype, rng.standard_normal((channels, d_state)).astype(np.float32))
    moved, y = start.copy(), nan(1, channels)
    outputs = []
    for t in range(tokens):
        b, c = np.split(bc[t], 2)
        s = np.exp(dt[t][:, None] * a) * moved.floats() + np.outer(dt[t] * x[t], b)
        one = slice(t, t + 1)
        kernels.ssm1(isa, x[one], bc[one], dt[one], a, d, *moved.args(), y)
        np.testing.assert_allclose(y[0], s @ c + d * x[t], rtol=1e-4, atol=1e-4)
        want = Stored.of(dtype, s)
        np.testing.assert_allclose(moved.floats() - want.floats(), 0 * s, atol=float(1.01 * want.step().max()))
        outputs.append(y[0].copy())
    whole, y = start.copy(), nan(tokens, channels)
    kernels.ssm1(isa, x, bc, dt, a, d, *whole.args(), y)
    np.testing.assert_array_equal(y, outputs)
    assert_same(whole, moved)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
def test_the_rounding_is_exact(isa: str, dtype: str) -> None:
    """From an empty state with dt = x = 1 at the first token the state becomes B: rounded, ties and zeros too."""
    zero, a = np.zeros(1, np.float32), np.full(1, -1e-30, np.float32)
    ties = np.array([127, 0.5, 1.5, -2.5, -126.5, 0, 1e-3], np.float32)
    halfway = (np.arange(0x3F808000, 0x3F888000, 0x8000, dtype=np.uint32)).view(np.float32)  # between two bfloat16
    for b in (ties, halfway, np.zeros(9, np.float32), np.full(5, 1e-38, np.float32), np.float32([-3e38, 1, 3e38])):
        n = b.size
        memory = Memory(dtype, np.zeros((1, 1, n), np.float32))
        xbc = np.zeros((BLOCK, 1 + 2 * n), np.float32)
        xbc[0, 0], xbc[0, 1 : 1 + n] = 1, b
        y = memory.run(isa, xbc, np.ones((BLOCK, 1), np.float32), a, zero)
        assert (y == 0).all()
        kept = b if dtype == "float32" else b.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert_same(memory.stored, Stored.of(dtype, kept[None]))
        before = memory.stored.copy()  # nothing added and nothing decayed: nothing changes
        memory.run(isa, np.zeros((3 * BLOCK, 1 + 2 * n), np.float32), np.ones((3 * BLOCK, 1), np.float32), a, zero)
        np.testing.assert_array_equal(memory.stored.data, before.data)
        np.testing.assert_allclose(memory.stored.scale, before.scale, rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_damaged_state_stays_damaged(isa: str, dtype: str, bad: float) -> None:
    """From the bad token on, within its block and after it was stored."""
    for n, at in ((1, 0), (17, 3), (40, 39)):
        memory = Memory(dtype, np.ones((1, 1, n), np.float32))
        xbc = np.ones((4 * BLOCK, 1 + 2 * n), np.float32)
        xbc[5, 1 + at] = bad
        dt, a = np.full((len(xbc), 1), 0.1, np.float32), np.full(1, -0.1, np.float32)
        y = memory.run(isa, xbc, dt, a, np.zeros(1, np.float32))
        assert np.isfinite(y[:5]).all() and not np.isfinite(y[5:]).any()
