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
from slimba.formats import Matrix, MatrixLayout, Plane, Segment

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


@pytest.mark.parametrize("beyond", [False, True])
def test_what_a_product_leaves(beyond: bool) -> None:
    """Rows added to the residual stream, their digits as columns of the next matrix and nothing between those, and
    their squares, which are NaN where a column is beyond the digits."""
    from slimba.runtime.backends.cuda_bake import Baked
    from slimba.runtime.backends.cuda_lean import dot_of
    from slimba.runtime.backends.cuda_one import HEADROOM, digit_places, one_shape_of, squares_of
    from slimba.runtime.backends.cuda_step import ADD
    from slimba.runtime.backends.cuda_weights import DeviceMatrix, fields_of, float_bits

    gpu, rng = host_gpu(60), np.random.default_rng(0)
    layout = MatrixLayout(
        2048, (Segment(37, "sign"), Segment(2006, "sign"), Segment(5, "int8")), plane=Plane(205, 0, 41)
    )
    matrix, following = random_matrix(rng, layout), random_matrix(rng, LAYOUTS["plane"])
    m, after = (DeviceMatrix(x, gpu.device, gpu.blocks) for x in (matrix, following))
    dot, shape = dot_of(m, gpu.blocks, 1, False), one_shape_of(after, gpu.blocks, 8)
    assert dot and shape
    weight = torch.from_numpy(rng.standard_normal(2048).astype(np.float32))
    places = digit_places(after, shape, weight)
    x, u = (rng.standard_normal(2048).astype(np.float32) for _ in range(2))
    if beyond:
        u[int(weight.abs().argmax())] = 128 * 2 * HEADROOM / RANGE  # columns whose j is 7 have 128 times the room
    given = [torch.from_numpy(a.copy()) for a in (x, u)]
    before = [rng.integers(0, 256, 4 * n, np.uint8) for n in (2048, after.plane_kpad)]
    digits = [torch.from_numpy(a.copy()) for a in before]
    squares, scale = torch.full((squares_of(dot) * gpu.blocks,), 7.0), torch.tensor([RANGE])
    fields = fields_of(
        m.fields, [given[0].data_ptr(), 2048, 0, 0, 0, 0, float_bits(1e-5)],
        [ADD, given[1].data_ptr(), 2048, *[0] * 7], [0] * 5, 1, m.plane_inverse,
        [places.places.data_ptr(), *(t.data_ptr() for t in digits), places.slice2, scale.data_ptr(),
         squares.data_ptr(), 0],
    )  # fmt: skip
    baked = Baked()
    numbers = *dot.numbers, gpu.blocks, dot.resident
    name = baked.of_many("slimba_leaving_" + "_".join(map(str, numbers)), fields)
    kernels = gpu.module("one", baked.source)
    gpu.launch(name, (gpu.blocks,), fields, dot.shared_bytes, threads=dot.threads, module=kernels)
    want = u + matrix.matmul(x[None])[0]
    got = given[1].numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert np.isnan(squares.numpy()).any() == beyond
    if not beyond:
        np.testing.assert_allclose(squares.sum(), (got.astype(np.float64) ** 2).sum(), rtol=1e-5)
    at, factors = places.places.numpy(), places.places.numpy()[:, 2:].copy().view(np.float32)
    for k, apart in enumerate((64, places.slice2)):
        there = at[:, k] >= 0
        where = at[there, k, None] + apart * np.arange(4)
        left = digits[k].numpy()[where].view(np.int8).astype(np.float64) @ 256.0 ** np.arange(4)
        put = got[there].astype(np.float64) * RANGE * factors[there, k]
        fits = np.abs(put) < 2**30
        assert np.abs(left - put)[fits].max() <= 0.5 + 2.0**-22 * 2**30  # what float32 rounds of the largest
        assert np.median(np.abs(left - put)[fits]) < 1 and fits.sum() >= there.sum() - 1
        untouched = np.ones(len(before[k]), bool)
        untouched[where] = False
        np.testing.assert_array_equal(digits[k].numpy()[untouched], before[k][untouched])
