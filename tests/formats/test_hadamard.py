"""The block Hadamard transform against its definition. Run: `pytest tests/formats/test_hadamard.py`."""

from __future__ import annotations

import numpy as np
import pytest

from slimba.errors import UserError
from slimba.formats import Matrix, MatrixLayout, Segment
from slimba.formats.hadamard import block_of, hadamard


def sylvester(n: int) -> np.ndarray:
    """Entry (i, j) is the parity of the bits that i and j share, over the root of n."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]) / np.sqrt(n)


@pytest.mark.parametrize(("cols", "block"), [(1, 1), (7, 1), (2, 2), (24, 8), (1536, 512), (2560, 512), (1024, 1024)])
def test_block_is_the_largest_power_of_two_that_divides(cols: int, block: int) -> None:
    assert block_of(cols) == block


@pytest.mark.parametrize(("cols", "block"), [(1, 1), (2, 2), (24, 8), (24, 4), (64, 64), (96, 32)])
def test_blocks_are_sylvesters_matrix(cols: int, block: int) -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, cols)).astype(np.float32)
    before = x.copy()
    y = hadamard(x, block)
    assert y.dtype == np.float32 and np.array_equal(x, before)
    want = (x.reshape(3, 2, -1, block).astype(np.float64) @ sylvester(block)).reshape(x.shape)
    np.testing.assert_allclose(y, want, atol=1e-6)
    np.testing.assert_allclose(hadamard(y, block), x, atol=1e-6)  # its own inverse


def test_torch_gives_the_same_bits() -> None:
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(1).standard_normal((5, 192)).astype(np.float32)
    assert np.array_equal(hadamard(torch.from_numpy(x), 64).numpy(), hadamard(x, 64))


def test_a_matrix_with_a_transform_stands_for_the_weights_it_was_made_from() -> None:
    """Rounded in the transformed columns, where an outlier column costs the others nothing."""
    w = np.random.default_rng(2).standard_normal((11, 256)).astype(np.float32)
    w[:, 3] *= 30
    layout = MatrixLayout(256, (Segment(11, "int4"),))
    turned = MatrixLayout(256, (Segment(11, "int4"),), hadamard=256)
    plain, better = (Matrix.quantize(w, x).dequantize() for x in (layout, turned))
    rest = np.arange(256) != 3
    assert np.abs(better - w)[:, rest].mean() < 0.8 * np.abs(plain - w)[:, rest].mean()
    exact = Matrix.quantize(w, MatrixLayout(256, (Segment(11, "float32"),), hadamard=256))
    np.testing.assert_allclose(exact.dequantize(), w, atol=1e-4)
    x = np.random.default_rng(3).standard_normal((4, 256)).astype(np.float32)
    np.testing.assert_allclose(exact.matmul(x), x @ w.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("block", [1, 3, 12, 32, -2])
def test_blocks_that_do_not_fit_are_refused(block: int) -> None:
    with pytest.raises(UserError, match="Hadamard"):
        MatrixLayout(48, (Segment(4, "int8"),), hadamard=block)
