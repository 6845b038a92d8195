"""Products by warpgroups, run on this processor, against the NumPy formats: odd sizes, poisoned outputs.

Run: `pytest tests/kernels/test_cuda_broad.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kernels.cuda_host import host_gpu
from runtime.numpy_reference import random_matrix
from slimba.formats import Matrix, MatrixLayout, Plane, Segment

torch = pytest.importorskip("torch")

STORE = 0
LAYOUTS: dict[str, MatrixLayout] = {
    "sign": MatrixLayout(512, (Segment(64, "sign"),)),
    "odd": MatrixLayout(77, (Segment(37, "sign"),)),
    "codes": MatrixLayout(520, (Segment(9, "int8"), Segment(130, "sign"), Segment(21, "int8")), col_scale=True),
    "plane": MatrixLayout(530, (Segment(270, "sign"), Segment(9, "int8")), plane=Plane(100, 205, 261)),
    "planes": MatrixLayout(2048, (Segment(70, "sign"), Segment(67, "sign")), plane=Plane(683, 64, 137)),
    "long": MatrixLayout(4096, (Segment(66, "sign"), Segment(17, "int8")), plane=Plane(1365, 0, 66)),
    "int4": MatrixLayout(391, (Segment(150, "int4"),), col_scale=True),
    "int4-long": MatrixLayout(1030, (Segment(67, "int4"), Segment(5, "int4"))),
}
SHAPES = ((8, 1, 4, 1), (8, 2, 1, 3), (16, 1, 2, 2), (32, 1, 4, 4), (64, 2, 2, 1), (128, 4, 1, 2))


def broad_product(gpu: Any, matrix: Matrix, x: np.ndarray, shape: tuple[int, int, int, int]) -> np.ndarray:
    """slimba_broad_norm, slimba_broad and slimba_broad_codes on float32 x [B, cols], without a norm: [B, rows]."""
    from slimba.runtime.backends.cuda_bake import Baked
    from slimba.runtime.backends.cuda_batch import Recorder
    from slimba.runtime.backends.cuda_broad import Broad, Shape
    from slimba.runtime.backends.cuda_weights import DeviceMatrix

    fixed = {1 << 30: Shape(*shape)}
    Fixed: Any = type("Fixed", (Broad,), {"MANY": fixed, "FEW": fixed, "CODES": fixed})
    m, recorder = DeviceMatrix(matrix, gpu.device, gpu.blocks), Recorder(gpu)
    assert Broad.fits(m)
    given = torch.from_numpy(x).to(gpu.device)
    out = torch.full((shape[3], len(x), m.rows), float("nan"), device=gpu.device)
    first = 0
    for segment in m.layout.segments:  # rows of codes are in the first result alone
        if segment.format == "int8":
            out[1:, :, first : first + segment.rows] = 0
        first += segment.rows
    broad = Fixed(recorder, len(x), [m])
    to, early = [STORE, out.data_ptr(), m.rows, *[0] * 7], broad.codes_by_norm(m)  # of up to 32 vectors
    broad.norm(m, [given.data_ptr(), m.cols, 0, 0, 0, 0, 0], codes=[*to, *[0] * 5] if early else ())
    broad.product(m, to, [0] * 5, len(x) * m.rows, signs_only=early)
    baked = Baked()
    names = [baked.of_many(a[0], a[2]) for a, _ in recorder.launches]  # type: ignore[index]
    module = gpu.module("broad", baked.source)
    for name, (arguments, settings) in zip(names, recorder.launches, strict=True):
        gpu.launch(name, *arguments[1:], **settings, module=module)  # type: ignore[index]
    gpu.synchronize()
    return np.asarray(out.sum(0).cpu().numpy())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_broad_product(name: str, shape: tuple[int, int, int, int]) -> None:
    rng = np.random.default_rng(len(name) + shape[0])
    matrix = random_matrix(rng, LAYOUTS[name])
    batch = shape[0] + 3 if shape[0] < 32 else shape[0] - 5
    x = rng.standard_normal((batch, matrix.layout.cols)).astype(np.float16).astype(np.float32)
    got = broad_product(host_gpu(), matrix, x, shape)
    np.testing.assert_allclose(got, matrix.matmul(x), rtol=0, atol=1.5e-2)
