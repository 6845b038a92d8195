"""What a packed file holds in the words of the compressed-tensors standard, where that covers it. No torch.

    metadata(layouts, numerics)                 # quantization_config.compressed_tensors, or None
    standard_tensors(matrix, name)              # {"NAME.weight_packed": int32 ..., "NAME.weight_scale": ...}

Covered are matrices of one segment of int8 rows (a scale a row) or int4 codes (a scale for 128 columns, rows of whole
32-bit words) without corrections; their inputs float, or int8 with a scale a token or a stored one; transforms of the
input as `transform_config`. Signs, embeddings and mixed rows are not, and stand in `ignore`. docs/file-format.md
says which tensor is which. Run the tests: `pytest tests/checkpoints/test_compressed_tensors.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slimba.errors import UserError
from slimba.formats import Matrix, MatrixLayout
from slimba.formats.int4 import GROUP

__all__ = ["covers", "metadata", "standard_tensors"]

WEIGHTS: dict[str, dict[str, Any]] = {
    "int8": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "int4": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP},
}
FORMATS = {"int8": "int-quantized", "int4": "pack-quantized"}
TABLES = ("backbone.embeddings",)


def covers(name: str, layout: MatrixLayout) -> bool:
    """Whether the standard can say what this matrix is."""
    formats = [s.format for s in layout.segments]
    plain = not (layout.lowrank or layout.plane or layout.col_scale)
    whole = formats == ["int8"] or (formats == ["int4"] and layout.cols % 8 == 0)
    return plain and whole and name not in TABLES


def metadata(layouts: Mapping[str, MatrixLayout], numerics: Mapping[str, str]) -> dict[str, Any] | None:
    """The standard's quantization_config: groups of matrices stored alike, and the others. None without any."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, layout in layouts.items():
        if covers(name, layout):
            groups.setdefault((layout.segments[0].format, _inputs(layout, numerics)), []).append(name)
    if not groups:
        return None
    out: dict[str, Any] = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    formats = {FORMATS[format] for format, _ in groups}
    out["format"] = formats.pop() if len(formats) == 1 else "mixed-precision"
    out["config_groups"] = {
        f"group_{i}": {
            "targets": names,
            "weights": WEIGHTS[format],
            "input_activations": _activations(inputs),
            "format": FORMATS[format],
        }
        for i, ((format, inputs), names) in enumerate(groups.items())
    }
    out["ignore"] = [name for name, layout in layouts.items() if not covers(name, layout)]
    blocks: dict[int, list[str]] = {}
    for names in groups.values():
        for name in names:
            if layouts[name].hadamard:
                blocks.setdefault(layouts[name].hadamard, []).append(name)
    if blocks:
        out["transform_config"] = {
            "config_groups": {
                f"hadamard_{block}": {
                    "type": "hadamard",
                    "head_dim": block,
                    "apply": [
                        {"targets": names, "location": "input"},
                        {"targets": names, "location": "weight_input", "inverse": True},
                    ],
                }
                for block, names in blocks.items()
            }
        }
    return out


def _inputs(layout: MatrixLayout, numerics: Mapping[str, str]) -> str:
    if numerics.get("activations", "float32") != "int8" or not layout.takes_int8:
        return "float"
    return "static" if layout.input_scale else "token"


def _activations(inputs: str) -> dict[str, Any] | None:
    if inputs == "float":
        return None
    static = inputs == "static"
    kind = {"strategy": "tensor" if static else "token", "dynamic": not static}
    return {"num_bits": 8, "type": "int", "symmetric": True} | kind


def standard_tensors(matrix: Matrix, name: str) -> dict[str, np.ndarray]:
    """A covered matrix under the standard's names and in its types; views of ours where nothing but the type differs.

    UserError for a matrix that is not covered.
    """
    if not covers(name, matrix.layout):
        raise UserError(f"{name} is {matrix.layout.describe()}, which compressed-tensors has no words for")
    parts = matrix.segment_parts(0)
    if matrix.layout.segments[0].format == "int4":  # eight codes plus 8 in 32 bits, the first in the lowest
        packed = np.ascontiguousarray(parts["packed"]).view("<i4")
        shape = np.array([matrix.layout.rows, matrix.layout.cols], np.int64)
        out = {f"{name}.weight_packed": packed, f"{name}.weight_scale": parts["scale"], f"{name}.weight_shape": shape}
    else:
        out = {f"{name}.weight": parts["weight"], f"{name}.weight_scale": parts["scale"][:, None]}
    if matrix.layout.input_scale:
        out[f"{name}.input_scale"] = matrix.arrays["input_scale"]
    return out
