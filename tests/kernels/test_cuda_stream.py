"""Products with rows of float16, bfloat16 and int8 that stream past one vector or a few; on this processor.

Run: `pytest tests/kernels/test_cuda_stream.py`. On a GPU the same comparisons are in benchmarks/quamba2_gpu.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from kernels.cuda_cases import STREAM_LAYOUTS, few_product, stream_product, what_enters
from kernels.cuda_host import host_gpu
from runtime.numpy_reference import random_matrix

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("name", STREAM_LAYOUTS)
def test_one_vector(name: str, normed: bool, activations: str) -> None:
    """As exact as float32, whatever the format; with int8 activations codes may flip."""
    layout = STREAM_LAYOUTS[name]
    rounds = activations == "int8" and layout.segments[0].format == "int8"
    if activations == "int8" and not rounds:
        return
    rng = np.random.default_rng(len(name))
    matrix = random_matrix(rng, layout)
    x = rng.standard_normal(layout.cols).astype(np.float32) * 3
    x[7], x[300:310] = 20, 1e-6
    norm = rng.uniform(0.5, 1.5, layout.cols).astype(np.float32) if normed else None
    entering = (x / np.sqrt((x * x).mean()) * norm if norm is not None else x)[None].astype(np.float32)
    want = matrix.matmul(what_enters(matrix, entering, activations))[0]
    for blocks in (3, 5):
        got = stream_product(host_gpu(blocks), matrix, x, norm, activations)
        np.testing.assert_allclose(got, want, rtol=0, atol=0.3 if rounds else 1e-4)
        assert np.median(np.abs(got - want)) < (2e-2 if rounds else 2e-5)


@pytest.mark.parametrize("batch", [2, 5, 8])
@pytest.mark.parametrize("name", [n for n, layout in STREAM_LAYOUTS.items() if not layout.input_scale])
def test_few_vectors(name: str, batch: int) -> None:
    """In float16, as all products of several vectors."""
    layout = STREAM_LAYOUTS[name]
    rng = np.random.default_rng(len(name) + batch)
    matrix = random_matrix(rng, layout)
    x = rng.standard_normal((batch, layout.cols)).astype(np.float16).astype(np.float32)
    got = few_product(host_gpu(3), matrix, x)
    exact = not layout.hadamard
    np.testing.assert_allclose(got, matrix.matmul(x), rtol=0, atol=1e-4 if exact else 2e-2)


@pytest.mark.parametrize("name", ["stream-half", "stream-bfloat", "stream-int8"])
def test_damage_is_seen(name: str) -> None:
    matrix = random_matrix(np.random.default_rng(1), STREAM_LAYOUTS[name])
    x = np.zeros(matrix.layout.cols, np.float32)
    assert (stream_product(host_gpu(3), matrix, x) == 0).all()
    for bad in (np.inf, np.nan):
        x[3] = bad
        assert not np.isfinite(stream_product(host_gpu(3), matrix, x)).any()


def test_bias_and_depth() -> None:
    """A ring of every depth gives the same bits."""
    matrix = random_matrix(np.random.default_rng(2), STREAM_LAYOUTS["stream-half"])
    x = np.random.default_rng(3).standard_normal(matrix.layout.cols).astype(np.float32)
    bias = np.arange(matrix.layout.rows, dtype=np.float32)
    results: list[Any] = []
    for depth in (1, 4, 8):
        results.append(
            stream_product(host_gpu(3), matrix, x, change=lambda s, d=depth: dataclasses.replace(s, depth=d), bias=bias)
        )
    assert (results[0] == results[1]).all() and (results[0] == results[2]).all()
    np.testing.assert_allclose(results[0], matrix.matmul(x[None])[0] + bias, rtol=0, atol=1e-4)
