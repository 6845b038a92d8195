"""Rung 2 of the correctness ladder: every weight format packs and unpacks exactly and multiplies as its matrix does.

The bit and nibble orders are tested against bytes written out by hand: they are a contract with every engine.
Run: `pytest tests/formats`.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from slimba.errors import UserError
from slimba.formats import FORMATS, LowRank, Matrix, MatrixLayout, Plane, Segment
from slimba.formats.floats import DTYPES
from slimba.formats.hadamard import block_of
from slimba.formats.int4 import quantize_groups
from slimba.formats.int8 import SMALLEST_SCALE, quantize_rows
from slimba.formats.sign import pack_signs, row_bytes, unpack_signs

SHAPES = [(1, 1), (3, 7), (5, 64), (4, 65), (2, 128), (3, 129), (7, 200), (1, 383)]


def weights(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def layouts(cols: int) -> list[MatrixLayout]:
    """One layout of each kind for 11 rows."""
    mixed = (Segment(6, "sign"), Segment(3, "int8"), Segment(2, "sign"))
    every = (Segment(2, "sign"), Segment(2, "int8"), Segment(2, "int4"), Segment(2, "float16"), Segment(3, "bfloat16"))
    return [
        *(MatrixLayout.plain(11, cols, f) for f in FORMATS),
        MatrixLayout(cols, mixed),
        MatrixLayout(cols, (Segment(11, "sign"),), LowRank(3, 0, 11)),
        MatrixLayout(cols, mixed, LowRank(2, 1, 9), col_scale=True),
        MatrixLayout(cols, every, LowRank(1, 10, 11)),
        MatrixLayout(cols, (Segment(11, "float32"),), LowRank(2, 0, 4)),
        MatrixLayout(cols, mixed, LowRank(2, 1, 9), col_scale=True, plane=Plane(max(1, cols // 3), 2, 11)),
        MatrixLayout(cols, (Segment(11, "sign"),), plane=Plane(cols, 0, 11)),
        MatrixLayout(cols, (Segment(11, "int4"),), activations="float32"),
        *(
            MatrixLayout(cols, mixed, col_scale=True, hadamard=block_of(cols), input_scale=True)
            for _ in range(cols % 2 == 0)
        ),
    ]


def build(layout: MatrixLayout, seed: int = 0) -> Matrix:
    """Random numbers in `layout`."""
    rng = np.random.default_rng(seed)
    lr = layout.lowrank
    factors = None
    if lr:
        factors = weights(lr.stop - lr.start, lr.rank, seed + 1), weights(lr.rank, layout.cols, seed + 2)
    bare = MatrixLayout(layout.cols, layout.segments, lr)
    matrix = Matrix.quantize(weights(layout.rows, layout.cols, seed), bare, factors)
    arrays = dict(matrix.arrays)
    if p := layout.plane:
        n = p.stop - p.start
        arrays["plane_packed"] = pack_signs(weights(n, p.cols, seed + 3))
        arrays["plane_scale"] = rng.uniform(0.5, 2.0, n).astype(np.float16)
        if p.cols < layout.cols:
            arrays["plane_index"] = np.sort(rng.permutation(layout.cols)[: p.cols]).astype(np.int32)
    if layout.col_scale:
        arrays["col_scale"] = rng.uniform(0.5, 2.0, layout.cols).astype(np.float16)
    if layout.input_scale:
        arrays["input_scale"] = np.full(1, 0.05, np.float32)
    return Matrix(layout, arrays)


# ------------------------------------------------------------------ signs


def test_sign_bits_by_hand() -> None:
    """Bit i of byte j is column 8j + i, 1 means +1, sign(0) = +1 (negative zero too), padding bits are 0."""
    w = np.full((2, 67), -1.0, np.float32)
    w[0, 0] = w[0, 3] = w[0, 9] = w[0, 66] = 1.0
    w[1, 7] = 0.0
    w[1, 8] = -0.0
    packed = pack_signs(w)
    assert packed.shape == (2, 16) and packed.dtype == np.uint8
    assert packed[0].tolist() == [0b00001001, 0b00000010, 0, 0, 0, 0, 0, 0, 0b00000100, 0, 0, 0, 0, 0, 0, 0]
    assert packed[1].tolist() == [0b10000000, 0b00000001] + [0] * 14


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_signs_round_trip(rows: int, cols: int) -> None:
    w = weights(rows, cols)
    packed = pack_signs(w)
    assert packed.shape[1] == row_bytes(cols) and packed.shape[1] % 8 == 0
    assert np.array_equal(unpack_signs(packed, cols), np.where(w >= 0, 1.0, -1.0))
    assert np.array_equal(pack_signs(unpack_signs(packed, cols)), packed)
    assert int(np.unpackbits(packed).sum()) == int((w >= 0).sum()), "padding bits are 0"


def test_sign_scale_is_the_mean_magnitude() -> None:
    w = np.array([[1.0, -3.0, 2.0], [0.0, 0.0, 0.0]], np.float32)
    parts = FORMATS["sign"].pack(w)
    assert parts["scale"].tolist() == [2.0, 0.0]
    assert FORMATS["sign"].unpack(parts, 3).tolist() == [[2, -2, 2], [0, 0, 0]]


# ------------------------------------------------------------------ int8


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_int8_codes_round_trip(rows: int, cols: int) -> None:
    codes, scale = quantize_rows(weights(rows, cols))
    assert np.abs(codes.astype(int)).max(axis=1).min() >= 126, "each row uses its range"
    again, same = quantize_rows(codes.astype(np.float32) * scale.astype(np.float32)[:, None])
    full = np.abs(codes.astype(int)).max(axis=1) == 127  # only then is the scale found again
    assert np.array_equal(again[full], codes[full]) and np.array_equal(same[full], scale[full])


def test_int8_error_is_half_a_step() -> None:
    w = weights(20, 300)
    parts = FORMATS["int8"].pack(w)
    step = parts["scale"].astype(np.float32)[:, None]
    clipped = np.abs(parts["weight"].astype(int)) == 127  # float16 may round the scale down
    error = np.abs(FORMATS["int8"].unpack(parts, 300) - w) / step
    assert error[~clipped].max() <= 0.5 + 1e-4
    assert error.max() <= 0.6


def test_int8_rounds_half_to_even_and_never_uses_minus_128() -> None:
    w = np.array([[127.0, 0.5, 1.5, -2.5, -127.0]], np.float32)
    assert quantize_rows(w)[0].tolist() == [[127, 0, 2, -2, -127]]
    assert quantize_rows(-weights(50, 500))[0].min() == -127


def test_zero_rows_and_tiny_rows_stay_finite() -> None:
    w = np.zeros((3, 130), np.float32)
    w[1] = 1e-7
    w[2, 0] = -1e-30
    for name in FORMATS:
        back = FORMATS[name].unpack(FORMATS[name].pack(w), 130)
        assert np.isfinite(back).all() and np.abs(back).max() < 1e-6
        assert not back[0].any(), name
    assert quantize_rows(w)[1][0] == SMALLEST_SCALE


# ------------------------------------------------------------------ int4


def test_int4_nibbles_by_hand() -> None:
    """The low nibble is the even column, value = nibble - 8; an odd last column is padded with nibble 8."""
    w = np.array([[7.0, -7.0, 0.0, 3.0, -1.0]], np.float32)
    parts = FORMATS["int4"].pack(w)
    assert parts["scale"].tolist() == [[1.0]]
    assert parts["packed"].tolist() == [[0x1F, 0xB8, 0x87]]
    assert FORMATS["int4"].unpack(parts, 5).tolist() == w.tolist()


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_int4_codes_round_trip(rows: int, cols: int) -> None:
    w = weights(rows, cols)
    w[:, ::128] = 9.0  # every group reaches its largest code, so its scale is found again
    codes, scale = quantize_groups(w)
    assert codes.min() >= -7 and codes.max() == 7
    assert scale.shape == (rows, -(-cols // 128))
    parts = FORMATS["int4"].pack(w)
    back = FORMATS["int4"].unpack(parts, cols)
    wide = np.repeat(scale.astype(np.float32), 128, axis=1)[:, :cols]
    assert np.array_equal(back, codes.astype(np.float32) * wide)
    again = FORMATS["int4"].pack(back)
    assert np.array_equal(again["packed"], parts["packed"]) and np.array_equal(again["scale"], parts["scale"])


def test_int4_groups_have_their_own_scale() -> None:
    w = np.ones((1, 300), np.float32)
    w[:, 128:256] = 100.0
    w[:, 256:] = 0.01
    assert np.allclose(FORMATS["int4"].unpack(FORMATS["int4"].pack(w), 300), w, rtol=1e-3)


# ------------------------------------------------------------------ floats


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_floats_round_trip(name: str) -> None:
    w = weights(5, 33).astype(DTYPES[name]).astype(np.float32)
    assert np.array_equal(FORMATS[name].unpack(FORMATS[name].pack(w), 33), w)


# ------------------------------------------------------------------ whole matrices


@pytest.mark.parametrize("cols", [1, 7, 64, 129, 200])
def test_matmul_is_that_of_the_dequantised_matrix(cols: int) -> None:
    x = weights(6, cols, seed=9).reshape(2, 3, cols)
    for layout in layouts(cols):
        m = build(layout)
        w = m.dequantize()
        assert w.shape == (11, cols) and w.dtype == np.float32
        expected = x.astype(np.float64) @ w.T.astype(np.float64)
        y = m.matmul(x)
        assert y.shape == (2, 3, 11)
        np.testing.assert_allclose(y, expected, atol=1e-5 * max(1.0, np.abs(expected).max()), err_msg=layout.describe())


def test_dequantised_matrix_by_its_definition() -> None:
    """W = (segments stacked; rows start..stop += A B) * col_scale, from the raw parts."""
    layout = MatrixLayout(70, (Segment(6, "sign"), Segment(3, "int8"), Segment(2, "sign")), LowRank(2, 1, 9), True)
    m = build(layout)
    a = m.arrays
    w = np.zeros((11, 70), np.float32)
    w[:6] = unpack_signs(a["0.packed"], 70) * a["0.scale"].astype(np.float32)[:, None]
    w[6:9] = a["1.weight"].astype(np.float32) * a["1.scale"].astype(np.float32)[:, None]
    w[9:] = unpack_signs(a["2.packed"], 70) * a["2.scale"].astype(np.float32)[:, None]
    left = a["lowrank_a"].astype(np.float32) * a["lowrank_a_scale"].astype(np.float32)[:, None]
    right = a["lowrank_b"].astype(np.float32) * a["lowrank_b_scale"].astype(np.float32)[:, None]
    w[1:9] += left @ right
    assert np.array_equal(m.dequantize(), w * a["col_scale"].astype(np.float32))


def test_a_second_plane_by_its_definition() -> None:
    layout = MatrixLayout(70, (Segment(6, "sign"), Segment(3, "int8")), plane=Plane(20, 1, 6))
    m = build(layout)
    a = m.arrays
    w = Matrix(MatrixLayout(70, layout.segments), a).dequantize()
    second = unpack_signs(a["plane_packed"], 20) * a["plane_scale"].astype(np.float32)[:, None]
    for k, column in enumerate(a["plane_index"]):
        w[1:6, column] += second[:, k]
    assert np.array_equal(m.dequantize(), w)


@pytest.mark.parametrize("index", [[0, 2, 2], [2, 1, 3], [-1, 0, 1], [3, 5, 8]])
def test_a_damaged_plane_index_is_refused(index: list[int]) -> None:
    m = build(MatrixLayout(8, (Segment(4, "sign"),), plane=Plane(3, 0, 4)))
    m.arrays["plane_index"] = np.asarray(index, np.int32)
    with pytest.raises(UserError, match="plane_index"):
        m.dequantize()


@pytest.mark.parametrize("cols", [1, 7, 64, 129])
def test_tensors_and_bytes_are_those_of_the_arrays(cols: int) -> None:
    for layout in layouts(cols):
        arrays = {f"m.{key}": a for key, a in build(layout).arrays.items()}
        assert {k: (a.dtype, a.shape) for k, a in arrays.items()} == {
            k: (DTYPES[dtype], shape) for k, (dtype, shape) in layout.tensors("m").items()
        }
        assert layout.nbytes == sum(a.nbytes for a in arrays.values())


def test_bytes_of_the_published_in_proj() -> None:
    """Mamba-2 1.3B, every row a sign, rank 16 int8: df-ssm.md, section 9."""
    layout = MatrixLayout(2048, (Segment(8512, "sign"),), LowRank(16, 0, 8512))
    signs, scales = 8512 * 2048 // 8, 8512 * 2
    assert layout.nbytes == signs + scales + (8512 * 16 + 8512 * 2) + (16 * 2048 + 16 * 2)


@pytest.mark.parametrize("name", list(FORMATS))
def test_rows_at_are_rows_of_the_dequantised_matrix(name: str) -> None:
    m = build(MatrixLayout.plain(11, 65, name))
    ids = np.array([3, 0, 10, 3])
    assert np.array_equal(m.rows_at(ids), m.dequantize()[ids])


def test_the_arrays_are_not_changed_by_use() -> None:
    for layout in layouts(65):
        m = build(layout)
        before = {k: a.copy() for k, a in m.arrays.items()}
        m.dequantize()
        x = weights(2, 65)
        kept = x.copy()
        m.matmul(x)
        assert np.array_equal(x, kept)
        assert all(np.array_equal(a, m.arrays[k]) for k, a in before.items())


# ------------------------------------------------------------------ layouts as JSON, and bad ones


def test_layouts_survive_json() -> None:
    for layout in layouts(129):
        assert MatrixLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_descriptions() -> None:
    assert MatrixLayout.plain(4, 8, "float16").describe() == "float16"
    layout = MatrixLayout(8, (Segment(4, "sign"), Segment(2, "int8")), LowRank(16, 0, 4), True)
    assert layout.describe() == "sign:4 int8:2 +r16 *col"
    assert MatrixLayout(8, (Segment(4, "sign"),), plane=Plane(5, 1, 4)).describe() == "sign +plane:3x5"


SIGNS = {"cols": 8, "segments": [{"rows": 4, "format": "sign"}]}


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"cols": 8, "segments": [{"rows": 4, "format": "ternary"}]}, "ternary"),
        ({"cols": 8, "segments": [{"rows": 0, "format": "sign"}]}, "0 rows"),
        (SIGNS | {"bits": 1}, "bits"),
        ({"cols": 8, "segments": [{"rows": 4}]}, "format"),
        ({"segments": [{"rows": 4, "format": "sign"}]}, "cols"),
        ({"cols": "wide", "segments": [{"rows": 4, "format": "sign"}]}, "wide"),
        ({"cols": 8, "segments": 3}, "malformed"),
        (
            {"cols": 8, "segments": [{"rows": 4, "format": "sign"}], "lowrank": {"rank": 0, "start": 0, "stop": 4}},
            "rank 0",
        ),
        (
            {"cols": 8, "segments": [{"rows": 4, "format": "sign"}], "lowrank": {"rank": 1, "start": 2, "stop": 5}},
            "2..5",
        ),
        (
            {"cols": 8, "segments": [{"rows": 4, "format": "sign"}], "lowrank": {"rank": 1, "start": 3, "stop": 3}},
            "3..3",
        ),
        (SIGNS | {"lowrank": {"rank": 1}}, "start"),
        (SIGNS | {"plane": {"cols": 9, "start": 0, "stop": 4}}, "9 columns"),
        (SIGNS | {"plane": {"cols": 8, "start": 0, "stop": 5}}, "0..5"),
        (SIGNS | {"plane": {"start": 0, "stop": 4}}, "cols"),
    ],
)
def test_bad_layouts_are_refused_by_name(data: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as e:
        MatrixLayout.from_json(data)
    assert named in str(e.value)


def test_a_matrix_that_does_not_fit_is_refused() -> None:
    w = weights(4, 8)
    with pytest.raises(UserError, match=r"\(4, 8\)"):
        Matrix.quantize(w, MatrixLayout.plain(4, 9, "sign"))
    scaled = Matrix.quantize(w, MatrixLayout(8, (Segment(4, "sign"),), None, True))
    assert (scaled.arrays["col_scale"] == 1).all(), "round-to-nearest chooses no column scale"
    with pytest.raises(UserError, match="factors"):
        Matrix.quantize(w, MatrixLayout(8, (Segment(4, "sign"),), LowRank(1, 0, 4)))
