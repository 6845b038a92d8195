"""Recurrences on states stored in bfloat16 and int8, every instruction set against NumPy, odd sizes.

Run: `pytest tests/kernels/test_cpu_states.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from kernels.test_cpu_kernels import ISAS, nan, raw
from slimba._core import kernels

TYPES = {"bfloat16": 1, "int8": 2}  # kernels.h: StateType


@dataclass
class Stored:
    """A state [rows, N] as it lies in memory."""

    dtype: str
    data: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, dtype: str, s: np.ndarray) -> Stored:
        """`s` rounded by the rule of kernels.h, in float32 like the kernels."""
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
        return self.scale[:, None] if self.dtype == "int8" else np.abs(self.floats()) / 128 + 1e-30


def assert_same(a: Stored, b: Stored) -> None:
    np.testing.assert_array_equal(raw(a.data), raw(b.data))
    np.testing.assert_array_equal(a.scale, b.scale)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("headdim,d_state", [(1, 1), (16, 16), (5, 7), (19, 64), (33, 129), (64, 128)])
def test_mamba2_rounds_after_every_token(isa: str, dtype: str, headdim: int, d_state: int) -> None:
    rng = np.random.default_rng(headdim)
    tokens = 37  # more than one pass of the kernel
    xbc = rng.standard_normal((tokens, headdim + 2 * d_state)).astype(np.float32)
    dt, decay = (rng.uniform(0.1, 0.9, tokens).astype(np.float32) for _ in range(2))
    d = rng.standard_normal(headdim).astype(np.float32)
    start = Stored.of(dtype, rng.standard_normal((headdim, d_state)).astype(np.float32))
    moved, y = start.copy(), nan(1, headdim)
    outputs = []
    for t in range(tokens):  # each step from the kernel's own state: roundings must not be compared across tokens
        x, b, c = np.split(xbc[t], [headdim, headdim + d_state])
        s = decay[t] * moved.floats() + dt[t] * np.outer(x, b)
        one = slice(t, t + 1)
        kernels.ssm2(isa, xbc[one], dt[one], decay[one], d, *moved.args(), y)
        np.testing.assert_allclose(y[0], s @ c + d * x, rtol=1e-4, atol=1e-4)
        want = Stored.of(dtype, s)
        np.testing.assert_allclose(moved.floats() - want.floats(), 0 * s, atol=float(1.01 * want.step().max()))
        assert np.isclose(moved.floats(), want.floats(), rtol=1e-5, atol=1e-6).mean() > 0.98
        outputs.append(y[0].copy())
    whole, y = start.copy(), nan(tokens, headdim)
    kernels.ssm2(isa, xbc, dt, decay, d, *whole.args(), y)
    np.testing.assert_array_equal(y, outputs)
    assert_same(whole, moved)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
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
    """From an empty state with dt = x = 1 the state is B: what is stored is B rounded, ties and zeros included."""
    one, d = np.ones(1, np.float32), np.zeros(1, np.float32)
    ties = np.array([127, 0.5, 1.5, -2.5, -126.5, 0, 1e-3], np.float32)
    halfway = (np.arange(0x3F808000, 0x3F888000, 0x8000, dtype=np.uint32)).view(np.float32)  # between two bfloat16
    for b in (ties, halfway, np.zeros(9, np.float32), np.full(5, 1e-38, np.float32), np.float32([-3e38, 1, 3e38])):
        n = b.size
        got = Stored.of(dtype, np.zeros((1, n), np.float32))
        xbc = np.concatenate([one, b, np.zeros(n, np.float32)])[None]
        y = nan(1, 1)
        kernels.ssm2(isa, xbc, one, one, d, *got.args(), y)
        assert y[0, 0] == 0
        assert_same(got, Stored.of(dtype, b[None]))
        before = got.copy()  # nothing added and nothing decayed: nothing changes
        for _ in range(3):
            kernels.ssm2(isa, 0 * xbc, one, one, d, *got.args(), y)
        np.testing.assert_array_equal(got.data, before.data)
        np.testing.assert_allclose(got.scale, before.scale, rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_damaged_state_stays_damaged(isa: str, dtype: str, bad: float) -> None:
    one, d = np.ones(1, np.float32), np.zeros(1, np.float32)
    for n, at in ((1, 0), (17, 3), (40, 39)):
        state = Stored.of(dtype, np.ones((1, n), np.float32))
        xbc = np.concatenate([one, np.zeros(n, np.float32), np.ones(n, np.float32)])[None].astype(np.float32)
        xbc[0, 1 + at] = bad
        y = nan(1, 1)
        kernels.ssm2(isa, xbc, one, one, d, *state.args(), y)
        assert not np.isfinite(y).any()
        xbc[0, 1 + at] = 0
        kernels.ssm2(isa, xbc, one, one, d, *state.args(), y)
        assert not np.isfinite(y).any()
