"""Products of one vector that lies in digits, run on this processor, against the NumPy formats: odd sizes, poisoned
outputs.

Run: `pytest tests/kernels/test_cuda_one.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kernels.cuda_host import host_gpu
from kernels.test_cuda_eight import LAYOUTS
from runtime.numpy_reference import random_matrix
from slimba.formats import Matrix

torch = pytest.importorskip("torch")

RANGE = 0.5  # what the vector was multiplied by


def one_product(gpu: Any, matrix: Matrix, x: np.ndarray, warps: int, rng: np.random.Generator) -> np.ndarray:
    """The product by slimba_one of x [cols], without a norm; its digits are put where digit_places says, among others
    in the gaps of the second plane."""
    from slimba.runtime.backends.cuda_bake import Baked
    from slimba.runtime.backends.cuda_one import digit_places, one_shape_of
    from slimba.runtime.backends.cuda_step import STORE
    from slimba.runtime.backends.cuda_weights import DeviceMatrix, fields_of, float_bits

    m = DeviceMatrix(matrix, gpu.device, gpu.blocks)
    shape = one_shape_of(m, gpu.blocks, warps)
    assert shape is not None
    p = digit_places(m, shape, None)
    places = p.places.cpu().numpy()
    factors = places[:, 2:].copy().view(np.float32)
    digits = [rng.integers(0, 256, 4 * n, np.uint8) for n in (m.cols, max(m.plane_kpad, 8))]
    for to, at, factor, apart in (
        (digits[0], places[:, 0], factors[:, 0], 64),
        (digits[1], places[:, 1], factors[:, 1], p.slice2),
    ):
        there = at >= 0
        rest = np.rint((x * RANGE * factor)[there]).astype(np.int64)
        for s in range(4):
            digit = (rest + 128) % 256 - 128
            to[at[there] + s * apart] = digit.astype(np.int8).view(np.uint8)
            rest = (rest - digit) // 256
        assert not rest.any()
    given = [torch.from_numpy(a).to(gpu.device) for a in digits]
    out = torch.full((m.rows,), float("nan"), device=gpu.device)
    left = torch.tensor([RANGE, 0, 0, 0, m.cols, 0, 0, 0], dtype=torch.float32, device=gpu.device)  # an RMS of 1
    fields = fields_of(
        m.fields, [STORE, out.data_ptr(), m.rows, *[0] * 7], [0] * 5, *(t.data_ptr() for t in given),
        p.valid.data_ptr(), float_bits(p.unit), left.data_ptr(), len(left), 0, 0,
    )  # fmt: skip
    baked = Baked()
    name = baked.of_many(shape.name, fields)
    kernels = gpu.module("one", baked.source)
    gpu.launch(name, (gpu.blocks,), fields, shape.shared_bytes, threads=shape.threads, module=kernels)
    return out.cpu().numpy()


@pytest.mark.parametrize(
    ("name", "warps"), [(name, warps) for name in LAYOUTS for warps in (8, 16) if name != "long" or warps == 16]
)
def test_one_product(name: str, warps: int) -> None:
    rng = np.random.default_rng(len(name))
    matrix = random_matrix(rng, LAYOUTS[name])
    x = rng.standard_normal(matrix.layout.cols).astype(np.float32)
    got = one_product(host_gpu(12), matrix, x, warps, rng)
    want = matrix.matmul(x[None])[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4 * np.abs(want).max())
