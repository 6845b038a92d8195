"""Every kernel on every instruction set, naive twins included, against the NumPy references of the formats, odd sizes.

Outputs and work space are poisoned with NaN, so a value that nobody wrote shows. Run: `pytest tests/kernels`.
"""

from __future__ import annotations

import numpy as np
import pytest

from slimba import _core
from slimba._core import kernels
from slimba.formats import FORMATS
from slimba.formats.hadamard import hadamard

ORDER = ["float32", "float16", "bfloat16", "int8", "int4", "sign"]  # kernels.h: Format


def _runs(isa: str) -> bool:
    try:
        return _core.isa(isa) == isa
    except ValueError:
        return False


ISAS = [
    isa for isa in ("portable", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512lookup", "amx", "neon") if _runs(isa)
]


def nan(*shape: int) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


def flat(a: np.ndarray) -> np.ndarray:
    """The bytes of `a` at an odd address: the file promises no alignment."""
    raw = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
    shifted = np.empty(raw.size + 1, np.uint8)[1:]
    shifted[:] = raw
    return shifted


NO_SCALE = np.full(1, np.nan, np.float32)  # of a float32 state


def raw(a: np.ndarray) -> np.ndarray:
    """The bytes of `a`, in place."""
    return a.reshape(-1).view(np.uint8)


def packed(format: str, w: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, dict[str, np.ndarray]]:
    parts = FORMATS[format].pack(w)
    data = parts["packed"] if "packed" in parts else parts["weight"]
    return flat(data), flat(parts["scale"]) if "scale" in parts else None, parts


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", ORDER)
@pytest.mark.parametrize(
    "rows,cols,tokens",
    [
        (1, 1, 1), (7, 3, 2), (16, 16, 1), (19, 40, 5), (33, 65, 3), (70, 127, 4),
        (65, 128, 1), (130, 129, 7), (300, 200, 9), (17, 513, 70), (64, 1000, 33),
    ],
)  # fmt: skip
def test_matmul_agrees_with_numpy(isa: str, format: str, rows: int, cols: int, tokens: int) -> None:
    rng = np.random.default_rng(rows * cols + tokens)
    w = rng.standard_normal((rows, cols)).astype(np.float32)
    x = rng.standard_normal((tokens, cols)).astype(np.float32)
    data, scale, parts = packed(format, w)
    want = x.astype(np.float64) @ FORMATS[format].unpack(parts, cols).astype(np.float64).T
    y = nan(tokens, rows)
    kernels.matmul(isa, ORDER.index(format), data, scale, x, y, 0, rows, False)
    np.testing.assert_allclose(y, want, rtol=0, atol=3e-6 * np.sqrt(cols) * np.abs(w).max())
    kernels.matmul(isa, ORDER.index(format), data, scale, x, y, 0, rows, True)
    np.testing.assert_allclose(y, 2 * want, rtol=0, atol=6e-6 * np.sqrt(cols) * np.abs(w).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", ORDER)
def test_matmul_does_not_depend_on_tokens_or_row_ranges(isa: str, format: str) -> None:
    rng = np.random.default_rng(5)
    rows, cols, tokens = 301, 203, 11
    data, scale, _ = packed(format, rng.standard_normal((rows, cols)).astype(np.float32))
    x = rng.standard_normal((tokens, cols)).astype(np.float32)
    together = nan(tokens, rows)
    kernels.matmul(isa, ORDER.index(format), data, scale, x, together, 0, rows, False)
    alone = nan(tokens, rows)
    for t in range(tokens):
        for begin, end in ((0, 5), (5, 133), (133, rows)):
            kernels.matmul(isa, ORDER.index(format), data, scale, x[t : t + 1], alone[t : t + 1], begin, end, False)
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_outside_the_range_are_left_alone(isa: str) -> None:
    data, scale, _ = packed("sign", np.ones((50, 70), np.float32))
    y = nan(2, 50)
    kernels.matmul(isa, ORDER.index("sign"), data, scale, np.ones((2, 70), np.float32), y, 3, 41, False)
    assert np.isnan(y[:, :3]).all() and np.isnan(y[:, 41:]).all()
    np.testing.assert_allclose(y[:, 3:41], 70, rtol=1e-3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", ["float16", "int8"])
def test_every_float16_value_is_read(isa: str, format: str) -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    y = nan(1, halves.size)
    one = np.ones((1, 1), np.float32)
    if format == "float16":
        kernels.matmul(isa, ORDER.index(format), flat(halves), None, one, y, 0, halves.size, False)
    else:
        ones = flat(np.ones(halves.size, np.int8))
        kernels.matmul(isa, ORDER.index(format), ones, flat(halves), one, y, 0, halves.size, False)
    np.testing.assert_array_equal(y[0], halves.astype(np.float32))


SIZES = [1, 2, 7, 8, 9, 15, 16, 17, 31, 100, 1025]


@pytest.mark.parametrize("isa", ISAS)
def test_norm_gate_and_sums(isa: str) -> None:
    for n in SIZES:
        rng = np.random.default_rng(n)
        x, z, w = (rng.standard_normal(n).astype(np.float32) * 3 for _ in range(3))
        x64, z64 = x.astype(np.float64), z.astype(np.float64)
        y = nan(n)
        kernels.rms_norm(isa, x, w, 1e-5, y)
        want = x64 / np.sqrt((x64 * x64).mean() + 1e-5)
        np.testing.assert_allclose(y, want * w, rtol=1e-6, atol=1e-7)
        kernels.rms_norm(isa, x, None, 1e-5, y)
        np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-7)
        y = nan(n)
        kernels.gate(isa, x, z, y)
        np.testing.assert_allclose(y, x64 * z64 / (1 + np.exp(-z64)), rtol=1e-6, atol=1e-10)
        assert kernels.max(isa, x) == x.max()
        assert kernels.sum_exp(isa, x, 0.5) == pytest.approx(np.exp(x64 - 0.5).sum(), rel=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_hadamard_has_the_bits_of_its_definition(isa: str) -> None:
    for n, block in [(1, 1), (6, 2), (12, 4), (8, 8), (48, 16), (96, 32), (192, 64), (2560, 512), (4096, 4096)]:
        x = np.random.default_rng(n).standard_normal(n).astype(np.float32)
        y = x.copy()
        kernels.hadamard(isa, y, block)
        assert np.array_equal(y, hadamard(x, block)), (n, block)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_max_reports_what_is_not_finite(isa: str, bad: float) -> None:
    for n in SIZES:
        for at in {0, n // 2, n - 1}:
            x = np.linspace(-3, 3, n, dtype=np.float32)
            x[at] = bad
            assert np.isnan(kernels.max(isa, x)), (n, at)


@pytest.mark.parametrize("isa", ISAS)
def test_softplus_is_accurate_over_their_range(isa: str) -> None:
    x = np.concatenate([np.linspace(-87, 88, 100_001), np.linspace(-1, 1, 10_001)]).astype(np.float32)
    y, one = nan(x.size), np.ones(x.size, np.float32)
    kernels.softplus(isa, x, 0 * one, 0.0, float("inf"), y)
    np.testing.assert_allclose(y, np.logaddexp(0, x.astype(np.float64)), rtol=1e-6)
    extreme = np.array([-1e30, -1000, -200, 200, 1000, 1e30, np.nan], np.float32)
    y = nan(extreme.size)
    kernels.softplus(isa, extreme, 0 * extreme, 0.0, float("inf"), y)
    np.testing.assert_array_equal(y, np.array([0, 0, 0, 200, 1000, 1e30, np.nan], np.float32))
    kernels.softplus(isa, np.array([-9, 0, 9], np.float32), np.zeros(3, np.float32), 0.5, 2.0, y[:3])
    np.testing.assert_allclose(y[:3], [0.5, np.log(2), 2.0], rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("taps", [1, 2, 4, 5])
@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
def test_convolution_continues_from_its_state(isa: str, taps: int, tokens: int) -> None:
    for channels in (1, 9, 16, 37):
        rng = np.random.default_rng(channels)
        x = rng.standard_normal((tokens, channels)).astype(np.float32)
        weight = rng.standard_normal((taps, channels)).astype(np.float32)
        bias = rng.standard_normal(channels).astype(np.float32)
        state = rng.standard_normal((taps - 1, channels)).astype(np.float32)
        window = np.concatenate([state, x]).astype(np.float64)
        sums = np.array([(window[t : t + taps] * weight).sum(axis=0) for t in range(tokens)])
        for b in (bias, None):
            out, moved = nan(tokens, channels), state.copy()
            kernels.conv_silu(isa, x, weight, b, moved, out)
            pre = sums + (0 if b is None else b)
            np.testing.assert_allclose(out, pre / (1 + np.exp(-pre)), rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(moved, np.concatenate([state, x])[tokens:])
            again, still = nan(tokens, channels), state.copy()
            kernels.conv_silu(isa, x, weight, b, still, again, False)
            np.testing.assert_array_equal(again, out)
            np.testing.assert_array_equal(still, state)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels,d_state", [(1, 1), (16, 16), (21, 5), (40, 33)])
def test_mamba1_recurrence(isa: str, channels: int, d_state: int) -> None:
    rng, tokens = np.random.default_rng(3), 9
    x, dt = (rng.standard_normal((tokens, channels)).astype(np.float32) for _ in range(2))
    dt = np.abs(dt)
    bc = rng.standard_normal((tokens, 2 * d_state)).astype(np.float32)
    a = -rng.uniform(0.1, 3, (channels, d_state)).astype(np.float32)
    d = rng.standard_normal(channels).astype(np.float32)
    start = rng.standard_normal((channels, d_state)).astype(np.float32)
    s, want = start.astype(np.float64), []
    for t in range(tokens):
        b, c = np.split(bc[t].astype(np.float64), 2)
        s = np.exp(dt[t].astype(np.float64)[:, None] * a) * s + np.outer(dt[t] * x[t], b)
        want.append(s @ c + d * x[t])
    state, y = start.copy(), nan(tokens, channels)
    kernels.ssm1(isa, x, bc, dt, a, d, 0, raw(state), NO_SCALE, y)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state, s, rtol=1e-5, atol=1e-5)
