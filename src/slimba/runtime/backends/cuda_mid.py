"""Products of packed matrices with tens to hundreds of vectors (kernels/cuda/mid.cu): scratch, launches, blocks.

    mid = Mid(gpu, batch=32, matrices=[...])
    mid.norm(m, source)                        # vectors into float16, in order, with all that m wants of them
    mid.product(m, output, state, parts=2)     # output: fields of the struct Output

Both may be recorded in a CUDA graph. Run the tests: `pytest tests/kernels/test_cuda_kernels.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slimba.runtime.backends.cuda_device import Gpu
from slimba.runtime.backends.cuda_lean import Dot, dot_of
from slimba.runtime.backends.cuda_stream import MOST_FEW, Stream, few_of
from slimba.runtime.backends.cuda_weights import DeviceMatrix, fields_of

__all__ = ["Mid"]

NOT_EXPANDED = (6, 9, 10, 79)  # fields of struct Matrix: rank, columns of the plane (two), column scales

STAGES, VECTOR_BYTES, TILE, WARPS = 3, 4 * 272, 16, 8  # of kernels/cuda/mid.cu
SHAPES = ((2, 1), (1, 1), (1, 2), (1, 4))  # (R, S) of the kernels: tiles of a warp, warps of a strip
CHUNK_COLS = 512


class Mid:
    """Scratch and launches for the products of `batch` vectors with any of `matrices`."""

    STILL_MOST = 32  # vectors for which still.cu is taken; at 128 it took 52 us for in_proj, mid.cu 49 (docs/log.md)

    def __init__(self, gpu: Gpu, batch: int, matrices: Sequence[DeviceMatrix], *, bakes: bool = False) -> None:
        """bakes: the launches will be by kernels made for a model, among them those of still.cu."""
        self._gpu, self._batch, self._bakes = gpu, batch, bakes and batch <= self.STILL_MOST
        self._tiles = 1 if batch <= 8 else 2 if batch <= 16 else 4  # of eight vectors in a block
        half = {"dtype": torch.float16, "device": gpu.device}
        self._x = torch.zeros(batch, max(m.kpad for m in matrices), **half)  # type: ignore[call-overload]
        self._x2 = torch.zeros(batch, max(m.plane_kpad for m in matrices) or 8, **half)  # type: ignore[call-overload]
        self._factors = torch.zeros(batch, max(m.rank for m in matrices) or 16, **half)  # type: ignore[call-overload]

    @staticmethod
    def fits(m: DeviceMatrix, gpu: Gpu | None = None, batch: int = 0, *, bakes: bool = False) -> bool:
        """Whether the kernels take this matrix: signs, int8 and int4, with any correction; floats for few vectors."""
        if not m.has_float:
            return True
        few = few_of(m, gpu.blocks) if gpu and bakes and batch <= MOST_FEW else None
        return bool(gpu and few and few.few_bytes <= gpu.shared)

    def norm(
        self,
        m: DeviceMatrix,
        source: Sequence[int],
        groups: int,
        parts: Sequence[int] = (0, 0, 0, 0),
        *,
        natural: bool = False,
    ) -> None:
        """source: fields of the struct Input; groups: of its norm; parts: residual, pointer, stride and number of what
        is added to the source before. natural: for a product with the expanded matrix, see `vectors`."""
        matrix = list(m.fields)
        natural = natural or m.has_float
        if natural:
            for i in NOT_EXPANDED:
                matrix[i] = 0
        fields = fields_of(
            matrix, list(source), list(parts), self._x.data_ptr(), self._x2.data_ptr(), self._factors.data_ptr(),
            m.plane_inverse, int(natural),
        )  # fmt: skip
        shared = 4 * (m.kpad + WARPS + max(1, groups)) + 2 * m.plane_kpad + (4 * m.kpad if m.turns else 0)
        self._gpu.launch("slimba_mid_norm", (self._batch,), fields, shared, overlap=True)

    def vectors(self, m: DeviceMatrix) -> torch.Tensor:
        """What `norm` left in the natural order: float16 [B, cols]."""
        whole: torch.Tensor = self._x.view(-1)[: self._batch * m.kpad].view(self._batch, m.kpad)
        return whole[:, : m.cols]

    def product(
        self, m: DeviceMatrix, output: Sequence[int], state: Sequence[int], parts: int = 1, part_stride: int = 0
    ) -> None:
        """The product with the vectors that `norm` left, for the same matrix. parts: into how many results the columns
        are divided, `part_stride` numbers apart."""
        fields = fields_of(
            m.fields, list(output), list(state), self._batch, self._x.data_ptr(), self._x2.data_ptr(),
            self._factors.data_ptr(), parts, part_stride,
        )  # fmt: skip
        if few := self._few(m):
            name = "slimba_few_" + "_".join(map(str, few.few_numbers))
            self._gpu.launch(name, (self._gpu.blocks,), fields, few.few_bytes, threads=few.threads, overlap=True)
            return
        if still := self._still(m):
            eights = 1 if self._batch <= 8 else 2
            name = "slimba_still_" + "_".join(map(str, (*still.numbers, eights)))
            shared = still.still_bytes(eights) + 8 * self._batch
            self._gpu.launch(name, (self._gpu.blocks,), fields, shared, threads=still.threads, overlap=True)
            return
        r, s, rows = self._shape(m, parts)
        vectors = 8 * self._tiles
        grid = rows, -(-self._batch // vectors), parts
        shared = STAGES * vectors * VECTOR_BYTES + 8 * vectors
        name = f"slimba_mid_{self._tiles}_{r}_{s}"
        self._gpu.launch(name, grid, fields, shared, overlap=True)

    def parts_of(self, m: DeviceMatrix) -> int:
        """In how many parts the columns of a matrix should be divided so that the GPU is busy."""
        if self._few(m) or self._still(m):
            return 1
        _, _, rows = self._shape(m, 1)
        blocks = rows * -(-self._batch // (8 * self._tiles))
        return 2 if 2 * blocks <= 1.1 * self._gpu.blocks and m.kpad >= 4 * CHUNK_COLS else 1

    def _few(self, m: DeviceMatrix) -> Stream | None:
        """The kernel of few.cu for a matrix."""
        few = few_of(m, self._gpu.blocks) if self._bakes and self._batch <= MOST_FEW else None
        return few if few and few.few_bytes <= self._gpu.shared else None

    def _still(self, m: DeviceMatrix) -> Dot | None:
        """The kernel of still.cu for a matrix."""
        still = dot_of(m, self._gpu.blocks, 1, False) if self._bakes else None
        return still if still and still.still_bytes(2) + 8 * self._batch <= self._gpu.shared else None

    def _shape(self, m: DeviceMatrix, parts: int) -> tuple[int, int, int]:
        """(R, S, blocks of rows): the largest blocks of which there are enough."""
        groups = -(-self._batch // (8 * self._tiles)) * parts
        signs = any(s.format == "sign" for s in m.layout.segments)
        for r, s in SHAPES if signs else SHAPES[1:]:  # one tile a warp has more loads of codes in flight
            strips = sum(-(-rows // (TILE * r)) for rows in m.segment_rows)
            blocks = -(-strips // (WARPS // s))
            if blocks * groups >= 0.9 * self._gpu.blocks:
                break
        return r, s, blocks
