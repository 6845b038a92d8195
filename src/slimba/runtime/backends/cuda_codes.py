"""Which products of one vector take kernels/cuda/codes.cuh, and with what shape of blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from slimba.runtime.backends.cuda_stream import Stream, stream_of
from slimba.runtime.backends.cuda_weights import FORMAT_CODES, DeviceMatrix

__all__ = ["Codes", "codes_of", "streamed_of"]

COLUMNS, TILE = 256, 16  # of a piece, of a tile of rows in kernels/cuda/codes.cuh
PIECE_ROOM = 320  # floats in which a piece is transformed
PIECES = 1, 2  # of a warp
REGISTERS = {"int4": 18, "int8": 32}  # of a lane for the codes and scales of a tile and piece
SLOT_BYTES = {"int4": 64, "int8": 128}  # of a lane for the same codes in shared memory
OTHER_REGISTERS, MORE_REGISTERS = 72, 24  # of a lane for all else, and for each piece more
ALL_REGISTERS, MOST_REGISTERS = 65536, 255  # of a multiprocessor, of a thread
MOST_WARPS = 24  # of a block


@dataclass(frozen=True, slots=True)
class Codes:
    """Arguments of the template `codes`: format, warps, groups of columns of each, tiles of a block at a time, groups
    of a block of the transform, kind of rounding, whether a block has more tiles than that, and whether codes wait in
    shared memory instead of registers."""

    format: str
    warps: int
    pieces: int
    tiles: int
    turned: int
    rounding: int
    loop: bool
    staged: bool = False

    resident = 1  # blocks for which a multiprocessor should have registers

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def name(self) -> str:
        format = FORMAT_CODES[self.format]
        numbers = self.warps, self.pieces, self.tiles, self.turned, self.rounding, int(self.loop), int(self.staged)
        return f"codes<{format}, {', '.join(map(str, numbers))}>"

    @property
    def staged_codes(self) -> Codes | None:
        """The same with its codes in shared memory; None where a block has more than it holds at a time."""
        return None if self.loop else replace(self, staged=True)

    @property
    def shared_bytes(self) -> int:
        """CodesShared."""
        slices = (1 if self.rounding else 3) * (272 if self.format == "int4" else 320)
        parts = 2 * self.tiles * TILE * (self.warps | 1) + 3 * self.warps
        known = self.warps * self.pieces * (4 * PIECE_ROOM + slices) + 4 * parts
        if not self.staged:
            return known
        return -(-known // 16) * 16 + self.threads * self.pieces * self.tiles * SLOT_BYTES[self.format]


def codes_of(m: DeviceMatrix, blocks: int, norm_groups: int, gated: bool) -> Codes | None:
    """The kernel for a matrix, its input normed in `norm_groups` parts and perhaps gated after that; None where it must
    be the kernel for any shape."""
    formats = [s.format for s in m.layout.segments]
    if formats not in (["int4"], ["int8"]) or m.rank or m.layout.plane or m.col_scale or norm_groups > 1 or gated:
        return None
    groups, turned = m.cols // COLUMNS, m.hadamard // COLUMNS
    if m.cols % COLUMNS or (m.hadamard and not turned):
        return None
    tiles = math.ceil(math.ceil(m.rows / TILE) / blocks)
    found = [shape_of(formats[0], groups, pieces, tiles) for pieces in PIECES if groups % pieces == 0]
    fitting = [shape for shape in found if shape is not None]
    if not fitting:
        return None
    warps, pieces, at_once = min(
        fitting, key=lambda shape: shape[2] < tiles
    )  # the first that need not loop, or the first
    return Codes(formats[0], warps, pieces, at_once, turned, m.rounding, at_once < tiles)


def shape_of(format: str, groups: int, pieces: int, tiles: int) -> tuple[int, int, int] | None:
    """Warps, groups of each, and tiles at a time of a block with so many tiles; None where registers are short."""
    warps = groups // pieces
    if warps > MOST_WARPS:
        return None
    registers = min(MOST_REGISTERS, ALL_REGISTERS // (32 * warps)) - OTHER_REGISTERS - MORE_REGISTERS * (pieces - 1)
    most = registers // (REGISTERS[format] * pieces)
    if tiles > most:
        most //= 2  # those that are multiplied and those that come
        if most < 1:
            return None
        tiles = math.ceil(tiles / math.ceil(tiles / most))
    return (warps, pieces, tiles) if tiles * TILE <= 32 * warps else None


def streamed_of(m: DeviceMatrix, blocks: int, groups: int, gated: bool, streams: bool = True) -> Codes | Stream | None:
    """The kernel of codes.cuh or stream.cuh for a matrix and one vector."""
    stream = stream_of(m, blocks, groups, gated) if streams else None
    return stream if m.has_float else codes_of(m, blocks, groups, gated) or stream
