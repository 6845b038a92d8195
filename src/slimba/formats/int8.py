"""int8 with one float16 scale per row: w[r, c] = scale[r] * weight[r, c].

scale = float16(max|row| / 127), never below float16's smallest number; the codes are rounded half to even against the
*rounded* scale and kept in -127..127. `methods/fake_quant.py` has the torch twin, equal bit for bit.
"""

from __future__ import annotations

import numpy as np

__all__ = ["Int8Format", "quantize_rows"]

SMALLEST_SCALE = np.float16(2.0**-24)


def quantize_rows(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [rows, cols] -> (int8 [rows, cols], float16 [rows])."""
    w = w.astype(np.float32)
    scale = np.maximum((np.abs(w).max(axis=1) / np.float32(127.0)).astype(np.float16), SMALLEST_SCALE)
    codes = np.clip(np.rint(w / scale.astype(np.float32)[:, None]), -127, 127)
    return codes.astype(np.int8), scale


class Int8Format:
    def parts(self, rows: int, cols: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"weight": ("int8", (rows, cols)), "scale": ("float16", (rows,))}

    def pack(self, w: np.ndarray) -> dict[str, np.ndarray]:
        codes, scale = quantize_rows(w)
        return {"weight": codes, "scale": scale}

    def unpack(self, parts: dict[str, np.ndarray], cols: int) -> np.ndarray:
        return parts["weight"].astype(np.float32) * parts["scale"].astype(np.float32)[:, None]

    def matmul(self, parts: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        return (x @ parts["weight"].astype(np.float32).T) * parts["scale"].astype(np.float32)
