"""Kernels with int8 activations: every instruction set, the portable twin included, equals NumPy bit for bit.

Where the roundings are is a contract (`QuantArgs` in kernels.h), so equality is exact. What lies beyond the inputs is
poisoned; sizes are odd. Run: `pytest tests/kernels/test_cpu_quant.py`.
"""

from __future__ import annotations

import numpy as np
import pytest

from kernels.test_cpu_kernels import ISAS, ORDER, flat, nan
from slimba._core import kernels
from slimba.formats import FORMATS

FORMAT_NAMES = ["sign", "int8", "int4"]
SIZES = [
    (1, 1, 1), (7, 3, 2), (16, 64, 1), (19, 40, 5), (33, 65, 3), (70, 127, 4), (65, 128, 13), (130, 129, 7),
    (300, 200, 9), (17, 513, 70), (64, 1000, 33), (37, 8300, 2),
]  # fmt: skip


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes and float32 scales of every token, by the rule of kernels.h."""
    top = np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(1e-20))
    codes = np.rint(x * (np.float32(127) / top)).astype(np.int8)
    return codes, (top / np.float32(127))[:, 0]


def codes_of(format: str, parts: dict[str, np.ndarray], cols: int) -> np.ndarray:
    """The weights without their scales, int64 [rows, cols]."""
    ones = {k: np.ones_like(v) if k == "scale" else v for k, v in parts.items()}
    return np.asarray(FORMATS[format].unpack(ones, cols)).astype(np.int64)


def expected(format: str, parts: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """float32 [T, rows] with every rounding where kernels.h puts it."""
    codes, scale = quantized(x)
    w, row_scale = codes_of(format, parts, x.shape[1]), parts["scale"].astype(np.float32)
    if format != "int4":
        sums = (codes.astype(np.int64) @ w.T).astype(np.float32)
        return sums * (row_scale[None, :] * scale[:, None])
    total = np.zeros((len(x), len(w)), np.float32)
    for g in range(row_scale.shape[1]):
        part = slice(128 * g, 128 * (g + 1))
        sums = (codes[:, part].astype(np.int64) @ w[:, part].T).astype(np.float32)
        total = total + row_scale[None, :, g] * sums
    return total * scale[:, None]


def case(format: str, rows: int, cols: int, tokens: int) -> tuple[np.ndarray, np.ndarray, dict, np.ndarray]:
    rng = np.random.default_rng(rows * cols + tokens)
    parts = FORMATS[format].pack(rng.standard_normal((rows, cols)).astype(np.float32))
    data = parts["packed"] if "packed" in parts else parts["weight"]
    if format == "int8":
        data[0, 0] = -128  # no writer of ours makes it, a file may hold it
    x = (rng.standard_normal((tokens, cols)) * rng.uniform(0.1, 9, (tokens, 1))).astype(np.float32)
    return flat(data), flat(parts["scale"]), parts, x


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("rows,cols,tokens", SIZES)
def test_products_are_exact(isa: str, format: str, rows: int, cols: int, tokens: int) -> None:
    data, scale, parts, x = case(format, rows, cols, tokens)
    want = expected(format, parts, x)
    for many in (False, True):
        y = nan(tokens, rows)
        kernels.quant_matmul(isa, ORDER.index(format), data, scale, x, y, 0, rows, False, many)
        np.testing.assert_array_equal(y, want, f"many={many}")
        kernels.quant_matmul(isa, ORDER.index(format), data, scale, x, y, 0, rows, True, many)
        np.testing.assert_array_equal(y, want + want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_row_ranges_are_kept(isa: str, format: str) -> None:
    data, scale, parts, x = case(format, 150, 203, 6)
    want = expected(format, parts, x)
    for many in (False, True):
        y = nan(6, 150)
        kernels.quant_matmul(isa, ORDER.index(format), data, scale, x, y, 3, 101, False, many)
        np.testing.assert_array_equal(y[:, 3:101], want[:, 3:101])
        assert np.isnan(y[:, :3]).all() and np.isnan(y[:, 101:]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_weights_and_activations_do_not_overflow(isa: str) -> None:
    """Every product at its largest: 16-bit partial sums must hold."""
    cols = 4096 + 17
    x = np.full((5, cols), 3.0, np.float32)
    for format, code in (("sign", 1), ("int8", 127), ("int8", -127), ("int4", 7), ("int4", -7)):
        w = np.full((9, cols), float(code), np.float32)
        parts = FORMATS[format].pack(w)
        data = parts["packed"] if "packed" in parts else parts["weight"]
        for sign in (1, -1):
            for many in (False, True):
                y = nan(5, 9)
                args = (isa, ORDER.index(format), flat(data), flat(parts["scale"]))
                kernels.quant_matmul(*args, sign * x, y, 0, 9, False, many)
                np.testing.assert_array_equal(y, expected(format, parts, sign * x))
                np.testing.assert_allclose(y, sign * 3.0 * cols * code, rtol=2e-3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 1025])
def test_activations_round_to_nearest_even(isa: str, n: int) -> None:
    rng = np.random.default_rng(n)
    for x in (rng.standard_normal(n), np.arange(n) - n / 2 + 0.25, np.linspace(-127, 127, n) + 0.5):
        x = x.astype(np.float32)
        padded = (n + 63) // 64 * 64
        q, scale = np.full(padded, 99, np.int8), nan(1)
        sums = kernels.quantize(isa, x, q, scale)
        codes, want = quantized(x[None])
        np.testing.assert_array_equal(q[:n], codes[0])
        np.testing.assert_array_equal(scale, want)
        assert not q[n:].any()
        parts = [int(codes[0, i : i + 128].astype(int).sum()) for i in range(0, n, 128)]
        assert sums == [*parts, sum(parts)]


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_and_damage(isa: str) -> None:
    """A vector of zeros stays zero; NaN and infinity make the result NaN."""
    q, scale = np.full(64, 99, np.int8), nan(1)
    assert kernels.quantize(isa, np.zeros(40, np.float32), q, scale) == [0, 0]
    assert scale[0] == 0 and not q.any()
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones(40, np.float32)
        x[37] = bad
        kernels.quantize(isa, x, q, scale)
        assert np.isnan(scale[0]) and not q.any()
