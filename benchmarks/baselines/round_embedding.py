"""Round the int8 embedding of a packed model to int4 (groups of 128) after training, to see what those bytes cost.

    python benchmarks/baselines/round_embedding.py OUT-int8 OUT-int4

Training with `--set embedding=int4` is the better way to the same bytes; this one needs no GPU.
Tests: `pytest tests/benchmarks/test_round_embedding.py`.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.packed import read_packed, write_packed
from slimba.formats import Matrix, MatrixLayout

NAME = "backbone.embeddings"


def rounded(model: Checkpoint) -> Checkpoint:
    """The same model with an int4 embedding, and a provenance that says so."""
    old = model.matrix(NAME).dequantize()
    new = Matrix.quantize(old, MatrixLayout.plain(*old.shape, "int4"))
    return dataclasses.replace(
        model,
        layouts={**model.layouts, NAME: new.layout},
        tensors={k: v for k, v in model.tensors.items() if not k.startswith(NAME + ".")}
        | {f"{NAME}.{part}": a for part, a in new.arrays.items()},
        provenance=model.provenance | {"afterwards": "embedding rounded to int4"},
    )


if __name__ == "__main__":
    write_packed(rounded(read_packed(Path(sys.argv[1]))), Path(sys.argv[2]))
