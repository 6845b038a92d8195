"""One matrix: row segments in their formats, an optional int8 low-rank correction, an optional second sign plane, an
optional column scale, an optional Hadamard transform of its input.

    W = (segments stacked
         + A @ B on the rows lowrank.start .. lowrank.stop
         + plane_scale * S2 on the rows plane.start .. plane.stop and the columns plane_index) * col_scale * H

H is the block Hadamard transform of `hadamard.py`: an engine transforms the input, then scales its columns. Where the
model has int8 activations, what is rounded is that transformed and scaled input: one scale a token, or with
`input_scale` one float32 scale for all tokens; a matrix with `activations` float32 keeps float inputs.

Tensor names, for a matrix called `m`: a matrix of one float segment without extras is stored as `m.weight`; otherwise
segment i has `m.i.<part>` with the parts of its format, the correction `m.lowrank_a` int8 [stop - start, R],
`m.lowrank_a_scale` [stop - start], `m.lowrank_b` int8 [R, cols], `m.lowrank_b_scale` [R], the second plane
`m.plane_packed` uint8 [stop - start, row_bytes(k)], `m.plane_scale` [stop - start], `m.plane_index` int32 [k] (absent
where k is all columns), the column scale `m.col_scale` [cols]; scales are float16, except `m.input_scale` float32 [1].
docs/file-format.md is the contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimba.errors import UserError
from slimba.formats.floats import DTYPES, FloatFormat
from slimba.formats.hadamard import hadamard
from slimba.formats.int4 import Int4Format
from slimba.formats.int8 import Int8Format, quantize_rows
from slimba.formats.sign import SignFormat, pack_signs, row_bytes, unpack_signs

__all__ = ["FORMATS", "LowRank", "Matrix", "MatrixLayout", "Plane", "Segment"]

FORMATS: dict[str, Any] = {
    "float32": FloatFormat("float32"),
    "float16": FloatFormat("float16"),
    "bfloat16": FloatFormat("bfloat16"),
    "int8": Int8Format(),
    "int4": Int4Format(),
    "sign": SignFormat(),
}
KEYS = {"cols", "segments", "lowrank", "plane", "col_scale", "hadamard", "input_scale", "activations"}  # of a layout


@dataclass(frozen=True, slots=True)
class Segment:
    """`rows` consecutive rows stored in one format."""

    rows: int
    format: str


@dataclass(frozen=True, slots=True)
class LowRank:
    """int8 correction A [stop - start, rank] @ B [rank, cols], added to the rows start..stop."""

    rank: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Plane:
    """A second sign plane: a scale a row times signs, added to the rows start..stop in `cols` of the columns.

    Which columns is data (`plane_index`, ascending), not layout; a plane over all columns has no index.
    """

    cols: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class MatrixLayout:
    """How a matrix of `rows` x `cols` is stored: shapes, types and bytes, without the numbers."""

    cols: int
    segments: tuple[Segment, ...]
    lowrank: LowRank | None = None
    col_scale: bool = False
    plane: Plane | None = None
    hadamard: int = 0  # block of the transform of the input, a power of two that divides cols; 0: none
    input_scale: bool = False  # int8 inputs have one scale for all tokens, stored, instead of one a token
    activations: str = ""  # "float32": the input stays float32 where the model's activations are int8

    def __post_init__(self) -> None:
        for s in self.segments:
            if s.format not in FORMATS:
                raise UserError(f"unknown weight format {s.format!r}, known are {', '.join(FORMATS)}")
            if s.rows < 1:
                raise UserError(f"a segment in format {s.format} has {s.rows} rows, it must have at least 1")
        if not self.segments or self.cols < 1:
            raise UserError(f"a matrix of {self.rows} rows and {self.cols} columns; both must be at least 1")
        lr = self.lowrank
        if lr and not (lr.rank >= 1 and 0 <= lr.start < lr.stop <= self.rows):
            where = f"rank {lr.rank} on rows {lr.start}..{lr.stop}"
            raise UserError(f"a low-rank correction of {where} does not fit {self.rows} rows")
        p = self.plane
        if p and not (1 <= p.cols <= self.cols and 0 <= p.start < p.stop <= self.rows):
            where = f"{p.cols} columns on rows {p.start}..{p.stop}"
            raise UserError(f"a second sign plane of {where} does not fit {self.rows} x {self.cols}")
        h = self.hadamard
        if h and (h < 2 or h & (h - 1) or self.cols % h):
            raise UserError(f"a Hadamard transform of {h} columns: not a power of two that divides {self.cols}")
        if self.activations not in ("", "float32") or (self.activations and self.input_scale):
            raise UserError(f"activations of a layer are {self.activations!r}, not float32 without input_scale")

    @classmethod
    def plain(cls, rows: int, cols: int, format: str) -> MatrixLayout:
        return cls(cols, (Segment(rows, format),))

    @property
    def rows(self) -> int:
        return sum(s.rows for s in self.segments)

    @property
    def is_plain_float(self) -> bool:
        return (
            len(self.segments) == 1
            and isinstance(FORMATS[self.segments[0].format], FloatFormat)
            and self.lowrank is None
            and self.plane is None
            and not (self.col_scale or self.hadamard or self.input_scale or self.activations)
        )

    @property
    def takes_int8(self) -> bool:
        """Whether int8 activations, where the model has them, apply: not to floats alone, not where it says float32."""
        floats = all(isinstance(FORMATS[s.format], FloatFormat) for s in self.segments)
        return not floats and self.activations != "float32"

    def part_name(self, i: int, part: str) -> str:
        return part if self.is_plain_float else f"{i}.{part}"

    def tensors(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Every tensor of this matrix: full name -> (dtype name, shape)."""
        out: dict[str, tuple[str, tuple[int, ...]]] = {}
        for i, s in enumerate(self.segments):
            for part, what in FORMATS[s.format].parts(s.rows, self.cols).items():
                out[f"{name}.{self.part_name(i, part)}"] = what
        if self.lowrank:
            n, r = self.lowrank.stop - self.lowrank.start, self.lowrank.rank
            out[f"{name}.lowrank_a"] = ("int8", (n, r))
            out[f"{name}.lowrank_a_scale"] = ("float16", (n,))
            out[f"{name}.lowrank_b"] = ("int8", (r, self.cols))
            out[f"{name}.lowrank_b_scale"] = ("float16", (r,))
        if self.plane:
            n = self.plane.stop - self.plane.start
            out[f"{name}.plane_packed"] = ("uint8", (n, row_bytes(self.plane.cols)))
            out[f"{name}.plane_scale"] = ("float16", (n,))
            if self.plane.cols < self.cols:
                out[f"{name}.plane_index"] = ("int32", (self.plane.cols,))
        if self.col_scale:
            out[f"{name}.col_scale"] = ("float16", (self.cols,))
        if self.input_scale:
            out[f"{name}.input_scale"] = ("float32", (1,))
        return out

    @property
    def nbytes(self) -> int:
        return sum(DTYPES[dt].itemsize * int(np.prod(shape)) for dt, shape in self.tensors("m").values())

    def describe(self) -> str:
        """Short text for tables: `sign:2048 int8:272 +r16`, `int4 hadamard:1024`."""
        if len(self.segments) == 1:
            text = self.segments[0].format
        else:
            text = " ".join(f"{s.format}:{s.rows}" for s in self.segments)
        text += f" +r{self.lowrank.rank}" if self.lowrank else ""
        text += f" +plane:{self.plane.stop - self.plane.start}x{self.plane.cols}" if self.plane else ""
        text += " *col" if self.col_scale else ""
        text += f" hadamard:{self.hadamard}" if self.hadamard else ""
        text += " static" if self.input_scale else ""
        return text + (f" {self.activations}-input" if self.activations else "")

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "cols": self.cols,
            "segments": [{"rows": s.rows, "format": s.format} for s in self.segments],
        }
        if self.lowrank:
            out["lowrank"] = {"rank": self.lowrank.rank, "start": self.lowrank.start, "stop": self.lowrank.stop}
        if self.plane:
            out["plane"] = {"cols": self.plane.cols, "start": self.plane.start, "stop": self.plane.stop}
        if self.col_scale:
            out["col_scale"] = True
        if self.hadamard:
            out["hadamard"] = self.hadamard
        if self.input_scale:
            out["input_scale"] = True
        if self.activations:
            out["activations"] = self.activations
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MatrixLayout:
        try:
            unknown = set(data) - KEYS
            if unknown:
                raise UserError(f"unknown key {sorted(unknown)[0]!r} in a layer's format")
            lr, p = data.get("lowrank"), data.get("plane")
            return cls(
                int(data["cols"]),
                tuple(Segment(int(s["rows"]), str(s["format"])) for s in data["segments"]),
                LowRank(int(lr["rank"]), int(lr["start"]), int(lr["stop"])) if lr else None,
                bool(data.get("col_scale", False)),
                Plane(int(p["cols"]), int(p["start"]), int(p["stop"])) if p else None,
                int(data.get("hadamard", 0)),
                bool(data.get("input_scale", False)),
                str(data.get("activations", "")),
            )
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"a layer's format in quantization_config is malformed: {e!r}") from None


