"""Products of one vector that lies as an operand in pairs of halves, run on this processor, against the NumPy formats:
odd sizes, poisoned outputs.

Run: `pytest tests/kernels/test_cuda_one.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from kernels.cuda_host import host_gpu
from kernels.test_cuda_eight import LAYOUTS
from runtime.numpy_reference import random_matrix
from slimba.formats import Matrix
from slimba.runtime.backends.cuda_bake import Baked
from slimba.runtime.backends.cuda_eight import operand_places
from slimba.runtime.backends.cuda_one import LANES, one_shape_of
from slimba.runtime.backends.cuda_step import STORE
from slimba.runtime.backends.cuda_weights import DeviceMatrix, fields_of, float_bits

torch = pytest.importorskip("torch")


def one_product(gpu: Any, matrix: Matrix, x: np.ndarray, **changes: Any) -> np.ndarray:
    """The product by slimba_one of x [cols]; its entries are put where operand_places says."""
    m = DeviceMatrix(matrix, gpu.device, gpu.blocks)
    shape = one_shape_of(m, gpu.blocks, changes.pop("warps"))
    assert shape is not None
    shape = dataclasses.replace(shape, **changes)
    places = operand_places(m, shape, None).cpu().numpy()
    factors = places[:, 2:].copy().view(np.float32)
    operands, second = np.zeros(2 * m.cols, np.float16), np.zeros(2 * max(m.plane_kpad, 8), np.float16)
    chosen = places[:, 1] >= 0
    for to, at, values in (
        (operands, places[:, 0], x * factors[:, 0]),
        (second, places[chosen, 1], (x * factors[:, 1])[chosen]),
    ):
        to[at // 2] = values
        to[at // 2 + 4 * LANES] = values - to[at // 2].astype(np.float32)
    given = [torch.from_numpy(a).to(gpu.device) for a in (operands, second)]
    out = torch.full((m.rows,), float("nan"), device=gpu.device)
    fields = fields_of(
        m.fields, [STORE, out.data_ptr(), m.rows, *[0] * 7], [0] * 5, *(t.data_ptr() for t in given),
        float_bits(shape.unit), [0] * 10,
    )  # fmt: skip
    baked = Baked()
    name = baked.of_many(shape.name, fields)
    shared, kernels = shape.shared_bytes(), gpu.module("one", baked.source)
    gpu.launch(name, (gpu.blocks,), fields, shared, threads=shape.threads, module=kernels)
    return out.cpu().numpy()


@pytest.mark.parametrize(
    ("name", "warps"), [(name, warps) for name in LAYOUTS for warps in (8, 16) if name != "long" or warps == 16]
)
@pytest.mark.parametrize("masked", [True, False])
def test_one_product(name: str, warps: int, masked: bool) -> None:
    rng = np.random.default_rng(len(name))
    matrix = random_matrix(rng, LAYOUTS[name])
    x = rng.standard_normal(matrix.layout.cols).astype(np.float32)
    got = one_product(host_gpu(12), matrix, x, warps=warps, masked=masked)
    want = matrix.matmul(x[None])[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-6 * np.abs(want).max())
