"""Which products of one vector take kernels/cuda/codes.cuh, and with what shape of blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slimba.runtime.backends.cuda_weights import FORMAT_CODES, DeviceMatrix

__all__ = ["Codes", "codes_of"]

COLUMNS, TILE = 256, 16  # columns of a warp, rows of a tile in kernels/cuda/codes.cuh
REGISTERS = {"int4": 18, "int8": 32}  # of a lane for a tile's codes and scales
OTHER_REGISTERS = 72  # of a lane for all else
ALL_REGISTERS, MOST_REGISTERS = 65536, 255  # of a multiprocessor, of a thread
MOST_GROUPS = 24  # warps of a block


@dataclass(frozen=True, slots=True)
class Codes:
    """Arguments of the template `codes`: format, groups of columns, a warp each, tiles of a block at a time, groups of
    a block of the transform, kind of rounding, and whether a block has more tiles than that."""

    format: str
    groups: int
    tiles: int
    turned: int
    rounding: int
    loop: bool

    resident = 1  # blocks for which a multiprocessor should have registers

    @property
    def threads(self) -> int:
        return 32 * self.groups

    @property
    def name(self) -> str:
        format = FORMAT_CODES[self.format]
        return f"codes<{format}, {self.groups}, {self.tiles}, {self.turned}, {self.rounding}, {int(self.loop)}>"

    @property
    def shared_bytes(self) -> int:
        """CodesShared."""
        slices = (1 if self.rounding else 3) * (272 if self.format == "int4" else 320)
        return self.groups * (4 * 256 + slices + 2 * self.tiles * TILE * 4 + 3 * 4)


def codes_of(m: DeviceMatrix, blocks: int, norm_groups: int, gated: bool) -> Codes | None:
    """The kernel for a matrix, its input normed in `norm_groups` parts and perhaps gated after that; None where it must
    be the kernel for any shape."""
    formats = [s.format for s in m.layout.segments]
    if formats not in (["int4"], ["int8"]) or m.rank or m.layout.plane or m.col_scale or norm_groups > 1 or gated:
        return None
    groups, turned = m.cols // COLUMNS, m.hadamard // COLUMNS
    if m.cols % COLUMNS or m.cols != m.kpad or groups > MOST_GROUPS or (m.hadamard and not turned):
        return None
    each = min(MOST_REGISTERS, ALL_REGISTERS // (32 * groups)) - OTHER_REGISTERS
    most, tiles = each // REGISTERS[formats[0]], math.ceil(math.ceil(m.rows / TILE) / blocks)
    loop = tiles > most
    if loop:
        most //= 2  # those that are multiplied and those that come
        if most < 1:
            return None
        tiles = math.ceil(tiles / math.ceil(tiles / most))
    if tiles * TILE > 32 * groups:
        return None
    return Codes(formats[0], groups, tiles, turned, m.rounding, loop)
