"""Cases and drivers of single CUDA kernels, shared by the tests on a processor and by benchmarks/cuda_check.py.

A driver takes a `Gpu`, runs one kernel on outputs poisoned with NaN, and returns NumPy arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slimba.formats import FORMATS, LowRank, Matrix, MatrixLayout, Plane, Segment
from slimba.formats.int8 import quantize_rows
from slimba.formats.sign import pack_signs

STORE, ADD = 0, 1

LAYOUTS: dict[str, MatrixLayout] = {
    "sign": MatrixLayout(512, (Segment(32, "sign"),)),
    "sign-odd": MatrixLayout(77, (Segment(37, "sign"),)),
    "sign-long": MatrixLayout(4128, (Segment(33, "sign"),)),
    "sign-lowrank": MatrixLayout(300, (Segment(50, "sign"),), LowRank(5, 3, 47), col_scale=True),
    "rank-40": MatrixLayout(640, (Segment(50, "sign"), Segment(7, "int8")), LowRank(40, 0, 50)),
    "dfssm": MatrixLayout(520, (Segment(48, "sign"), Segment(21, "int8")), LowRank(16, 0, 48)),
    "plane": MatrixLayout(530, (Segment(70, "sign"), Segment(9, "int8")), LowRank(16, 0, 70), plane=Plane(100, 5, 61)),
    "plane-all": MatrixLayout(96, (Segment(20, "int8"), Segment(40, "sign")), plane=Plane(96, 20, 60), col_scale=True),
    "int8": MatrixLayout(1030, (Segment(19, "int8"),)),
    "int8-tiles": MatrixLayout(1030, (Segment(5000, "int8"),)),
    "int4": MatrixLayout(391, (Segment(19, "int4"),)),
    "float16": MatrixLayout(131, (Segment(19, "float16"),)),
    "all": MatrixLayout(
        201,
        tuple(Segment(n, f) for n, f in zip((21, 3, 5, 4, 2, 6), FORMATS, strict=True)),
        LowRank(3, 10, 40),
        col_scale=True,
    ),
}


def random_matrix(rng: np.random.Generator, layout: MatrixLayout) -> Matrix:
    """Gaussian weights rounded into any layout, with random corrections."""
    rows, cols = layout.rows, layout.cols
    w = rng.standard_normal((rows, cols)).astype(np.float32) / np.float32(np.sqrt(cols))
    out, row = Matrix(layout), 0
    for i, s in enumerate(layout.segments):
        for part, a in FORMATS[s.format].pack(w[row : row + s.rows]).items():
            out.arrays[layout.part_name(i, part)] = a
        row += s.rows
    if lr := layout.lowrank:
        a = rng.standard_normal((lr.stop - lr.start, lr.rank)).astype(np.float32) * np.float32(0.3 / lr.rank)
        b = rng.standard_normal((lr.rank, cols)).astype(np.float32) / np.float32(np.sqrt(cols))
        out.arrays["lowrank_a"], out.arrays["lowrank_a_scale"] = quantize_rows(a)
        out.arrays["lowrank_b"], out.arrays["lowrank_b_scale"] = quantize_rows(b)
    if p := layout.plane:
        n = p.stop - p.start
        out.arrays["plane_packed"] = pack_signs(rng.standard_normal((n, p.cols)))
        out.arrays["plane_scale"] = (rng.uniform(0.2, 0.6, n) / np.sqrt(cols)).astype(np.float16)
        if p.cols < cols:
            out.arrays["plane_index"] = np.sort(rng.permutation(cols)[: p.cols]).astype(np.int32)
    if layout.col_scale:
        out.arrays["col_scale"] = rng.uniform(0.5, 1.5, cols).astype(np.float16)
    return out


def product(gpu: Any, matrix: Matrix, x: np.ndarray) -> np.ndarray:
    """slimba_product on float32 x [B, cols], B <= 8, without a norm: [B, rows]."""
    import torch

    from slimba.runtime.backends.cuda_weights import DeviceMatrix, fields_of

    m = DeviceMatrix(matrix, gpu.device, gpu.blocks)
    batch, tokens = len(x), 1 if len(x) == 1 else 8
    given = torch.from_numpy(x).to(gpu.device)
    out = torch.full((batch, m.rows), float("nan"), device=gpu.device)
    fields = fields_of(
        m.fields, [given.data_ptr(), m.cols, 0, 0, 0, 0, 0], [STORE, out.data_ptr(), m.rows, *[0] * 7], [0] * 5, batch
    )
    gpu.launch(f"slimba_product_{tokens}", (min(gpu.blocks, m.items),), fields, m.shared_bytes(tokens))
    gpu.synchronize()
    return np.asarray(out.cpu().numpy())


def expanded(gpu: Any, matrix: Matrix, exact: bool, first: int = 0) -> np.ndarray:
    """slimba_expand: rows from `first` on as float32."""
    import torch

    from slimba.runtime.backends.cuda_weights import DeviceMatrix, fields_of

    m = DeviceMatrix(matrix, gpu.device, gpu.blocks)
    rows = m.rows - first
    out = torch.full((rows, m.cols), float("nan"), dtype=torch.float32 if exact else torch.float16, device=gpu.device)
    fields = fields_of(m.fields, first, rows, out.data_ptr(), m.cols, m.plane_inverse)
    name = "slimba_expand_float" if exact else "slimba_expand_half"
    gpu.launch(name, (-(-m.cols // 256), -(-rows // 64)), fields, m.rank * (1024 if exact else 768))
    gpu.synchronize()
    return np.asarray(out.float().cpu().numpy())
