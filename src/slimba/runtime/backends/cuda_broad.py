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
CODES_TILE, NORM_COLUMNS = 16, 2048  # of kernels/cuda/broad_norm.cu; columns of rows of codes that its norm takes


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
    8: Shape(8, 1, 4), 16: Shape(16, 1, 4), 32: Shape(32, 1, 4), 128: Shape(64, 2, 2), 256: Shape(64, 4, 1),
    1 << 30: Shape(128, 4, 1),
}  # fmt: skip
FEW_TILES = {
    8: Shape(8, 1, 4, 4), 16: Shape(16, 1, 4, 4), 32: Shape(32, 1, 4, 4), 128: Shape(64, 2, 2, 4),
    256: Shape(64, 2, 2, 2), 1 << 30: Shape(128, 2, 1, 2),
}  # fmt: skip
INT4_TILES = {8: Shape(8, 1, 4), 32: Shape(32, 2, 2), 64: Shape(64, 4, 1), 1 << 30: Shape(128, 4, 1)}


def tiles_of(m: DeviceMatrix) -> int:
    return sum(-(-s.rows // TILE) for s in m.layout.segments if s.format in ("sign", "int4"))


def code_tiles(m: DeviceMatrix) -> int:
    return sum(-(-s.rows // CODES_TILE) for s in m.layout.segments if s.format == "int8")


def codes_of(m: DeviceMatrix) -> bool:
    return any(s.format == "int4" for s in m.layout.segments)


class Broad:
    """Images and launches for the products of `batch` vectors with any of `matrices`."""

    CODES_BY_NORM = range(17, 33)  # vectors: fewer and more are faster with a kernel beside in_proj's last blocks
    CODES_EIGHTS: ClassVar[dict[int, int]] = {
        128: 1,
        512: 2,
        1 << 30: 4,
    }  # of vectors of a block of that kernel, up to so many
    MANY: ClassVar[dict[int, Shape]] = MANY_TILES
    FEW: ClassVar[dict[int, Shape]] = FEW_TILES
    CODES: ClassVar[dict[int, Shape]] = INT4_TILES

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
        """Whether the kernels take this matrix: signs and int8 rows, perhaps with a second plane, or
        int4 rows; nothing else."""
        formats = {s.format for s in m.layout.segments}
        signs = formats <= {"sign", "int8"} and "sign" in formats
        return (signs or formats == {"int4"}) and not m.rank and not m.turns

    def shape(self, m: DeviceMatrix) -> Shape:
        table = self.CODES if codes_of(m) else self.MANY if 2 * tiles_of(m) > self._gpu.blocks else self.FEW
        return next(shape for most, shape in table.items() if self._batch <= most)

    def norm(
        self,
        m: DeviceMatrix,
        source: Sequence[int],
        parts: Sequence[int] = (0, 0, 0, 0),
        codes: Sequence[int] = (),
    ) -> None:
        """source: fields of the struct Input, its norm in one group; parts: where the sum goes or 0, pointer, stride
        and number (up to 4) of what is added to the source before; codes: fields of the struct Output and the state,
        where the rows of codes are multiplied here (`codes_by_norm`)."""
        fields = fields_of(
            m.fields, list(source), list(parts), self._x.data_ptr(), self._x2.data_ptr(), self._padded,
            list(codes) or [0] * 15,
        )  # fmt: skip
        grid = self._batch, 1 + (code_tiles(m) if codes else 0)
        shared = 4 * (m.kpad + m.kpad // 32 * 8 + WARPS)
        self._gpu.launch("slimba_broad_norm", grid, fields, shared, overlap=True)

    def codes_by_norm(self, m: DeviceMatrix) -> bool:
        """Whether `norm` should multiply the rows of codes, which `product` then leaves out."""
        return self._batch in self.CODES_BY_NORM and code_tiles(m) > 0 and m.kpad <= NORM_COLUMNS

    def product(
        self,
        m: DeviceMatrix,
        output: Sequence[int],
        state: Sequence[int],
        part_stride: int = 0,
        squares: Sequence[int] = (0, 0, 0),
        *,
        signs_only: bool = False,
    ) -> None:
        """The product with the vectors that `norm` left, for the same matrix; shape(m).parts results,
        `part_stride` numbers apart. squares: pointer, number and eps of the sums that steps.cu left with its images."""
        shape = self.shape(m)
        codes = 0 if signs_only else code_tiles(m)

        def fields(parts: int) -> list[int]:
            images = self._x.data_ptr(), self._x2.data_ptr(), self._padded
            return [*m.fields, *output, *state, self._batch, *images, parts, part_stride, *squares, int(codes > 0)]

        grid3 = -(-tiles_of(m) // shape.tiles), -(-self._batch // shape.vectors), shape.parts
        name = f"slimba_broad_{shape.vectors}_{shape.tiles}_{shape.split}" + ("_4" if codes_of(m) else "")
        self._gpu.launch(
            name, grid3, fields_of(fields(shape.parts)), shape.shared_bytes, threads=shape.threads, overlap=True
        )
        if codes:
            eights = next(eights for most, eights in self.CODES_EIGHTS.items() if self._batch <= most)
            grid = codes, -(-self._batch // (8 * eights))
            shared = 4 * WARPS * 8 * eights * (CODES_TILE + 1)
            self._gpu.launch(f"slimba_broad_codes_{eights}", grid, fields_of(fields(1)), shared, overlap=True)
