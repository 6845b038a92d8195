"""Plain float storage: float32, float16, bfloat16. One part, `weight` [rows, cols]."""

from __future__ import annotations

import ml_dtypes
import numpy as np

__all__ = ["DTYPES", "FloatFormat"]

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "int32": np.dtype(np.int32),
}


class FloatFormat:
    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def parts(self, rows: int, cols: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"weight": (self.dtype, (rows, cols))}

    def pack(self, w: np.ndarray) -> dict[str, np.ndarray]:
        return {"weight": w.astype(DTYPES[self.dtype])}

    def unpack(self, parts: dict[str, np.ndarray], cols: int) -> np.ndarray:
        return parts["weight"].astype(np.float32)

    def matmul(self, parts: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        return x @ parts["weight"].astype(np.float32).T
