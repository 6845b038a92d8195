"""Products of two to tens of vectors that lie as operands, run on this processor, against the NumPy formats: odd sizes,
poisoned outputs.

Run: `pytest tests/kernels/test_cuda_eight.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from kernels.cuda_host import host_gpu
from runtime.numpy_reference import random_matrix
from slimba.formats import Matrix, MatrixLayout, Plane, Segment

torch = pytest.importorskip("torch")

STORE = 0
LAYOUTS: dict[str, MatrixLayout] = {
    "sign": MatrixLayout(2048, (Segment(64, "sign"),)),
    "odd": MatrixLayout(2048, (Segment(37, "sign"),), col_scale=True),
    "codes": MatrixLayout(2048, (Segment(3, "int8"), Segment(130, "sign"))),
    "plane": MatrixLayout(
        2048, (Segment(70, "sign"), Segment(67, "sign"), Segment(2, "int8")), plane=Plane(683, 64, 137)
    ),
    "few": MatrixLayout(2048, (Segment(50, "sign"),), plane=Plane(205, 10, 41), col_scale=True),
    "long": MatrixLayout(4096, (Segment(66, "sign"), Segment(3, "int8")), plane=Plane(1365, 0, 66)),
    "long-plain": MatrixLayout(4096, (Segment(48, "sign"),)),
}


def eight_product(gpu: Any, matrix: Matrix, x: np.ndarray, **changes: Any) -> np.ndarray:
    """slimba_eight on float32 x [B, cols], without a norm: [B, rows]."""
    from slimba.runtime.backends.cuda_bake import Baked
    from slimba.runtime.backends.cuda_eight import EIGHT, operand_places, shape_of
    from slimba.runtime.backends.cuda_weights import DeviceMatrix, fields_of, float_bits

    m = DeviceMatrix(matrix, gpu.device, gpu.blocks)
    shape = shape_of(m, gpu.blocks, changes.pop("warps", 16))
    assert shape is not None
    shape = dataclasses.replace(shape, **changes)
    places = operand_places(m, shape, None).cpu().numpy()
    factors = places[:, 2:].copy().view(np.float32)
    count = shape.eights * shape.groups
    operands = np.zeros((count, EIGHT * m.cols), np.float16)
    second = np.zeros((count, EIGHT * max(m.plane_kpad, 8)), np.float16)
    for b, row in enumerate(x):
        operands[b // EIGHT, places[:, 0] // 2 + 32 * (b % EIGHT)] = row * factors[:, 0]
        chosen = places[:, 1] >= 0
        second[b // EIGHT, places[chosen, 1] // 2 + 32 * (b % EIGHT)] = (row * factors[:, 1])[chosen]
    given = [torch.from_numpy(a).to(gpu.device) for a in (operands, second)]
    out = torch.full((len(x), m.rows), float("nan"), device=gpu.device)
    fields = fields_of(
        m.fields, [STORE, out.data_ptr(), m.rows, *[0] * 7], [0] * 5, len(x), *(t.data_ptr() for t in given),
        float_bits(shape.unit), [0] * 13,
    )  # fmt: skip
    baked = Baked()
    name = baked.of_many(shape.name, fields)
    gpu.launch(
        name,
        (gpu.blocks, shape.split),
        fields,
        shape.shared_bytes(0),
        threads=shape.threads,
        module=gpu.module("eight", baked.source),
    )
    gpu.synchronize()
    return np.asarray(out.cpu().numpy())


@pytest.mark.parametrize(("warps", "masked"), [(8, True), (16, False)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_eight_product(name: str, warps: int, masked: bool) -> None:
    rng = np.random.default_rng(len(name))
    matrix = random_matrix(rng, LAYOUTS[name])
    batch = 8 if warps == 8 else 5
    x = rng.standard_normal((batch, matrix.layout.cols)).astype(np.float16).astype(np.float32)
    got = eight_product(host_gpu(), matrix, x, warps=warps, masked=masked)
    want = matrix.matmul(x)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * np.abs(want).max())


@pytest.mark.parametrize(
    ("name", "batch", "eights", "groups", "split", "warps"),
    [
        ("plane", 13, 2, 1, 1, 16),  # two eights at once, the second not full
        ("plane", 30, 2, 2, 2, 8),  # groups of two eights, a block each
        ("plane", 21, 1, 3, 1, 8),  # one group after another
        ("codes", 37, 2, 3, 2, 8),  # and a block has one more than the other
        ("few", 9, 1, 2, 2, 16),
        ("long", 25, 2, 2, 1, 16),
        ("long-plain", 16, 2, 1, 1, 16),
    ],
)
@pytest.mark.parametrize("masked", [True, False])
def test_more_vectors_than_eight(
    name: str, batch: int, eights: int, groups: int, split: int, warps: int, masked: bool
) -> None:
    rng = np.random.default_rng(batch)
    matrix = random_matrix(rng, LAYOUTS[name])
    x = rng.standard_normal((batch, matrix.layout.cols)).astype(np.float16).astype(np.float32)
    plan = {"eights": eights, "groups": groups, "split": split, "warps": warps, "masked": masked}
    got = eight_product(host_gpu(), matrix, x, **plan)
    want = matrix.matmul(x)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * np.abs(want).max())
