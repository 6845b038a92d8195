"""The block Hadamard transform: an orthogonal mixing of the columns that spreads outliers before rounding. No torch.

    y = hadamard(x, 512)     # x [..., cols], NumPy or torch; every 512 columns are mixed

Sylvester's matrix of a power of two over its root, so it is symmetric and its own inverse. Widths that are no power of
two are cut into blocks of the largest one that divides them (1536 = 3 x 512), which is orthogonal all the same.

The order of the float32 operations is laid down, so that every engine gets the same bits: stages of distance 1, 2, 4,
..., in each of which (a, b) becomes (a + b, a - b), then one product with float32(1 / sqrt(block)).

Run the tests: `pytest tests/formats/test_hadamard.py`.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

__all__ = ["block_of", "hadamard"]

A = TypeVar("A", bound=Any)


def block_of(cols: int) -> int:
    """The largest power of two that divides `cols`; 1 means that there is nothing to mix."""
    return cols & -cols


def hadamard(x: A, block: int) -> A:
    """x float32 [..., cols], cols a multiple of `block` -> the same shape, each block of columns transformed."""
    y = x.reshape(-1) * 1.0  # a copy, in either library
    distance = 1
    while distance < block:
        pairs = y.reshape(-1, 2, distance)
        total, difference = pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]
        pairs[:, 0], pairs[:, 1] = total, difference
        distance *= 2
    return (y * (1 / math.sqrt(block))).reshape(x.shape)  # type: ignore[no-any-return]
