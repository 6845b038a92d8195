"""Which products with rows of float16, bfloat16 or int8 take kernels/cuda/stream.cuh (one vector) or few.cu (two to
eight), and with what shape of blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slimba.runtime.backends.cuda_weights import FORMAT_CODES, DeviceMatrix

__all__ = ["MOST_FEW", "Stream", "few_of", "stream_of"]

COLUMNS, SLIM = 256, 8  # columns of a warp, rows of a tile in kernels/cuda/ring.cuh
STEPS = {"float16": 8, "bfloat16": 8, "int8": 4}  # 16-byte loads of a lane for a tile
MOST_TILES = 16  # of a round
PIECES = 16  # loads of a lane in the loop's body
MOST_GROUPS = 24  # warps of a block
MOST_FEW = 8  # vectors of few.cu
RING_REGISTERS = 64  # of a lane for what is on its way: 16 loads
OTHER_REGISTERS, ALL_REGISTERS = 56, 65536  # of a lane for all else; of a multiprocessor


@dataclass(frozen=True, slots=True)
class Stream:
    """Arguments of the templates `stream` and `few`: format, groups of 256 columns, a warp each, tiles of a round and
    of those that are multiplied side by side, loads of a lane on their way, whether a block has more tiles than a
    round; for one vector, groups of a block of the transform and the kind of rounding."""

    format: str
    groups: int
    tiles: int
    group: int
    depth: int
    loop: bool
    turned: int = 0
    rounding: int = 0

    resident = 1  # blocks for which a multiprocessor should have registers

    @property
    def threads(self) -> int:
        return 32 * self.groups

    @property
    def name(self) -> str:
        numbers = FORMAT_CODES[self.format], self.groups, self.tiles, self.group, self.depth, self.turned, self.rounding
        return f"stream<{', '.join(map(str, numbers))}, {int(self.loop)}>"

    @property
    def shared_bytes(self) -> int:
        """StreamShared."""
        codes = self.format == "int8"
        slices = 1 if self.rounding else 3
        own = self.groups * (1280 + 320 * slices) + 1536 if codes else 1280 + 320 * slices + self.groups * 1536
        return own + self.groups * (2 * self.tiles * SLIM * 4 + 12)

    @property
    def few_numbers(self) -> tuple[int, ...]:
        return FORMAT_CODES[self.format], self.groups, self.tiles, self.group, self.depth, int(self.loop)

    @property
    def few_bytes(self) -> int:
        """FewShared."""
        vectors = self.groups * (16 if self.format == "bfloat16" else 8) * 576
        return vectors + (2 if self.loop else 1) * self.groups * self.tiles * SLIM * 32 + 64


def stream_of(m: DeviceMatrix, blocks: int, norm_groups: int, gated: bool) -> Stream | None:
    """The kernel of stream.cuh for a matrix, its input normed in `norm_groups` parts and perhaps gated after that; None
    where it does not take it."""
    turned = m.hadamard // COLUMNS
    if norm_groups > 1 or gated or (m.hadamard and not turned):
        return None
    if m.turns and m.layout.segments[0].format != "int8":
        return None
    return _shape(m, blocks, turned, m.rounding)


def few_of(m: DeviceMatrix, blocks: int) -> Stream | None:
    """The kernel of few.cu for a matrix; None where it does not take it."""
    return _shape(m, blocks, 0, 0)


def _shape(m: DeviceMatrix, blocks: int, turned: int, rounding: int) -> Stream | None:
    formats, groups = [s.format for s in m.layout.segments], m.cols // COLUMNS
    if len(formats) != 1 or formats[0] not in STEPS or m.rank or m.layout.plane or m.col_scale:
        return None
    if m.cols % COLUMNS or not 1 <= groups <= MOST_GROUPS or (turned and groups % turned):
        return None
    steps = STEPS[formats[0]]
    deepest = min(RING_REGISTERS, ALL_REGISTERS // (32 * groups) - OTHER_REGISTERS) // 4
    tiles, most = math.ceil(math.ceil(m.rows / SLIM) / blocks), min(MOST_TILES, 4 * groups)  # a thread finishes a row
    loop = tiles > most
    if loop:
        tiles = math.ceil(tiles / math.ceil(tiles / most))
    group = min(PIECES // steps, 1 << (tiles - 1).bit_length(), most)
    tiles = math.ceil(tiles / group) * group
    depth = max(d for d in (1, 2, 4, 8, 16) if d <= min(deepest, group * steps))
    return Stream(formats[0], groups, tiles, group, depth, loop, turned, rounding)
