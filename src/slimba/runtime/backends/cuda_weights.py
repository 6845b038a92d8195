"""Matrices of a checkpoint in GPU memory, in the order that kernels/cuda/matrix.cuh wants, and their descriptions.

    m = DeviceMatrix(checkpoint.matrix(name), device, blocks=132)
    m.fields                     # the struct Matrix as int64
    m.shared_bytes(tokens=1)     # what a block of slimba_product_1 needs

Bits stay bits, codes stay codes: only the order of columns within 32 changes, and rows are padded to 512 columns. Needs
torch, for memory. Run the tests: `pytest tests/kernels/test_cuda_kernels.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import torch

from slimba.errors import UserError
from slimba.formats import Matrix

__all__ = ["WARPS", "DeviceMatrix", "float_bits", "up_to"]

FORMAT_CODES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "int4": 4, "sign": 5}  # enum Format in common.cuh
KEEP_FLOAT, ROUND_TOKEN, ROUND_FIXED = 0, 1, 2  # enum Rounding in turn.cuh
TILE, WARPS, MAX_SEGMENTS, GROUP = 16, 8, 6, 128  # of matrix.cuh; columns that share an int4 scale
LINE = 128  # bytes that the L2 cache fetches at once
ROWS_AT_ONCE = 8192  # rows put in order at a time, which bounds the memory of loading


def up_to(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def float_bits(value: float) -> int:
    """A float32 parameter in a 64-bit field."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array in the device's memory; bfloat16 as its bits."""
    plain = array.view(np.int16) if array.dtype.name == "bfloat16" else array
    return torch.from_numpy(np.array(plain, order="C")).to(device)


