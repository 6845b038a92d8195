"""Where the bytes of a model are: by component, per weight, per layer. Of a checkpoint, or of a shape with a preset.

    inventory_of(open_checkpoint("model-1bit")).bits_per_projection_weight
    inventory_of_shape(named_spec("mamba2-1.3b"), "dfssm").file_bytes

A preset's file size is exact, because its header is built as the writer would build it.
Run the tests: `pytest tests/checkpoints/test_inventory.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.common import checkpoint_entries
from slimba.checkpoints.packed import METADATA
from slimba.checkpoints.safetensors_io import Entries, file_bytes
from slimba.formats import MatrixLayout
from slimba.formats.floats import DTYPES
from slimba.formats.presets import preset_dtypes, preset_layouts
from slimba.models.spec import ModelSpec

__all__ = ["Inventory", "inventory_of", "inventory_of_shape", "layer_groups"]

COMPONENTS = (
    "embedding",
    "head",
    "in_proj",
    "out_proj",
    "other projections",
    "low-rank",
    "second plane",
    "scales",
    "conv",
    "norms",
    "ssm",
    "biases",
    "header",
)
OF_KIND = {"norm": "norms", "conv": "conv", "ssm": "ssm", "bias": "biases"}


@dataclass(frozen=True, slots=True)
class Inventory:
    """Bytes by component; `weights` holds the number of weights of those components that are matrices.

    The bits per projection weight count every part of the layers' matrices (codes, signs, scales, low-rank factors with
    their scales, column scales) and no embedding, norm or convolution.
    """

    bytes: dict[str, int]
    weights: dict[str, int]
    parameters: int
    projection_bytes: int
    projection_weights: int

    @property
    def file_bytes(self) -> int:
        """All of the weight files, headers included."""
        return sum(self.bytes.values())

    @property
    def bits_per_projection_weight(self) -> float:
        return 8 * self.projection_bytes / self.projection_weights

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.file_bytes / self.parameters

    def to_json(self) -> dict[str, Any]:
        return {
            "bytes": self.bytes,
            "bits_per_weight": {n: 8 * self.bytes[n] / w for n, w in self.weights.items() if n in self.bytes},
            "file_bytes": self.file_bytes,
            "parameters": self.parameters,
            "bits_per_parameter": self.bits_per_parameter,
            "projection_bytes": self.projection_bytes,
            "projection_weights": self.projection_weights,
            "bits_per_projection_weight": self.bits_per_projection_weight,
        }


def inventory_of(checkpoint: Checkpoint) -> Inventory:
    """The inventory of a model on disk (whose header is what its files hold besides tensors) or in memory."""
    entries = checkpoint_entries(checkpoint)
    _, tensor_bytes = file_bytes(entries, metadata={}, checksums=False)
    if checkpoint.path is None:
        header, _ = file_bytes(entries, metadata=METADATA, checksums=True)
    else:
        files = [*checkpoint.path.glob("model*.safetensors")] or [*checkpoint.path.glob("pytorch_model*.bin")]
        header = sum(f.stat().st_size for f in files) - tensor_bytes
    return _inventory(checkpoint.spec, checkpoint.layouts, entries, header)


def inventory_of_shape(
    spec: ModelSpec, preset: str, *, rank: int | None = None, embedding: str | None = None
) -> Inventory:
    """The inventory that `spec` would have as a packed file under a preset of `formats/presets.py`."""
    layouts, dtypes = preset_layouts(spec, preset, rank=rank, embedding=embedding), preset_dtypes(preset)
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, layout in layouts.items():
        entries |= layout.tensors(name)
    entries |= {name: (dtypes[kind], shape) for name, (shape, kind) in spec.vectors().items()}
    header, _ = file_bytes(entries, metadata=METADATA, checksums=True)
    return _inventory(spec, layouts, entries, header)


def _inventory(spec: ModelSpec, layouts: Mapping[str, MatrixLayout], entries: Entries, header: int) -> Inventory:
    total = dict.fromkeys(COMPONENTS, 0)
    weights: dict[str, int] = {}
    projection_bytes = projection_weights = 0
    for name, layout in layouts.items():
        component = _matrix_component(name)
        weights[component] = weights.get(component, 0) + layout.rows * layout.cols
        in_layer = component not in ("embedding", "head")
        projection_weights += layout.rows * layout.cols if in_layer else 0
        projection_bytes += layout.nbytes if in_layer else 0
        for tensor in layout.tensors(name):
            total[_part_component(tensor.removeprefix(name + "."), component)] += _nbytes(entries[tensor])
    for name, (_, kind) in spec.vectors().items():
        total[OF_KIND[kind]] += _nbytes(entries[name])
    total["scales"] += sum(_nbytes(entry) for name, entry in entries.items() if name.endswith("conv1d.out_scale"))
    total["header"] = header
    used = {name: size for name, size in total.items() if size}
    return Inventory(used, weights, spec.n_params(), projection_bytes, projection_weights)


def _matrix_component(name: str) -> str:
    short = name.rsplit(".", 1)[-1]
    names = {"embeddings": "embedding", "lm_head": "head", "in_proj": "in_proj", "out_proj": "out_proj"}
    return names.get(short, "other projections")


def _part_component(part: str, component: str) -> str:
    """Where a part of a matrix is counted: an embedding keeps its scales, the layers' are shown apart."""
    if component in ("embedding", "head"):
        return component
    if part.startswith("lowrank"):
        return "low-rank"
    if part.startswith("plane"):
        return "second plane"
    return "scales" if part.endswith("scale") else component


def _nbytes(entry: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = entry
    return DTYPES[dtype].itemsize * int(np.prod(shape, dtype=np.int64))


def layer_groups(spec: ModelSpec, layouts: Mapping[str, MatrixLayout]) -> list[dict[str, Any]]:
    """The formats of every layer, equal neighbours as one: [{"first": 0, "last": 11, "formats": {"in_proj": ...}}]."""
    out: list[dict[str, Any]] = []
    for i in range(spec.n_layer):
        formats = {n: layouts[f"backbone.layers.{i}.mixer.{n}"].describe() for n in spec.layer_matrices()}
        if out and out[-1]["formats"] == formats:
            out[-1]["last"] = i
        else:
            out.append({"first": i, "last": i, "formats": formats})
    return out


def describe_value(value: Any) -> str:
    """A value of the provenance record as one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
