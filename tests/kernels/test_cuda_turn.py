"""Inputs of the CUDA kernels that are transformed and rounded, against the NumPy formats; on this processor.

Run: `pytest tests/kernels/test_cuda_turn.py`. On a GPU the same comparisons are in benchmarks/quamba2_gpu.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from kernels.cuda_cases import (
    CODES_LAYOUTS,
    TURNED_LAYOUTS,
    codes_product,
    mid_product,
    product,
    turned,
    what_enters,
)
from kernels.cuda_host import host_gpu
from runtime.numpy_reference import random_matrix
from slimba.formats import Matrix

torch = pytest.importorskip("torch")


def case(name: str, batch: int, activations: str) -> tuple[Matrix, np.ndarray, np.ndarray]:
    """A matrix, inputs and their products; an outlier column, which the transform spreads."""
    rng = np.random.default_rng(len(name) + batch)
    matrix = random_matrix(rng, TURNED_LAYOUTS[name])
    x = rng.standard_normal((batch, matrix.layout.cols)).astype(np.float16).astype(np.float32)
    x[:, 5] *= 4
    return matrix, x, matrix.matmul(what_enters(matrix, x, activations))


def flips(matrix: Matrix) -> float:
    """What a code that is one off may move a product by: such codes are rare, so few products may be off by it."""
    return 0.3 if matrix.layout.input_scale else 0.1


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", TURNED_LAYOUTS)
def test_product(name: str, batch: int, activations: str) -> None:
    matrix, x, want = case(name, batch, activations)
    got = product(host_gpu(), matrix, x, activations)
    np.testing.assert_allclose(got, want, rtol=0, atol=flips(matrix) if activations == "int8" else 5e-5)
    assert np.isclose(got, want, rtol=0, atol=5e-5).all(axis=1).mean() > 0.6
    plain = matrix.matmul(x)
    assert activations == "float32" or np.abs(want - plain).max() > 1e-3  # rounding is seen


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("batch", [2, 17])
@pytest.mark.parametrize("name", TURNED_LAYOUTS)
def test_mid_product(name: str, batch: int, activations: str) -> None:
    matrix, x, want = case(name, batch, activations)
    got = mid_product(host_gpu(), matrix, x, activations=activations)
    np.testing.assert_allclose(got, want, rtol=0, atol=flips(matrix) if activations == "int8" else 2e-2)
    assert np.isclose(got, want, rtol=0, atol=2e-2).all(axis=1).mean() > 0.6


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("name", TURNED_LAYOUTS)
def test_turn(name: str, activations: str, exact: bool) -> None:
    """With the stored matrix without its transform, what the kernel leaves makes the same products."""
    matrix, x, want = case(name, 5, activations)
    left = turned(host_gpu(), matrix, x, activations, exact)
    bare = Matrix(type(matrix.layout)(**{**fields(matrix), "hadamard": 0}), matrix.arrays)
    got = bare.matmul(left)
    np.testing.assert_allclose(got, want, rtol=0, atol=flips(matrix) if activations == "int8" else 2e-2)
    assert np.isclose(got, want, rtol=0, atol=5e-5 if exact else 2e-2).all(axis=1).mean() > 0.6


def fields(matrix: Matrix) -> dict[str, object]:
    layout = matrix.layout
    return {name: getattr(layout, name) for name in type(layout).__dataclass_fields__}


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("name", CODES_LAYOUTS)
def test_codes_product(name: str, normed: bool, activations: str) -> None:
    rng = np.random.default_rng(len(name))
    matrix = random_matrix(rng, CODES_LAYOUTS[name])
    cols = matrix.layout.cols
    x = rng.standard_normal(cols).astype(np.float32) * 3
    x[7] = 20
    norm = rng.uniform(0.5, 1.5, cols).astype(np.float32) if normed else None
    entering = (x / np.sqrt((x * x).mean()) * norm if norm is not None else x)[None].astype(np.float32)
    want = matrix.matmul(what_enters(matrix, entering, activations))[0]
    for blocks in (5, 11) if matrix.layout.rows < 1000 else (3,):
        got = codes_product(host_gpu(blocks), matrix, x, norm, activations)
        limit = flips(matrix) if activations == "int8" else 1e-4
        np.testing.assert_allclose(got, want, rtol=0, atol=limit)
        assert np.median(np.abs(got - want)) < (2e-2 if activations == "int8" else 2e-5)


@pytest.mark.parametrize("name", ["codes-768", "codes-1536", "codes-pieces"])
def test_codes_that_wait_in_shared_memory(name: str) -> None:
    """The same bits as from registers."""
    rng = np.random.default_rng(len(name))
    matrix = random_matrix(rng, CODES_LAYOUTS[name])
    x = rng.standard_normal(matrix.layout.cols).astype(np.float32)
    got = [codes_product(host_gpu(4), matrix, x, None, "float32", staged) for staged in (False, True)]
    np.testing.assert_array_equal(*got)


def test_codes_see_zeros_and_damage() -> None:
    matrix = random_matrix(np.random.default_rng(1), CODES_LAYOUTS["codes-1024"])
    x = np.zeros(1024, np.float32)
    for activations in ("float32", "int8"):
        assert (codes_product(host_gpu(), matrix, x, None, activations) == 0).all()
        for bad in (np.inf, np.nan):
            damaged = np.where(np.arange(1024) == 3, np.float32(bad), np.float32(1))
            assert not np.isfinite(codes_product(host_gpu(), matrix, damaged, None, activations)).any()


@pytest.mark.parametrize("rounds", [False, True])
def test_zeros_stay_zero_and_damage_is_seen(rounds: bool) -> None:
    matrix, x, _ = case("turned-int4", 3, "float32")
    x[0], x[1, 7] = 0, np.inf
    for run in (product, mid_product):
        got = run(host_gpu(), matrix, x, activations="int8" if rounds else "float32")
        assert (got[0] == 0).all() and not np.isfinite(got[1]).any() and np.isfinite(got[2]).all()