def in_order(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, kpad]: column 32 W + 8 b + j to byte b of word j, for every W."""
    rows, kpad = codes.shape
    return codes.view(rows, kpad // 32, 4, 8).transpose(2, 3).contiguous().view(rows, kpad)


def padded(codes: torch.Tensor, cols: int, fill: int = 0) -> torch.Tensor:
    out = torch.full((codes.shape[0], cols), fill, dtype=codes.dtype, device=codes.device)
    out[:, : codes.shape[1]] = codes
    return out


def int4_words(packed: torch.Tensor, cols: int, kpad: int) -> torch.Tensor:
    """uint8 [rows, ceil(cols / 2)], low nibble first -> [rows, kpad / 2]: 4-byte words of the order above in pairs, the
    first of a pair in the low nibbles; nibbles in two's complement, so that a shift left makes 16 times the code."""
    codes = torch.stack([packed & 15, packed >> 4], dim=2).view(packed.shape[0], -1)[:, :cols]
    words = in_order(padded(codes, kpad, 8)).view(packed.shape[0], kpad // 32, 4, 2, 4)
    return ((words[:, :, :, 0] | words[:, :, :, 1] << 4) ^ 0x88).reshape(packed.shape[0], kpad // 2)


def side_by_side(tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], dict[int, int]]:
    """Copies of the tensors in one piece of memory, each at a multiple of LINE; and where each went, by where it was. A
    single tensor stays where it is."""
    lines = [up_to(t.numel() * t.element_size(), LINE) // LINE for t in tensors]
    if len(tensors) == 1:
        return [*tensors], {}
    room = torch.empty(sum(lines) * LINE, dtype=torch.uint8, device=tensors[0].device)
    out, moved, at = [], {}, 0
    for t, n in zip(tensors, lines, strict=True):
        copy = room[at : at + t.numel() * t.element_size()].view(t.dtype).view(t.shape)
        out.append(copy.copy_(t))
        if t.numel():
            moved[t.data_ptr()] = copy.data_ptr()
        at += n * LINE
    return out, moved


class DeviceMatrix:
    """One matrix on the device. `blocks` is the size of the grid that will multiply by it; activations: int8 rounds its
    inputs, where its layout allows.

    UserError when the layout has more segments than a kernel takes.
    """

    def __init__(
        self,
        matrix: Matrix,
        device: torch.device,
        blocks: int,
        bias: np.ndarray | None = None,
        name: str = "a matrix",
        activations: str = "float32",
    ) -> None:
        layout = self.layout = matrix.layout
        if len(layout.segments) > MAX_SEGMENTS:
            raise UserError(f"{name} has {len(layout.segments)} row segments; backend cuda takes {MAX_SEGMENTS}")
        self.rows, self.cols = layout.rows, layout.cols
        self.kpad = up_to(layout.cols, 512)
        self._keep: list[torch.Tensor] = []
        self.plane_inverse: int = 0
        self.plane_columns_pointer: int = 0
        self._device = device
        self._blocks = blocks
        self.segment_rows = [s.rows for s in layout.segments]
        self.slots, self.plane_kpad = plane_slots(matrix)
        self.plane_by_groups = self.plane_kpad == 0 or len(self.slots) == self.plane_kpad
        self.has_float = any(s.format in ("float32", "float16", "bfloat16") for s in layout.segments)
        segments, items = self._segments(matrix)
        rank, lowrank = self._lowrank(matrix)
        plane = self._plane(matrix)
        self.column_factors = matrix.arrays["col_scale"].astype(np.float32) if layout.col_scale else None
        col_scale = self._upload(self.column_factors) if self.column_factors is not None else 0
        self.hadamard = layout.hadamard if layout.hadamard > 1 else 0
        self.rounding, step = KEEP_FLOAT, 0
        if activations == "int8" and layout.takes_int8:
            self.rounding = ROUND_FIXED if layout.input_scale else ROUND_TOKEN
        if self.rounding == ROUND_FIXED:
            step = self._upload(matrix.arrays["input_scale"].astype(np.float32))
        self.input_step, self.col_scale = step, col_scale
        self.rank = rank
        self.items = items
        self.bias = tensor(bias.astype(np.float32), device) if bias is not None else None
        self.split = split_of(items, blocks, self.kpad // 512)
        codes = {FORMAT_CODES[s.format] for s in layout.segments}
        self.fields = [
            self.rows, self.cols, self.kpad, len(layout.segments), items, self.split, *lowrank[:3], *plane[:5],
            int(self.has_float), sum(1 << c for c in codes), self.hadamard, self.rounding, *segments,
            *lowrank[3:], *plane[5:], col_scale, self.bias.data_ptr() if self.bias is not None else 0, step,
        ]  # fmt: skip
        self._gather()
        plain = [s.format for s in layout.segments] == ["float16"] and not (rank or layout.plane or layout.col_scale)
        self.half = self._keep[0][:, : self.cols] if plain else None  # the matrix itself, where it is stored in float16

    def _gather(self) -> None:
        """Puts the parts side by side, because a step that finds its weights in few pages is faster (docs/log.md)."""
        self._keep, moved = side_by_side(self._keep)
        self.fields = [moved.get(f, f) for f in self.fields]
        self.plane_inverse, self.input_step, self.col_scale, self.plane_columns_pointer = (
            moved.get(f, f) for f in (self.plane_inverse, self.input_step, self.col_scale, self.plane_columns_pointer)
        )

    @property
    def turns(self) -> bool:
        """Whether its inputs are transformed or rounded."""
        return bool(self.hadamard or self.rounding)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._keep)

    def shared_bytes(self, tokens: int, groups: int = 1) -> int:
        """Shared memory of a block that multiplies `tokens` (1 or 8) vectors: `carve` in matrix.cuh."""
        k2 = self.plane_kpad
        red = WARPS * TILE * 3 * tokens * 4
        parts = [
            3 * tokens * slice_stride(self.kpad), 3 * tokens * slice_stride(k2) if k2 else 0, red, red if k2 else 0,
            WARPS * 12, WARPS * 12, tokens * 4, tokens * self.rank * 4,
            tokens * self.kpad * 4 if self.has_float else 0,
            tokens * groups * 4 if groups > 1 else 0, 4 * WARPS * 4, tokens * 8,
            tokens * self.kpad * 4 if self.hadamard else 0,
        ]  # fmt: skip
        return sum(up_to(p, 16) for p in parts)

    def _upload(self, array: np.ndarray) -> int:
        return self._hold(tensor(array, self._device))

    def _hold(self, t: torch.Tensor) -> int:
        self._keep.append(t)
        return t.data_ptr()

    def _segments(self, matrix: Matrix) -> tuple[list[int], int]:
        """The structs Segment, and the number of items: tiles of rows or single rows."""
        fields: list[int] = []
        first = item = 0
        for i, s in enumerate(matrix.layout.segments):
            parts = matrix.segment_parts(i)
            data, stride = self._data(parts["packed"] if "packed" in parts else parts["weight"], s.format)
            scale = self._upload(parts["scale"]) if "scale" in parts else 0
            groups = parts["scale"].shape[1] if s.format == "int4" else 0
            each = self._each(s.format, s.rows)
            fields += [FORMAT_CODES[s.format], first, s.rows, item, each, scale, stride, groups, data]
            first += s.rows
            item += -(-s.rows // each)
        return fields + [0] * (9 * MAX_SEGMENTS - len(fields)), item

    def _each(self, format: str, rows: int) -> int:
        """Rows of an item. int8 rows go one by one where tiles of 16 would leave most of the GPU idle."""
        many = rows >= TILE * self._blocks * 2
        return TILE if format in ("sign", "int4") or (format == "int8" and many) else 1

    def _data(self, array: np.ndarray, format: str) -> tuple[int, int]:
        """Pointer and bytes a row of a segment's main part."""
        pieces = [self._ordered(array[at : at + ROWS_AT_ONCE], format) for at in range(0, len(array), ROWS_AT_ONCE)]
        whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        return self._hold(whole), whole.shape[1] * whole.element_size()

    def _ordered(self, array: np.ndarray, format: str) -> torch.Tensor:
        t = tensor(array, self._device)
        if format == "int8":
            return in_order(padded(t.view(torch.uint8), self.kpad))
        if format == "int4":
            return int4_words(t, self.cols, self.kpad)
        return padded(t, self.kpad // 8 if format == "sign" else self.kpad)

    def _lowrank(self, matrix: Matrix) -> tuple[int, list[int]]:
        lr = matrix.layout.lowrank
        if not lr:
            return 0, [0] * 7
        rank, arrays = up_to(lr.rank, 16), matrix.arrays
        a = padded(tensor(arrays["lowrank_a"], self._device), rank)
        b = torch.zeros(rank, self.kpad, dtype=torch.uint8, device=self._device)
        b[: lr.rank] = self._ordered(arrays["lowrank_b"], "int8")
        b_scale = np.zeros(rank, np.float16)
        b_scale[: lr.rank] = arrays["lowrank_b_scale"]
        return rank, [
            rank, lr.start, lr.stop, self._hold(a), self._upload(arrays["lowrank_a_scale"]), self._hold(b),
            self._upload(b_scale),
        ]  # fmt: skip

    def _plane(self, matrix: Matrix) -> list[int]:
        p = matrix.layout.plane
        if not p:
            return [0] * 8
        slots, kpad = self.slots, self.plane_kpad  # the column that lies in each place, or -1
        there = slots >= 0
        inverse = np.full(self.cols, -1, np.int32)
        inverse[slots[there]] = np.flatnonzero(there)
        self.plane_inverse = self._upload(inverse)
        packed = matrix.arrays["plane_packed"]
        if self.plane_by_groups:  # ascending, as in the file, but with gaps
            bits = np.zeros((len(packed), kpad), np.uint8)
            bits[:, there] = np.unpackbits(packed, axis=1, count=p.cols, bitorder="little")
            packed = np.packbits(bits, axis=1, bitorder="little")
        data = padded(tensor(packed, self._device), kpad // 8)
        scale = self._upload(matrix.arrays["plane_scale"])
        self.plane_columns_pointer = self._upload(slots)
        return [len(slots), kpad, p.start, p.stop, kpad // 8, self._hold(data), scale, self.plane_columns_pointer]


def plane_slots(matrix: Matrix) -> tuple[np.ndarray, int]:
    """Which column lies in each place of the second plane as the kernels have it, int32, -1 in gaps; and the places of
    a row, in whole 512s. Where dot.cuh may take the matrix, every 16th of its columns has as many places."""
    if not matrix.layout.plane:
        return np.zeros(0, np.int32), 0
    chosen, cols = np.asarray(matrix.plane_columns()).astype(np.int32), matrix.layout.cols
    if cols in (2048, 4096) and bool((np.diff(chosen) > 0).all()):
        group = chosen // (cols // 16)
        most = int(np.bincount(group, minlength=16).max())
        each = next((n for n in (32, 64, 128) if n >= most), 0)
        if each:
            slots = np.full((16, each), -1, np.int32)
            for k in range(16):
                mine = chosen[group == k]
                slots[k, : len(mine)] = mine
            return slots.ravel(), 16 * each
    return chosen, up_to(len(chosen), 512)


def slice_stride(kpad: int) -> int:
    size = kpad + kpad // 8
    return size if size % 128 else size + 64


def split_of(items: int, blocks: int, steps: int) -> int:
    """Warps that share an item, so that few items keep many warps busy, and many end at about the same time."""
    split = 1
    while split < WARPS and split < steps and items * split * 2 <= blocks * WARPS:
        split *= 2
    warps = 2 * blocks * WARPS  # two blocks fit a multiprocessor
    if split == 1 < steps and items >= warps:
        rounds = {s: -(-items * s // warps) / s for s in (1, 2)}
        split = 2 if rounds[2] < 0.9 * rounds[1] else 1
    return split


def fields_of(*parts: int | Sequence[int]) -> np.ndarray:
    """A struct of 64-bit fields from numbers and lists of them."""
    flat: list[int] = []
    for part in parts:
        flat += [part] if isinstance(part, int) else part
    return np.array(flat, np.int64)
