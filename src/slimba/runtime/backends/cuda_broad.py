"""Products of packed matrices with eight to hundreds of vectors by warpgroups (kernels/cuda/broad.cu): launches.

    broad = Broad(gpu, batch=128, matrices=[...])     # where gpu.warpgroups, and Broad.fits of each
    broad.norm(m, source)                             # vectors into the image that m wants
    broad.product(m, output, state)                   # output: fields of the struct Output

All may be recorded in a CUDA graph. Run the tests: `pytest tests/kernels/test_cuda_broad.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from slimba.runtime.backends.cuda_device import Gpu
from slimba.runtime.backends.cuda_weights import WARPS, DeviceMatrix, fields_of, up_to

__all__ = ["Broad", "Shape"]

UNIT, DEPTH, GROUP, TILE = 256, 3, 128, 64  # of kernels/cuda/broad.cu; rows of a tile
CODES_TILE = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """Arguments of the template `broad`: vectors of a block, tiles, warpgroups among which the columns of a tile are
    divided; and among how many blocks."""

    vectors: int
    tiles: int
    split: int
    parts: int = 1

    @property
    def threads(self) -> int:
        return GROUP * self.tiles * self.split

    @property
    def shared_bytes(self) -> int:
        return 1024 + DEPTH * (self.split * UNIT * 2 * self.vectors + 16) + 12 * self.vectors


# By how many vectors at most, for matrices with many tiles and for those with few: the fastest of docs/log.md
MANY_TILES = {
    8: Shape(8, 1, 4), 16: Shape(16, 1, 4), 32: Shape(32, 1, 4), 128: Shape(64, 2, 2), 1 << 30: Shape(128, 4, 1),
}  # fmt: skip
FEW_TILES = {
    8: Shape(8, 1, 4, 4), 16: Shape(16, 1, 4, 4), 32: Shape(32, 1, 4, 4), 128: Shape(64, 2, 2, 4),
    1 << 30: Shape(128, 2, 1, 2),
}  # fmt: skip


class Broad:
    """Images and launches for the products of `batch` vectors with any of `matrices`."""

    MANY: ClassVar[dict[int, Shape]] = MANY_TILES
    FEW: ClassVar[dict[int, Shape]] = FEW_TILES

    def __init__(self, gpu: Gpu, batch: int, matrices: Sequence[DeviceMatrix]) -> None:
        self._gpu, self._batch = gpu, batch
        self._padded = up_to(batch, max(self.shape(m).vectors for m in matrices))
        half = {"dtype": torch.float16, "device": gpu.device}
        sizes = max(m.kpad for m in matrices), max(m.plane_kpad for m in matrices) or 8
        self._x, self._x2 = (torch.zeros(n, self._padded, **half) for n in sizes)  # type: ignore[call-overload]

    @property
    def images(self) -> list[int]:
        """Pointers of both, of x and of the second plane's columns."""
        return [self._x.data_ptr(), self._x2.data_ptr()]

    @property
    def padded(self) -> int:
        return self._padded

    @staticmethod
    def fits(m: DeviceMatrix) -> bool:
        """Whether the kernels take this matrix: signs and int8 rows, perhaps with a second plane, nothing else."""
        formats = {s.format for s in m.layout.segments}
        return formats <= {"sign", "int8"} and "sign" in formats and not m.rank and not m.turns

    def shape(self, m: DeviceMatrix) -> Shape:
        tiles = sum(-(-s.rows // TILE) for s in m.layout.segments if s.format == "sign")
        table = self.MANY if 2 * tiles > self._gpu.blocks else self.FEW
        return next(shape for most, shape in table.items() if self._batch <= most)

    def norm(self, m: DeviceMatrix, source: Sequence[int], parts: Sequence[int] = (0, 0, 0, 0)) -> None:
        """source: fields of the struct Input, its norm in one group; parts: residual, pointer, stride and number (up to
        4) of what is added to the source before."""
        fields = fields_of(m.fields, list(source), list(parts), self._x.data_ptr(), self._x2.data_ptr(), self._padded)
        self._gpu.launch("slimba_broad_norm", (self._batch,), fields, 4 * (m.kpad + WARPS), overlap=True)

    def product(
        self,
        m: DeviceMatrix,
        output: Sequence[int],
        state: Sequence[int],
        part_stride: int = 0,
        squares: Sequence[int] = (0, 0, 0),
    ) -> None:
        """The product with the vectors that `norm` left, for the same matrix; shape(m).parts results,
        `part_stride` numbers apart. squares: pointer, number and eps of the sums that steps.cu left with its images."""
        shape = self.shape(m)

        def fields(parts: int) -> list[int]:
            images = self._x.data_ptr(), self._x2.data_ptr(), self._padded
            return [*m.fields, *output, *state, self._batch, *images, parts, part_stride, *squares]

        codes = sum(-(-s.rows // CODES_TILE) for s in m.layout.segments if s.format == "int8")
        if codes:
            eights = 1 if self._batch <= 8 else 2 if self._batch <= 64 else 4
            grid = codes, -(-self._batch // (8 * eights))
            shared = 4 * WARPS * 8 * eights * (CODES_TILE + 1)
            self._gpu.launch(f"slimba_broad_codes_{eights}", grid, fields_of(fields(1)), shared, overlap=True)
        tiles = sum(-(-s.rows // TILE) for s in m.layout.segments if s.format == "sign")
        grid3 = -(-tiles // shape.tiles), -(-self._batch // shape.vectors), shape.parts
        name = f"slimba_broad_{shape.vectors}_{shape.tiles}_{shape.split}"
        self._gpu.launch(
            name, grid3, fields_of(fields(shape.parts)), shape.shared_bytes, threads=shape.threads, overlap=True
        )
