"""Single CUDA kernels on the GPU against their NumPy twins, at odd sizes and on poisoned outputs: for cuda_check.py."""

from __future__ import annotations

import numpy as np

from kernels.cuda_cases import (
    DOT_LAYOUTS,
    EXPAND_LAYOUTS,
    LAYOUTS,
    LEAN_LAYOUTS,
    expanded,
    lean_product,
    mid_product,
    product,
    still_product,
)
from runtime.numpy_reference import random_matrix
from slimba.runtime.backends.cuda_device import open_gpu


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


def mid_products() -> str:
    gpu, worst = open_gpu(), 0.0
    for name, layout in LAYOUTS.items():
        if any("float" in s.format for s in layout.segments):
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


def lean_products() -> str:
    worst = 0.0
    for name in ("lean-1024", "lean-4096"):
        rng = np.random.default_rng(len(name))
        matrix = random_matrix(rng, LEAN_LAYOUTS[name])
        x = rng.standard_normal(matrix.layout.cols).astype(np.float32)
        try:
            worst = max(worst, close(lean_product(open_gpu(), matrix, x)[None], matrix.matmul(x[None]), 5e-5))
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from None
    return f"largest difference {worst:.2g}"


def dot_products() -> str:
    """dot.cuh on one vector, still.cu on some."""
    worst = [0.0, 0.0]
    for name, layout in DOT_LAYOUTS.items():
        rng = np.random.default_rng(len(name))
        matrix = random_matrix(rng, layout)
        x = rng.standard_normal((21, layout.cols)).astype(np.float16).astype(np.float32)
        want = matrix.matmul(x)
        try:
            got = lean_product(open_gpu(), matrix, x[0], dot=True)[None]
            worst[0] = max(worst[0], close(got, want[:1], 5e-5))
            for batch in (3, 21):
                worst[1] = max(worst[1], close(still_product(open_gpu(), matrix, x[:batch]), want[:batch], 1.5e-2))
        except AssertionError as e:
            raise AssertionError(f"{name}: {e}") from None
    return f"largest difference {worst[0]:.2g} for one vector, {worst[1]:.2g} for some"


def products() -> str:
    gpu, worst = open_gpu(), 0.0
    for name, layout in LAYOUTS.items():
        for batch in (1, 3, 8):
            rng = np.random.default_rng(len(name) + batch)
            matrix = random_matrix(rng, layout)
            x = rng.standard_normal((batch, layout.cols)).astype(np.float32)
            try:
                worst = max(worst, close(product(gpu, matrix, x), matrix.matmul(x), 5e-5))
            except AssertionError as e:
                raise AssertionError(f"{name}, batch {batch}: {e}") from None
    return f"largest difference {worst:.2g}"


def expansions() -> str:
    gpu, worst = open_gpu(), 0.0
    for name, layout in EXPAND_LAYOUTS.items():
        matrix = random_matrix(np.random.default_rng(5), layout)
        for exact in (True, False):
            try:
                worst = max(worst, close(expanded(gpu, matrix, exact), matrix.dequantize(), 1e-6 if exact else 1e-3))
            except AssertionError as e:
                raise AssertionError(f"{name}, exact {exact}: {e}") from None
    return f"largest difference {worst:.2g}"
