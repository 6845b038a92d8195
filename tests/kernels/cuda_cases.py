"""Cases and drivers of single CUDA kernels, shared by the tests on a processor and by benchmarks/cuda_check.py.

A driver takes a `Gpu`, runs one kernel on outputs poisoned with NaN, and returns NumPy arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.numpy_reference import mamba1_spec, mamba2_spec
from slimba.formats import FORMATS, LowRank, Matrix, MatrixLayout, Plane, Segment
from slimba.models.spec import ModelSpec

STORE, ADD = 0, 1

SPECS: dict[str, ModelSpec] = {
    "plain": mamba2_spec(),
    "two-groups": mamba2_spec(n_groups=2, headdim=32, d_state=64, proj_bias=True),
    "four-groups": mamba2_spec(n_groups=4, headdim=16, d_state=128, norm_group_size=32, conv_bias=False),
    "headdim-64": mamba2_spec(headdim=64, d_state=128, d_inner=256, tie_embeddings=False),
    "odd": mamba2_spec(d_model=37, d_inner=72, headdim=12, d_state=7, n_groups=3, d_conv=3, vocab_size=41),
    "norm-first": mamba2_spec(norm_before_gate=True, norm_group_size=64, dt_limit=(0.02, 0.1), d_has_hdim=True),
    "no-norm": mamba2_spec(gated_norm=False),
    "wide-state": mamba2_spec(d_state=200),
    "mamba1": mamba1_spec(),
    "falcon": mamba1_spec(bcdt_norm_eps=1e-6, proj_bias=True, d_inner=75, d_state=40, conv_bias=False, d_conv=5),
}

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
    "int4-shared": MatrixLayout(1030, (Segment(1113, "int4"),)),
    "float16": MatrixLayout(131, (Segment(19, "float16"),)),
    "all": MatrixLayout(
        201,
        tuple(Segment(n, f) for n, f in zip((21, 3, 5, 4, 2, 6), FORMATS, strict=True)),
        LowRank(3, 10, 40),
        col_scale=True,
    ),
}


def product(gpu: Any, matrix: Matrix, x: np.ndarray, activations: str = "float32") -> np.ndarray:
    """slimba_product on float32 x [B, cols], B <= 8, without a norm: [B, rows]."""
    import torch

    from slimba.runtime.backends.cuda_weights import DeviceMatrix, fields_of

    m = DeviceMatrix(matrix, gpu.device, gpu.blocks, activations=activations)
    batch, tokens = len(x), 1 if len(x) == 1 else 8
    given = torch.from_numpy(x).to(gpu.device)
    out = torch.full((batch, m.rows), float("nan"), device=gpu.device)
    fields = fields_of(
        m.fields,
        [given.data_ptr(), m.cols, 0, 0, 0, 0, 0],
        [STORE, out.data_ptr(), m.rows, *[0] * 7],
        [0] * 5,
        batch,
        0,
    )
    gpu.launch(f"slimba_product_{tokens}", (min(gpu.blocks, m.items),), fields, m.shared_bytes(tokens))
    gpu.synchronize()
    return np.asarray(out.cpu().numpy())


EXPAND_LAYOUTS: dict[str, MatrixLayout] = LAYOUTS | {  # blocks of 64 rows inside and outside a plane, and partly
    "blocks": MatrixLayout(
        520, (Segment(64, "sign"), Segment(128, "sign"), Segment(9, "int8")), plane=Plane(173, 64, 192)
    ),
    "blocks-cut": MatrixLayout(264, (Segment(150, "sign"), Segment(70, "sign")), plane=Plane(264, 50, 210)),
    "blocks-all": MatrixLayout(2048, (Segment(100, "sign"),), plane=Plane(683, 0, 100)),
}

TURNED_LAYOUTS: dict[str, MatrixLayout] = {  # inputs transformed, and with int8 activations rounded
    "turned-int4": MatrixLayout(512, (Segment(19, "int4"),), hadamard=512),
    "turned-int8": MatrixLayout(1032, (Segment(40, "int8"),), hadamard=8),
    "turned-long": MatrixLayout(4608, (Segment(17, "int4"), Segment(3, "int8")), hadamard=512, col_scale=True),
    "turned-static": MatrixLayout(768, (Segment(21, "int4"),), hadamard=256, input_scale=True),
    "static": MatrixLayout(77, (Segment(21, "int8"),), input_scale=True),
    "turned-all": MatrixLayout(
        224, (Segment(9, "int4"), Segment(40, "sign"), Segment(7, "int8")), LowRank(16, 9, 49), col_scale=True,
        plane=Plane(96, 20, 40), hadamard=32,
    ),
}  # fmt: skip


def what_enters(matrix: Matrix, x: np.ndarray, activations: str) -> np.ndarray:
    """The input that `Matrix.matmul` wants, to compute what an engine does with x."""
    import torch

    from slimba.runtime.backends.reference import InputRounding

    if activations == "float32" or not matrix.layout.takes_int8:
        return x
    rounding = InputRounding(matrix.layout, matrix.arrays, "cpu")
    return np.asarray(rounding(None, (torch.from_numpy(x),)).numpy())


def turned(gpu: Any, matrix: Matrix, x: np.ndarray, activations: str, exact: bool) -> np.ndarray:
    """slimba_turn on float32 x [T, cols]; exact: in float32, else in float16: the same shape."""
    import torch

    from slimba.runtime.backends.cuda_weights import WARPS, DeviceMatrix, fields_of

    m = DeviceMatrix(matrix, gpu.device, gpu.blocks, activations=activations)
    given = torch.from_numpy(x).to(gpu.device, torch.float32 if exact else torch.float16, copy=True)
    fields = fields_of(given.data_ptr(), m.cols, m.cols, m.hadamard, m.rounding, m.input_step, m.col_scale)
    gpu.launch(f"slimba_turn_{'float' if exact else 'half'}", (len(x),), fields, 4 * (m.cols + WARPS))
    gpu.synchronize()
    return np.asarray(given.float().cpu().numpy())


CODES_LAYOUTS: dict[str, MatrixLayout] = {
    "codes-512": MatrixLayout(512, (Segment(50, "int4"),)),
    "codes-768": MatrixLayout(768, (Segment(50, "int4"),), hadamard=256),
    "codes-768b": MatrixLayout(768, (Segment(41, "int8"),), input_scale=True),
    "codes-1024": MatrixLayout(1024, (Segment(37, "int4"),), hadamard=256),
    "codes-1536": MatrixLayout(1536, (Segment(21, "int8"),), hadamard=512),
    "codes-2048": MatrixLayout(2048, (Segment(100, "int4"),), hadamard=2048, input_scale=True),
    "codes-2560": MatrixLayout(2560, (Segment(31, "int8"),), hadamard=512, input_scale=True),
    "codes-4096": MatrixLayout(4096, (Segment(70, "int8"),), hadamard=4096),
    "codes-5120": MatrixLayout(5120, (Segment(33, "int4"),), hadamard=1024),
    "codes-pieces": MatrixLayout(5120, (Segment(100, "int4"),), hadamard=1024),
    "codes-pieces8": MatrixLayout(4608, (Segment(90, "int8"),), hadamard=512),
    "codes-loop": MatrixLayout(2048, (Segment(1500, "int8"),)),
    "codes-loop4": MatrixLayout(1024, (Segment(1003, "int4"),), hadamard=1024),
}


def _of_one_vector(
    gpu: Any, m: Any, shape: Any, x: np.ndarray, norm: np.ndarray | None, plane_inverse: int
) -> np.ndarray:
    """The baked kernel `shape` of matrix m on float32 x [cols], added to ones that are taken off again: [rows]."""
    import torch

    from slimba.runtime.backends.cuda_bake import Baked
    from slimba.runtime.backends.cuda_weights import fields_of

    given, out = torch.from_numpy(x).to(gpu.device), torch.ones(m.rows, device=gpu.device)
    weight = torch.from_numpy(norm).to(gpu.device) if norm is not None else None
    source = [given.data_ptr(), m.cols, 0, 0, weight.data_ptr() if weight is not None else 0, int(norm is not None), 0]
    fields = fields_of(m.fields, source, [ADD, out.data_ptr(), m.rows, *[0] * 7], [0] * 5, 1, plane_inverse)
    baked = Baked()
    name = baked.product(fields, 1, shape)
    module = gpu.module("decode", baked.source)
    gpu.launch(name, (gpu.blocks,), fields, shape.shared_bytes, threads=shape.threads, module=module)
    gpu.synchronize()
    return np.asarray(out.cpu().numpy()) - 1


def codes_product(
    gpu: Any,
    matrix: Matrix,
    x: np.ndarray,
    norm: np.ndarray | None = None,
    activations: str = "float32",
    staged: bool = False,
) -> np.ndarray:
    """The kernel of codes.cuh on float32 x [cols], with the weights of an RMS norm (eps 0) or without: [rows]."""
    from slimba.runtime.backends.cuda_codes import codes_of
    from slimba.runtime.backends.cuda_weights import DeviceMatrix

    m = DeviceMatrix(matrix, gpu.device, gpu.blocks, activations=activations)
    codes = codes_of(m, gpu.blocks, 1, False)
    if staged and codes is not None:
        codes = codes.staged_codes
    assert codes is not None
    return _of_one_vector(gpu, m, codes, x, norm, 0)


STREAM_LAYOUTS: dict[str, MatrixLayout] = {
    "stream-half": MatrixLayout(512, (Segment(50, "float16"),)),
    "stream-half-wide": MatrixLayout(1280, (Segment(37, "float16"),)),
    "stream-half-loop": MatrixLayout(512, (Segment(900, "float16"),)),
    "stream-bfloat": MatrixLayout(768, (Segment(45, "bfloat16"),)),
    "stream-int8": MatrixLayout(512, (Segment(41, "int8"),)),
    "stream-int8-loop": MatrixLayout(512, (Segment(803, "int8"),)),
    "stream-int8-turned": MatrixLayout(1536, (Segment(50, "int8"),), hadamard=512),
    "stream-int8-static": MatrixLayout(1024, (Segment(50, "int8"),), hadamard=1024, input_scale=True),
}


def stream_product(
    gpu: Any,
    matrix: Matrix,
    x: np.ndarray,
    norm: np.ndarray | None = None,
    activations: str = "float32",
    change: Any = lambda s: s,
    bias: np.ndarray | None = None,
) -> np.ndarray:
    """The kernel of stream.cuh on float32 x [cols], its shape changed by `change`, normed with weights (eps 0) or not:
    [rows]."""
    from slimba.runtime.backends.cuda_stream import stream_of
    from slimba.runtime.backends.cuda_weights import DeviceMatrix

    m = DeviceMatrix(matrix, gpu.device, gpu.blocks, bias, activations=activations)
    stream = stream_of(m, gpu.blocks, 1, False)
    assert stream is not None
    return _of_one_vector(gpu, m, change(stream), x, norm, 0)


def few_product(gpu: Any, matrix: Matrix, x: np.ndarray) -> np.ndarray:
    """The kernel of few.cu on float32 x [B, cols]: [B, rows]."""
    return _of_many(gpu, matrix, x, "slimba_few")


LEAN_LAYOUTS: dict[str, MatrixLayout] = {
    "lean-512": MatrixLayout(512, (Segment(16, "sign"),), col_scale=True),
    "lean-1024": MatrixLayout(
        1024, (Segment(9, "int8"), Segment(27, "sign")), LowRank(16, 12, 30), plane=Plane(300, 20, 35)
    ),
    "lean-2048": MatrixLayout(2048, (Segment(100, "sign"), Segment(10, "int8")), LowRank(10, 0, 100)),
    "lean-2560": MatrixLayout(2560, (Segment(31, "sign"), Segment(5, "sign")), plane=Plane(2560, 0, 36)),
    "lean-4096": MatrixLayout(4096, (Segment(33, "sign"),), LowRank(16, 0, 33), plane=Plane(1000, 1, 30)),
}


DOT_LAYOUTS: dict[str, MatrixLayout] = {
    "dot-2048": MatrixLayout(2048, (Segment(100, "sign"), Segment(10, "int8")), LowRank(10, 0, 100)),
    "dot-2048-plane": MatrixLayout(
        2048,
        (Segment(9, "int8"), Segment(27, "sign"), Segment(70, "sign")),
        LowRank(16, 12, 60),
        plane=Plane(683, 20, 61),
    ),
    "dot-2048-few": MatrixLayout(2048, (Segment(33, "sign"),), plane=Plane(200, 1, 30), col_scale=True),
    "dot-4096": MatrixLayout(4096, (Segment(33, "sign"),), LowRank(16, 0, 33), plane=Plane(1365, 1, 30)),
    "dot-4096-plain": MatrixLayout(4096, (Segment(48, "sign"), Segment(3, "int8"))),
}


def lean_product(
    gpu: Any, matrix: Matrix, x: np.ndarray, norm: np.ndarray | None = None, dot: bool = False
) -> np.ndarray:
    """The kernel of lean.cuh or dot.cuh on float32 x [cols], normed with weights (eps 0) or not: [rows]."""
    from slimba.runtime.backends.cuda_lean import dot_of, lean_of
    from slimba.runtime.backends.cuda_weights import DeviceMatrix

    m = DeviceMatrix(matrix, gpu.device, gpu.blocks)
    lean = dot_of(m, gpu.blocks, 1, False) if dot else lean_of(m, gpu.blocks, 1, False, fewest=1)
    assert lean is not None
    return _of_one_vector(gpu, m, lean, x, norm, m.plane_inverse)


def still_product(gpu: Any, matrix: Matrix, x: np.ndarray) -> np.ndarray:
    """The kernel of still.cu on float32 x [B, cols]: [B, rows]."""
    return _of_many(gpu, matrix, x, "slimba_still")


def _of_many(gpu: Any, matrix: Matrix, x: np.ndarray, kind: str) -> np.ndarray:
    """The baked kernel of this kind on float32 x [B, cols]: [B, rows]."""
    import torch

    from slimba.runtime.backends.cuda_bake import Baked
    from slimba.runtime.backends.cuda_batch import Recorder
    from slimba.runtime.backends.cuda_mid import Mid
    from slimba.runtime.backends.cuda_weights import DeviceMatrix

    m, recorder = DeviceMatrix(matrix, gpu.device, gpu.blocks), Recorder(gpu)
    given = torch.from_numpy(x).to(gpu.device)
    out = torch.full((len(x), m.rows), float("nan"), device=gpu.device)
    mid: Any = Mid(recorder, len(x), [m], bakes=True)  # type: ignore[arg-type]
    mid.norm(m, [given.data_ptr(), m.cols, 0, 0, 0, 0, 0], 0)
    mid.product(m, [STORE, out.data_ptr(), m.rows, *[0] * 7], [0] * 5)
    baked = Baked()
    names = [baked.of_many(a[0], a[2]) for a, _ in recorder.launches]
    assert names[1] and names[1].startswith(kind)
    module = gpu.module("many", baked.source)
    for name, (arguments, settings) in zip(names, recorder.launches, strict=True):
        gpu.launch(name, *arguments[1:], **settings, module=module)
    gpu.synchronize()
    return np.asarray(out.cpu().numpy())


def mid_product(gpu: Any, matrix: Matrix, x: np.ndarray, parts: int = 1, activations: str = "float32") -> np.ndarray:
    """slimba_mid_norm and slimba_mid on float32 x [B, cols] without a norm: [B, rows]."""
    import torch

    from slimba.runtime.backends.cuda_mid import Mid
    from slimba.runtime.backends.cuda_weights import DeviceMatrix

    m = DeviceMatrix(matrix, gpu.device, gpu.blocks, activations=activations)
    given = torch.from_numpy(x).to(gpu.device)
    out = torch.full((parts, len(x), m.rows), float("nan"), device=gpu.device)
    mid = Mid(gpu, len(x), [m])
    mid.norm(m, [given.data_ptr(), m.cols, 0, 0, 0, 0, 0], 0)
    mid.product(m, [STORE, out.data_ptr(), m.rows, *[0] * 7], [0] * 5, parts, len(x) * m.rows)
    gpu.synchronize()
    return np.asarray(out.sum(0).cpu().numpy())


def expanded(gpu: Any, matrix: Matrix, exact: bool, first: int = 0) -> np.ndarray:
    """slimba_expand: rows from `first` on as float32."""
    import torch

    from slimba.runtime.backends.cuda_weights import DeviceMatrix, fields_of

    m = DeviceMatrix(matrix, gpu.device, gpu.blocks)
    rows = m.rows - first
    out = torch.full((rows, m.cols), float("nan"), dtype=torch.float32 if exact else torch.float16, device=gpu.device)
    fields = fields_of(m.fields, first, rows, out.data_ptr(), m.cols, m.plane_inverse)
    name = "slimba_expand_float" if exact else "slimba_expand_half" if m.rank else "slimba_expand_plain"
    gpu.launch(name, (-(-m.cols // 256), -(-rows // 64)), fields, m.rank * (1024 if exact else 768))
    gpu.synchronize()
    return np.asarray(out.float().cpu().numpy())
