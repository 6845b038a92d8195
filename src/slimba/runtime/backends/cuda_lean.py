"""Which products of one vector take kernels/cuda/lean.cuh, and with what shape of blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slimba.runtime.backends.cuda_weights import DeviceMatrix

__all__ = ["Lean", "lean_of"]

COLUMNS, TILE, RANK = 256, 16, 16  # columns of a warp, rows of a tile, ranks of a correction in kernels/cuda/lean.cuh
MOST_TILES, MOST_ROWS = 4, 4  # of a warp: their weights are in registers before the input is there


@dataclass(frozen=True, slots=True)
class Lean:
    """Arguments of the template `lean`: groups of columns, warps that share one, tiles and int8 rows of a warp, groups
    of columns of the second plane, whether there is a low-rank correction."""

    groups: int
    share: int
    tiles: int
    rows: int
    plane: int
    rank: int

    @property
    def threads(self) -> int:
        return 32 * self.groups * self.share

    @property
    def arguments(self) -> str:
        return f"{self.groups}, {self.share}, {self.tiles}, {self.rows}, {self.plane}, {self.rank}"

    @property
    def shared_bytes(self) -> int:
        """LeanShared."""
        warps, tiles, rows = self.groups * self.share, self.tiles * self.share, self.rows * self.share
        lowrank = 8 // self.share * 512 if self.rank else 16
        slices, plane = 960, tiles * self.plane * 256 if self.plane else 256
        return (
            warps * lowrank + (warps + max(1, self.plane)) * slices + tiles * self.groups * 256 + plane
            + max(1, rows) * self.groups * 16 + warps * 256 + self.groups * 16 + max(1, self.plane) * 16 + warps * 64
            + self.groups * 8
        )  # fmt: skip


def lean_of(m: DeviceMatrix, blocks: int, norm_groups: int, gated: bool) -> Lean | None:
    """The kernel for a matrix, its input normed in `norm_groups` parts and perhaps gated after that; None where it must
    be the kernel for any shape."""
    formats = {s.format for s in m.layout.segments}
    if m.cols % COLUMNS or m.cols != m.kpad or not formats <= {"sign", "int8"} or norm_groups > 1 or gated:
        return None
    if m.rank not in (0, RANK):
        return None
    groups = m.cols // COLUMNS
    share = 2 if groups <= 8 else 1
    signs = sum(math.ceil(s.rows / TILE) for s in m.layout.segments if s.format == "sign")
    rows = sum(s.rows for s in m.layout.segments if s.format == "int8")
    of_warp = [math.ceil(math.ceil(n / blocks) / share) for n in (signs, rows)]
    lean = Lean(groups, share, of_warp[0], of_warp[1], m.plane_kpad // COLUMNS, int(m.rank > 0))
    finished = 4 * (lean.tiles * share * TILE + lean.rows * share)
    if groups > 32 or not 1 <= lean.tiles <= MOST_TILES or lean.rows > MOST_ROWS or finished > lean.threads:
        return None
    return lean if lean.plane <= groups * share else None