@dataclass(slots=True)
class Matrix:
    """A layout with its arrays (keys are the tensor names without the matrix name and its dot)."""

    layout: MatrixLayout
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def segment_parts(self, i: int) -> dict[str, np.ndarray]:
        s = self.layout.segments[i]
        return {p: self.arrays[self.layout.part_name(i, p)] for p in FORMATS[s.format].parts(s.rows, self.layout.cols)}

    @classmethod
    def quantize(
        cls, w: np.ndarray, layout: MatrixLayout, lowrank: tuple[np.ndarray, np.ndarray] | None = None
    ) -> Matrix:
        """Round-to-nearest of float32 w [rows, cols] into `layout`; `lowrank` is (A [n, R], B [R, cols]).

        A second plane gets the columns in which most is missing. With a Hadamard transform, w is the matrix that meets
        the untransformed input.
        """
        if w.shape != (layout.rows, layout.cols):
            raise UserError(f"a matrix of shape {w.shape} does not fit a layout of {(layout.rows, layout.cols)}")
        if layout.input_scale:
            raise UserError("the scale of a matrix's input is calibrated by a method, not found by rounding")
        if layout.hadamard:
            w = hadamard(w.astype(np.float32), layout.hadamard)
        out, row = cls(layout), 0
        for i, s in enumerate(layout.segments):
            for part, a in FORMATS[s.format].pack(w[row : row + s.rows]).items():
                out.arrays[layout.part_name(i, part)] = a
            row += s.rows
        if layout.lowrank:
            if lowrank is None:
                raise UserError("the layout has a low-rank correction but no factors were given")
            out.arrays["lowrank_a"], out.arrays["lowrank_a_scale"] = quantize_rows(lowrank[0])
            out.arrays["lowrank_b"], out.arrays["lowrank_b_scale"] = quantize_rows(lowrank[1])
        if layout.plane:
            out.arrays |= plane_of(w - out._dequantize_segments(), layout.plane)
        if layout.col_scale:  # round-to-nearest chooses none
            out.arrays["col_scale"] = np.ones(layout.cols, np.float16)
        return out

    def lowrank_factors(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Dequantised (A, B), or None."""
        if not self.layout.lowrank:
            return None
        a, b = (
            self.arrays[k].astype(np.float32) * self.arrays[k + "_scale"].astype(np.float32)[:, None]
            for k in ("lowrank_a", "lowrank_b")
        )
        return a, b

    def plane_columns(self) -> np.ndarray:
        """The columns of the second plane, int [k]. UserError unless they ascend within the matrix."""
        assert self.layout.plane is not None
        k = self.layout.plane.cols
        if k == self.layout.cols:
            return np.arange(k)
        index = np.asarray(self.arrays["plane_index"])
        if index[0] < 0 or index[-1] >= self.layout.cols or (np.diff(index) <= 0).any():
            raise UserError(f"plane_index must ascend within 0..{self.layout.cols - 1}; the file is damaged")
        return index

    def plane_weight(self) -> np.ndarray:
        """Dequantised second plane, float32 [stop - start, k]."""
        assert self.layout.plane is not None
        signs = unpack_signs(self.arrays["plane_packed"], self.layout.plane.cols)
        return signs * self.arrays["plane_scale"].astype(np.float32)[:, None]

    def _dequantize_segments(self) -> np.ndarray:
        """float32 [rows, cols] of the segments and the low-rank correction: all but second plane and column scale."""
        cols = self.layout.cols
        w = np.concatenate(
            [FORMATS[s.format].unpack(self.segment_parts(i), cols) for i, s in enumerate(self.layout.segments)]
        )
        factors = self.lowrank_factors()
        if factors and self.layout.lowrank:
            w[self.layout.lowrank.start : self.layout.lowrank.stop] += factors[0] @ factors[1]
        return w

    def dequantize(self) -> np.ndarray:
        """float32 [rows, cols], the matrix that every engine must multiply by."""
        w = self._dequantize_segments()
        if p := self.layout.plane:
            w[p.start : p.stop, self.plane_columns()] += self.plane_weight()
        if self.layout.col_scale:
            w *= self.arrays["col_scale"].astype(np.float32)
        return hadamard(w, self.layout.hadamard) if self.layout.hadamard else w

    def rows_at(self, ids: np.ndarray) -> np.ndarray:
        """Dequantised rows (an embedding look-up): int [n] -> float32 [n, cols]. One-segment matrices only."""
        if self.layout.lowrank or self.layout.plane or self.layout.col_scale or self.layout.hadamard:
            raise UserError("an embedding has no low-rank correction, second plane, column scale or transform")
        (s,) = self.layout.segments
        parts = {p: a[ids] for p, a in self.segment_parts(0).items()}
        return np.asarray(FORMATS[s.format].unpack(parts, self.layout.cols), dtype=np.float32)

    def matmul(self, x: np.ndarray) -> np.ndarray:
        """x float32 [..., cols] -> [..., rows], computed from the packed parts; the engines' kernels follow this."""
        if self.layout.hadamard:
            x = hadamard(x, self.layout.hadamard)
        if self.layout.col_scale:
            x = x * self.arrays["col_scale"].astype(np.float32)
        y = np.concatenate(
            [FORMATS[s.format].matmul(self.segment_parts(i), x) for i, s in enumerate(self.layout.segments)], axis=-1
        )
        factors = self.lowrank_factors()
        if factors and self.layout.lowrank:
            y[..., self.layout.lowrank.start : self.layout.lowrank.stop] += (x @ factors[1].T) @ factors[0].T
        if p := self.layout.plane:
            y[..., p.start : p.stop] += x[..., self.plane_columns()] @ self.plane_weight().T
        return y


def plane_of(missing: np.ndarray, plane: Plane) -> dict[str, np.ndarray]:
    """The second plane that takes most from `missing` [rows, cols], what the other parts leave of a matrix."""
    rows = missing[plane.start : plane.stop]
    columns = np.sort(np.argsort(-(rows**2).sum(0), kind="stable")[: plane.cols])
    rows = rows[:, columns]
    out = {"plane_packed": pack_signs(rows), "plane_scale": np.abs(rows).mean(1).astype(np.float16)}
    return out if plane.cols == missing.shape[1] else out | {"plane_index": columns.astype(np.int32)}
