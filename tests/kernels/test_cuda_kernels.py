"""The CUDA kernels, run on this processor, against the NumPy formats: odd sizes, poisoned outputs.

Run: `pytest tests/kernels/test_cuda_kernels.py`. On a GPU the same comparisons are in benchmarks/cuda_check.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from kernels.cuda_cases import (
    DOT_LAYOUTS,
    EXPAND_LAYOUTS,
    LAYOUTS,
    LEAN_LAYOUTS,
    expanded,
    lean_product,
    mid_product,
    product,
    still_product,
)
from kernels.cuda_host import host_gpu
from runtime.numpy_reference import random_matrix

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_product(name: str, batch: int) -> None:
    rng = np.random.default_rng(len(name) + batch)
    matrix = random_matrix(rng, LAYOUTS[name])
    x = rng.standard_normal((batch, matrix.layout.cols)).astype(np.float32)
    got = product(host_gpu(), matrix, x)
    np.testing.assert_allclose(got, matrix.matmul(x), rtol=0, atol=3e-5)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", EXPAND_LAYOUTS)
def test_expand(name: str, exact: bool) -> None:
    matrix = random_matrix(np.random.default_rng(5), EXPAND_LAYOUTS[name])
    got = expanded(host_gpu(), matrix, exact)
    np.testing.assert_allclose(got, matrix.dequantize(), rtol=0 if exact else 1e-3, atol=1e-6 if exact else 1e-4)


NO_FLOATS = [n for n, layout in LAYOUTS.items() if all("float" not in s.format for s in layout.segments)]


@pytest.mark.parametrize("blocks", [1, 3, 40])
@pytest.mark.parametrize("batch", [3, 16, 37])
@pytest.mark.parametrize("name", NO_FLOATS)
def test_mid_product(name: str, batch: int, blocks: int) -> None:
    """Few blocks make the kernel with the largest blocks run, many the others."""
    rng = np.random.default_rng(len(name) + batch)
    matrix = random_matrix(rng, LAYOUTS[name])
    x = rng.standard_normal((batch, matrix.layout.cols)).astype(np.float16).astype(np.float32)
    parts = 2 if matrix.layout.cols > 512 else 1
    got = mid_product(host_gpu(blocks), matrix, x, parts)
    np.testing.assert_allclose(got, matrix.matmul(x), rtol=0, atol=1.5e-2)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("name", LEAN_LAYOUTS)
def test_lean_product(name: str, normed: bool) -> None:
    rng = np.random.default_rng(len(name))
    matrix = random_matrix(rng, LEAN_LAYOUTS[name])
    x = rng.standard_normal(matrix.layout.cols).astype(np.float32) * 3
    norm = rng.uniform(0.5, 1.5, matrix.layout.cols).astype(np.float32) if normed else None
    got = lean_product(host_gpu(), matrix, x, norm)
    want = matrix.matmul((x / np.sqrt((x * x).mean()) * norm if norm is not None else x)[None].astype(np.float32))[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-5)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("name", DOT_LAYOUTS)
@pytest.mark.parametrize("warps", [8, 16])
def test_dot_product(name: str, normed: bool, warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimba.runtime.backends.cuda_lean.DOT_WARPS", {2048: warps, 4096: warps})
    rng = np.random.default_rng(len(name))
    matrix = random_matrix(rng, DOT_LAYOUTS[name])
    x = rng.standard_normal(matrix.layout.cols).astype(np.float32) * np.exp(
        rng.uniform(-5, 2, matrix.layout.cols)
    ).astype(np.float32)
    norm = rng.uniform(0.5, 1.5, matrix.layout.cols).astype(np.float32) if normed else None
    got = lean_product(host_gpu(), matrix, x, norm, dot=True)
    want = matrix.matmul((x / np.sqrt((x * x).mean()) * norm if norm is not None else x)[None].astype(np.float32))[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * np.abs(want).max())


@pytest.mark.parametrize("warps", [8, 16])
@pytest.mark.parametrize("batch", [3, 21])
@pytest.mark.parametrize("name", DOT_LAYOUTS)
def test_still_product(name: str, batch: int, warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimba.runtime.backends.cuda_lean.DOT_WARPS", {2048: warps, 4096: warps})
    rng = np.random.default_rng(len(name))
    matrix = random_matrix(rng, DOT_LAYOUTS[name])
    x = rng.standard_normal((batch, matrix.layout.cols)).astype(np.float16).astype(np.float32)
    got = still_product(host_gpu(), matrix, x)
    np.testing.assert_allclose(got, matrix.matmul(x), rtol=0, atol=1.5e-2)
