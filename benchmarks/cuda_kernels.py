"""Single CUDA kernels on the GPU against their NumPy twins, at odd sizes and on poisoned outputs: for cuda_check.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kernels.cuda_cases import (
    CODES_LAYOUTS,
    DOT_LAYOUTS,
    EXPAND_LAYOUTS,
    LAYOUTS,
    LEAN_LAYOUTS,
    STREAM_LAYOUTS,
    TURNED_LAYOUTS,
    codes_product,
    expanded,
    few_product,
    lean_product,
    mid_product,
    product,
    still_product,
    stream_product,
    turned,
    what_enters,
)
from runtime.numpy_reference import random_matrix
from slimba.formats import Matrix, MatrixLayout
from slimba.runtime.backends.cuda_device import Gpu

FEW_LAYOUTS = ("sign-odd", "rank-40", "plane", "int4")  # of LAYOUTS, where all would take long


def close(got: np.ndarray, want: np.ndarray, atol: float) -> float:
    """Largest difference; an error that names the first bad place when it exceeds atol or is not finite."""
    difference = np.abs(got.astype(np.float64) - want)
    worst = float(difference.max())
    if not worst <= atol:
        bad = np.argwhere(~(difference <= atol))
        at = tuple(int(i) for i in bad[0])
        raise AssertionError(
            f"off by {worst:.3g} (allowed {atol:.3g}) at {len(bad)} of {got.size}; first at {at}: "
            f"{got[at]:.6g} for {want[at]:.6g}; rows {sorted({int(i) for i in bad[:, 0]})[:12]}"
        )
    return worst


def mid_products(gpu: Gpu, few: bool = False) -> str:
    worst = 0.0
    for name, layout in LAYOUTS.items():
        if any("float" in s.format for s in layout.segments) or (few and name not in FEW_LAYOUTS):
            continue
        for batch in (3, 16, 37):
            rng = np.random.default_rng(len(name) + batch)
            matrix = random_matrix(rng, layout)
            x = rng.standard_normal((batch, layout.cols)).astype(np.float16).astype(np.float32)
            try:
                got = mid_product(gpu, matrix, x, 2 if layout.cols > 512 else 1)
                worst = max(worst, close(got, matrix.matmul(x), 1.5e-2))
            except AssertionError as e:
                raise AssertionError(f"{name}, batch {batch}: {e}") from None
    return f"largest difference {worst:.2g}"


def lean_products(gpu: Gpu) -> str:
    worst = 0.0
    for name in ("lean-1024", "lean-4096"):
        rng = np.random.default_rng(len(name))
        matrix = random_matrix(rng, LEAN_LAYOUTS[name])
        x = rng.standard_normal(matrix.layout.cols).astype(np.float32)
        try:
            worst = max(worst, close(lean_product(gpu, matrix, x)[None], matrix.matmul(x[None]), 5e-5))
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from None
    return f"largest difference {worst:.2g}"


def dot_products(gpu: Gpu) -> str:
    """dot.cuh on one vector, still.cu on some."""
    worst = [0.0, 0.0]
    for name, layout in DOT_LAYOUTS.items():
        rng = np.random.default_rng(len(name))
        matrix = random_matrix(rng, layout)
        x = rng.standard_normal((21, layout.cols)).astype(np.float16).astype(np.float32)
        want = matrix.matmul(x)
        try:
            got = lean_product(gpu, matrix, x[0], dot=True)[None]
            worst[0] = max(worst[0], close(got, want[:1], 5e-5))
            for batch in (3, 21):
                worst[1] = max(worst[1], close(still_product(gpu, matrix, x[:batch]), want[:batch], 1.5e-2))
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from None
    return f"largest difference {worst[0]:.2g} for one vector, {worst[1]:.2g} for some"


def products(gpu: Gpu, few: bool = False) -> str:
    worst = 0.0
    for name, layout in LAYOUTS.items():
        if few and name not in (*FEW_LAYOUTS, "all"):
            continue
        for batch in (1, 3, 8):
            rng = np.random.default_rng(len(name) + batch)
            matrix = random_matrix(rng, layout)
            x = rng.standard_normal((batch, layout.cols)).astype(np.float32)
            try:
                worst = max(worst, close(product(gpu, matrix, x), matrix.matmul(x), 5e-5))
            except AssertionError as e:
                raise AssertionError(f"{name}, batch {batch}: {e}") from None
    return f"largest difference {worst:.2g}"


def expansions(gpu: Gpu) -> str:
    worst = 0.0
    for name, layout in EXPAND_LAYOUTS.items():
        matrix = random_matrix(np.random.default_rng(5), layout)
        for exact in (True, False):
            try:
                worst = max(worst, close(expanded(gpu, matrix, exact), matrix.dequantize(), 1e-6 if exact else 1e-3))
            except AssertionError as e:
                raise AssertionError(f"{name}, exact {exact}: {e}") from None
    return f"largest difference {worst:.2g}"


def codes_products(gpu: Gpu) -> str:
    """codes.cuh on one vector, its weights in registers and in shared memory, inputs as they are and rounded."""
    worst = {"float32": 0.0, "int8": 0.0}
    for name in ("codes-768", "codes-1536", "codes-2048", "codes-loop4"):
        for activations in worst:
            for staged in (False, True):
                run = lambda m, x, n, a=activations, s=staged: codes_product(gpu, m, x, n, a, s)  # noqa: E731
                found = _one_normed(name, CODES_LAYOUTS[name], activations, run)
                worst[activations] = max(worst[activations], found)
    return f"largest difference {worst['float32']:.2g}, with int8 activations {worst['int8']:.2g}"


def stream_products(gpu: Gpu) -> str:
    """stream.cuh on one vector."""
    worst = {"float32": 0.0, "int8": 0.0}
    for name, activations in (
        ("stream-half", "float32"),
        ("stream-bfloat", "float32"),
        ("stream-int8", "float32"),
        ("stream-int8-turned", "int8"),
    ):
        run = lambda m, x, n, a=activations: stream_product(gpu, m, x, n, a)  # noqa: E731
        worst[activations] = max(worst[activations], _one_normed(name, STREAM_LAYOUTS[name], activations, run))
    return f"largest difference {worst['float32']:.2g}, with int8 activations {worst['int8']:.2g}"


def _one_normed(
    name: str,
    layout: MatrixLayout,
    activations: str,
    run: Callable[[Matrix, np.ndarray, np.ndarray], np.ndarray],
) -> float:
    """Largest difference of the products of a normed vector. With int8 activations a code may flip where sums differ in
    the last bit, so few may differ much and most must not."""
    rng = np.random.default_rng(len(name))
    matrix = random_matrix(rng, layout)
    x = rng.standard_normal(layout.cols).astype(np.float32) * 3
    norm = rng.uniform(0.5, 1.5, layout.cols).astype(np.float32)
    entering = (x / np.sqrt((x * x).mean()) * norm)[None].astype(np.float32)
    want = matrix.matmul(what_enters(matrix, entering, activations))[0]
    got = run(matrix, x, norm)
    rounds = activations == "int8" and layout.takes_int8
    try:
        assert np.median(np.abs(got - want)) < (2e-2 if rounds else 2e-5), "most products are off"
        return close(got[None], want[None], 0.3 if rounds else 1e-4)
    except AssertionError as e:
        raise AssertionError(f"{name}, {activations} activations: {e}") from None


def few_products(gpu: Gpu) -> str:
    """few.cu on two to eight vectors, in float16."""
    worst = 0.0
    for name in ("stream-half", "stream-int8-turned"):
        for batch in (3, 8):
            rng = np.random.default_rng(len(name) + batch)
            matrix = random_matrix(rng, STREAM_LAYOUTS[name])
            x = rng.standard_normal((batch, matrix.layout.cols)).astype(np.float16).astype(np.float32)
            worst = max(worst, close(few_product(gpu, matrix, x), matrix.matmul(x), 2e-2))
    return f"largest difference {worst:.2g}"


def turns(gpu: Gpu) -> str:
    """turn.cu: with the stored matrix without its transform, what it leaves makes the same products."""
    worst = 0.0
    for name, layout in TURNED_LAYOUTS.items():
        for activations in ("float32", "int8"):
            for exact in (True, False):
                rng = np.random.default_rng(len(name))
                matrix = random_matrix(rng, layout)
                x = rng.standard_normal((5, layout.cols)).astype(np.float16).astype(np.float32)
                rounds = activations == "int8"
                left = turned(gpu, matrix, x, activations, exact)
                given = what_enters(matrix, x, activations)
                try:
                    worst = max(worst, close(_bare(matrix).matmul(left), matrix.matmul(given), 0.3 if rounds else 2e-2))
                except AssertionError as e:
                    raise AssertionError(f"{name}, {activations} activations, exact {exact}: {e}") from None
    return f"largest difference {worst:.2g}"


def _bare(matrix: Matrix) -> Matrix:
    """The stored matrix without the transform of its inputs."""
    fields = {name: getattr(matrix.layout, name) for name in matrix.layout.__dataclass_fields__}
    return Matrix(MatrixLayout(**{**fields, "hadamard": 0}), matrix.arrays)
