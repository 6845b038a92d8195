"""Which products of one vector take kernels/cuda/dot.cuh or lean.cuh, and with what shape of blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slimba.runtime.backends.cuda_weights import DeviceMatrix

__all__ = ["Dot", "Lean", "dot_of", "lean_of", "share_of"]

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

    @property
    def threads(self) -> int:
        return 32 * self.groups

    resident = 2

    @property
    def name(self) -> str:
        return f"lean<{self.groups}, {self.tiles}, {self.rows}, {self.plane}, {self.rank}>"

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


DOT_WARPS = {
    2048: 8,
    4096: 16,
}  # of a block of kernels/cuda/dot.cuh, by the columns of a matrix: the faster of 8 and 16
DOT_TILES, DOT_ROWS = 5, 5  # of a block, likewise in registers; int8 rows of a block


@dataclass(frozen=True, slots=True)
class Dot:
    """Arguments of the templates `dot` and `still`: warps, words of 32 columns of a lane, tiles and int8 rows of a
    block, words of the second plane of a warp, which tiles may have the plane; and whether there is a correction."""

    warps: int
    words: int
    tiles: int
    rows: int
    plane: int
    with_plane: int
    rank: int
    blocks: int

    resident = 2  # blocks for which a multiprocessor should have registers

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.warps, self.words, self.tiles, self.rows, self.plane, self.with_plane

    @property
    def name(self) -> str:
        return f"dot<{', '.join(map(str, self.numbers))}, {self.blocks}, {self.rank}>"

    @property
    def shared_bytes(self) -> int:
        """DotShared."""
        w, tile = self.warps, 8 * TILE
        inputs = w * 4 * (160 * self.words + 4)
        main, plane = w * 16 * (32 * self.words + 2), (w if self.plane else 1) * 16 * (8 * self.plane + 2)
        parts = w * self.tiles * tile, w * self.tiles * tile if self.plane else 8, (w if self.rank else 1) * tile
        return inputs + main + plane + sum(parts) + w * TILE * 4 + w * 32 + 16

    def still_bytes(self, eights: int) -> int:
        """StillShared."""
        return 8 * self.warps * (self.tiles * TILE * (8 * eights + 2) + max(1, self.rows) * 8 * eights)


def share_of(m: DeviceMatrix, blocks: int) -> tuple[int, int, int]:
    """Tiles of signs and int8 rows of a block, and, a bit each, which of the tiles may have the second plane."""
    starts: list[int] = []  # rows of the matrix with which its tiles begin
    first = 0
    for s in m.layout.segments:
        starts += range(first, first + s.rows, TILE) if s.format == "sign" else []
        first += s.rows
    rows = sum(s.rows for s in m.layout.segments if s.format == "int8")
    p = m.layout.plane
    at = {i // blocks for i, row in enumerate(starts) if p and row + TILE > p.start and row < p.stop}
    return math.ceil(len(starts) / blocks), math.ceil(rows / blocks), sum(1 << i for i in at)


def dot_of(m: DeviceMatrix, blocks: int, norm_groups: int, gated: bool) -> Dot | None:
    """The kernel of dot.cuh for a matrix, its input as in `lean_of`; None where it does not take it."""
    formats = {s.format for s in m.layout.segments}
    if m.turns or m.cols not in DOT_WARPS or not formats <= {"sign", "int8"} or norm_groups > 1 or gated:
        return None
    warps = DOT_WARPS[m.cols]
    plane = m.plane_kpad // (32 * warps)
    if m.rank not in (0, RANK) or not m.plane_by_groups or plane > 8:
        return None
    tiles, rows, planes = share_of(m, blocks)
    dot = Dot(warps, m.cols // (128 * warps), tiles, rows, plane, planes, int(m.rank > 0), blocks)
    if not 1 <= dot.tiles <= DOT_TILES or dot.rows > DOT_ROWS or 2 * (dot.tiles * TILE + dot.rows) > dot.threads:
        return None
    return dot
