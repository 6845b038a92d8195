"""int4 in groups of 128 columns with one float16 scale a group: w[r, c] = scale[r, c // 128] * (nibble - 8).

scale = float16(max|group| / 7), codes rounded half to even against the rounded scale and kept in -7..7 (-8 is never
written). The low nibble of a byte is the even column. The last group of a row may be short; rows are padded with
nibble 8 (zero) to a whole byte. 4.125 bits a weight at whole groups.
"""

from __future__ import annotations

import numpy as np

from slimba.formats.int8 import SMALLEST_SCALE

__all__ = ["GROUP", "Int4Format", "quantize_groups"]

GROUP = 128


def quantize_groups(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [rows, cols] -> (int8 codes in -7..7 [rows, cols], float16 scales [rows, ceil(cols / 128)])."""
    rows, cols = w.shape
    groups = -(-cols // GROUP)
    padded = np.zeros((rows, groups * GROUP), np.float32)
    padded[:, :cols] = w
    grouped = padded.reshape(rows, groups, GROUP)
    scale = np.maximum((np.abs(grouped).max(axis=2) / np.float32(7.0)).astype(np.float16), SMALLEST_SCALE)
    codes = np.clip(np.rint(grouped / scale.astype(np.float32)[:, :, None]), -7, 7)
    return codes.astype(np.int8).reshape(rows, -1)[:, :cols], scale


class Int4Format:
    def parts(self, rows: int, cols: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"packed": ("uint8", (rows, -(-cols // 2))), "scale": ("float16", (rows, -(-cols // GROUP)))}

    def pack(self, w: np.ndarray) -> dict[str, np.ndarray]:
        codes, scale = quantize_groups(w)
        nibbles = np.full((w.shape[0], w.shape[1] + w.shape[1] % 2), 8, np.uint8)
        nibbles[:, : w.shape[1]] = codes + 8
        return {"packed": nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), "scale": scale}

    def unpack(self, parts: dict[str, np.ndarray], cols: int) -> np.ndarray:
        packed = parts["packed"]
        codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.float32)
        codes[:, 0::2] = packed & 15
        codes[:, 1::2] = packed >> 4
        scale = np.repeat(parts["scale"].astype(np.float32), GROUP, axis=1)[:, :cols]
        w: np.ndarray = (codes[:, :cols] - np.float32(8)) * scale
        return w

    def matmul(self, parts: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        y: np.ndarray = x @ self.unpack(parts, x.shape[-1]).T
        return y
