"""The rounding used in training equals the NumPy formats bit for bit, and passes gradients straight through."""

import numpy as np
import pytest
import torch

from slimba.formats import Matrix, MatrixLayout
from slimba.methods import fake_quant

TWINS = {"int8": fake_quant.int8_rows, "int4": fake_quant.int4_groups, "float16": fake_quant.float16}


@pytest.mark.parametrize("fmt", TWINS)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 300.0])
def test_equal_to_the_format_bit_for_bit(fmt, scale):
    w = (np.random.default_rng(0).normal(size=(33, 301)) * scale).astype(np.float32)
    w[5] = 0
    packed = Matrix.quantize(w, MatrixLayout.plain(33, 301, fmt)).dequantize()
    ours = TWINS[fmt](torch.from_numpy(w)).numpy()
    assert np.array_equal(ours, packed)


@pytest.mark.parametrize("fmt", TWINS)
def test_a_stack_is_rounded_matrix_by_matrix(fmt):
    w = torch.randn(3, 5, 130)
    assert torch.equal(TWINS[fmt](w), torch.stack([TWINS[fmt](m) for m in w]))


@pytest.mark.parametrize("fmt", TWINS)
def test_gradient_is_the_identity(fmt):
    w = torch.randn(4, 130, requires_grad=True)
    upstream = torch.randn(4, 130)
    TWINS[fmt](w).backward(upstream)
    assert torch.equal(w.grad, upstream)
