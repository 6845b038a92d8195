"""Which products of one vector take kernels/cuda/lean.cuh, and with what shape of blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slimba.runtime.backends.cuda_weights import DeviceMatrix

__all__ = ["Lean", "lean_of"]

COLUMNS, TILE, RANK = 256, 16, 16  # columns of a warp, rows of a tile, ranks of a correction in kernels/cuda/lean.cuh
MOST_TILES, MOST_ROWS = 4, 4  # of a warp: their weights are in registers before the input is there
FEWEST_GROUPS = 9  # with fewer warps the kernel for any shape was faster (docs/log.md)


@dataclass(frozen=True, slots=True)
class Lean:
    """Arguments of the template `lean`: groups of columns, a warp each, tiles and int8 rows of a block, groups of
    columns of the second plane, whether there is a low-rank correction."""

    groups: int
    tiles: int
    rows: int
    plane: int
    rank: int

    template, order = "lean", "InOrder"
    blocks_at_once = 2

    @property
    def threads(self) -> int:
        return 32 * self.groups

    @property
    def arguments(self) -> str:
        return f"{self.groups}, {self.tiles}, {self.rows}, {self.plane}, {self.rank}"

    @property
    def shared_bytes(self) -> int:
        """LeanShared."""
        g, planes, slices = self.groups, max(1, self.plane), 960
        lowrank = 8 * 512 if self.rank else 16
        plane = self.tiles * self.plane * 256 if self.plane else 256
        rows, sums = max(1, self.rows) * g * 16, self.tiles * g * 256
        return g * lowrank + (g + planes) * slices + sums + plane + rows + g * (256 + 16 + 64 + 8) + planes * 16


def lean_of(m: DeviceMatrix, blocks: int, norm_groups: int, gated: bool, fewest: int = FEWEST_GROUPS) -> Lean | None:
    """The kernel for a matrix, its input normed in `norm_groups` parts and perhaps gated after that; None where it must
    be the kernel for any shape. fewest: groups of columns from which it is taken."""
    formats = {s.format for s in m.layout.segments}
    if m.turns or m.cols % COLUMNS or m.cols != m.kpad or not formats <= {"sign", "int8"} or norm_groups > 1 or gated:
        return None
    groups = m.cols // COLUMNS
    if m.rank not in (0, RANK) or not fewest <= groups <= 32:
        return None
    signs = sum(math.ceil(s.rows / TILE) for s in m.layout.segments if s.format == "sign")
    rows = sum(s.rows for s in m.layout.segments if s.format == "int8")
    lean = Lean(groups, math.ceil(signs / blocks), math.ceil(rows / blocks), m.plane_kpad // COLUMNS, int(m.rank > 0))
    finished = 4 * (lean.tiles * TILE + lean.rows)
    if not 1 <= lean.tiles <= MOST_TILES or lean.rows > MOST_ROWS or finished > lean.threads:
        return None
    return lean
