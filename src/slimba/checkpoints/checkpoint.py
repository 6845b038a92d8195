"""Checkpoint: a model on disk, whatever its layout, as engines and methods see it. No torch.

Every reader returns this: canonical tensor names (see `ModelSpec`), arrays that are views of the memory-mapped file
where the layout allows it, and the format of every matrix. A float checkpoint is one whose matrices are all float.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slimba.errors import UserError
from slimba.formats import Matrix, MatrixLayout
from slimba.models.spec import ModelSpec, VectorKind

__all__ = ["Checkpoint", "scan_scales"]


def scan_scales(spec: ModelSpec, numerics: Mapping[str, str]) -> dict[str, tuple[tuple[int, ...], VectorKind]]:
    """The scales of every layer's int8 x, B and C, float32, where the model has them: full name -> (shape, kind)."""
    if numerics.get("ssm_inputs", "float32") == "float32":
        return {}
    names = (f"backbone.layers.{i}.mixer.conv1d.out_scale" for i in range(spec.n_layer))
    return {name: ((spec.d_conv_channels,), "conv") for name in names}


@dataclass(slots=True)
class Checkpoint:
    """spec, layouts (one per `spec.matrices()`), tensors by full canonical name.

    `provenance` is the JSON-ready record of where the model came from (method, recipe, data, teacher hash, figures);
    it travels in config.json. `numerics` are the deployed fields that change the numbers: activations, state dtype, and
    `ssm_inputs` int8 where x, B and C are rounded too.
    """

    spec: ModelSpec
    layouts: dict[str, MatrixLayout]
    tensors: Mapping[str, np.ndarray]
    path: Path | None = None
    kind: str = "slimba"  # slimba | transformers | mamba-ssm
    tokenizer_file: Path | None = None
    numerics: dict[str, str] = field(default_factory=lambda: {"activations": "float32", "state": "float32"})
    provenance: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)

    def matrix(self, name: str) -> Matrix:
        """The matrix `name` (without `.weight`), its arrays still views of the file."""
        layout = self.layouts[name]
        return Matrix(layout, {full[len(name) + 1 :]: self.tensors[full] for full in layout.tensors(name)})

    def vector(self, name: str) -> np.ndarray:
        """A small tensor by its full name, as float32."""
        return np.asarray(self.tensors[name]).astype(np.float32)

    def vectors(self) -> dict[str, tuple[tuple[int, ...], VectorKind]]:
        """Every tensor that is no part of a matrix: those of the spec and the scales of x, B and C."""
        return self.spec.vectors() | scan_scales(self.spec, self.numerics)

    @property
    def head(self) -> str:
        """Name of the matrix that makes the logits."""
        return "backbone.embeddings" if self.spec.tie_embeddings else "lm_head"

    @property
    def is_float(self) -> bool:
        return all(layout.is_plain_float for layout in self.layouts.values())

    def require_float(self, what: str) -> None:
        """UserError unless every matrix is plain float (a teacher, or a source of `convert`)."""
        for name, layout in self.layouts.items():
            if not layout.is_plain_float:
                raise UserError(f"{what} needs float weights, but {name} is stored as {layout.describe()}")

    def sha256(self) -> str:
        """SHA-256 over names and bytes of every tensor, whatever the layout of the directory."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            digest.update(name.encode() + b"\0")
            digest.update(np.ascontiguousarray(self.tensors[name]).tobytes())
        return digest.hexdigest()

    def nbytes(self) -> int:
        return sum(np.asarray(t).nbytes for t in self.tensors.values())
