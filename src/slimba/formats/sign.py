"""One bit a weight with one float16 scale per row: w[r, c] = scale[r] * (+1 if bit else -1).

Bit i of byte j in a row is column 8j+i; 1 means +1; sign(0) = +1; rows are padded with 0 bits to a multiple of 64
columns. A column scale lives in the norm before the matrix (or in the layout's `col_scale`), not here.
"""

from __future__ import annotations

import numpy as np

__all__ = ["SignFormat", "pack_signs", "row_bytes", "unpack_signs"]


def row_bytes(cols: int) -> int:
    """Bytes of one packed row: 8 for every 64 columns begun."""
    return -(-cols // 64) * 8


def pack_signs(w: np.ndarray) -> np.ndarray:
    """[rows, cols] -> uint8 [rows, row_bytes(cols)]; NaN has no sign and must not come here."""
    bits = np.zeros((w.shape[0], row_bytes(w.shape[1]) * 8), np.uint8)
    bits[:, : w.shape[1]] = w >= 0
    return np.packbits(bits, axis=1, bitorder="little")


def unpack_signs(packed: np.ndarray, cols: int) -> np.ndarray:
    """uint8 [rows, row_bytes(cols)] -> float32 +-1 [rows, cols]."""
    bits = np.unpackbits(packed, axis=1, bitorder="little", count=cols)
    return bits.astype(np.float32) * 2 - 1


class SignFormat:
    def parts(self, rows: int, cols: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"packed": ("uint8", (rows, row_bytes(cols))), "scale": ("float16", (rows,))}

    def pack(self, w: np.ndarray) -> dict[str, np.ndarray]:
        """Signs of w with the least-squares row scale mean|w| (methods that train their scale build the parts)."""
        return {"packed": pack_signs(w), "scale": np.abs(w.astype(np.float32)).mean(axis=1).astype(np.float16)}

    def unpack(self, parts: dict[str, np.ndarray], cols: int) -> np.ndarray:
        return unpack_signs(parts["packed"], cols) * parts["scale"].astype(np.float32)[:, None]

    def matmul(self, parts: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        """Sum over set bits: sum(+-x) = 2 * sum(x where bit) - sum(x)."""
        bits = np.unpackbits(parts["packed"], axis=1, bitorder="little", count=x.shape[-1]).astype(np.float32)
        y: np.ndarray = (2 * (x @ bits.T) - x.sum(axis=-1, keepdims=True)) * parts["scale"].astype(np.float32)
        return y
