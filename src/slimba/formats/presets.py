"""Named layouts: which format every matrix of a model gets under `dfssm`, `dfssm-published`, `int8`, ... No torch.

    layouts = preset_layouts(spec, "dfssm", rank=16)      # one MatrixLayout per spec.matrices()
    dtypes = preset_dtypes("dfssm")                       # dtype of the small tensors by kind

`dfssm` is the default recipe's: signs with a low-rank correction where the bulk of the weights is, int8 for the few
rows that steer the recurrence (B, C and dt of a Mamba-2; x_proj and dt_proj of a Mamba-1), int4 embedding.
`dfssm-published` is the published design, which has signs and the correction in every row of both projections and an
int8 embedding. The other presets store every matrix in the format they are named after.

Run the tests: `pytest tests/checkpoints/test_presets.py`.
"""

from __future__ import annotations

from slimba.errors import UserError
from slimba.formats.matrix import LowRank, MatrixLayout, Segment
from slimba.models.spec import ModelSpec, VectorKind

__all__ = ["PRESETS", "preset_dtypes", "preset_layouts"]

FLOATS = ("float32", "float16", "bfloat16")
EMBEDDING = {"dfssm": "int4", "dfssm-published": "int8"}
PRESETS = (*EMBEDDING, *FLOATS, "int8", "int4")


def preset_layouts(
    spec: ModelSpec, name: str, *, rank: int = 16, embedding: str | None = None
) -> dict[str, MatrixLayout]:
    """The layout of every matrix of `spec` under the preset `name`.

    `rank` is R of the low-rank correction of the sign matrices (0: none). `embedding` overrides the format of the
    embedding and of an untied head. UserError for an unknown preset or format and for a negative rank.
    """
    _check(name)
    if rank < 0:
        raise UserError(f"rank is {rank}, it must be 0 (no low-rank correction) or more")
    table = embedding or EMBEDDING.get(name, name)
    out: dict[str, MatrixLayout] = {}
    for matrix, (rows, cols) in spec.matrices().items():
        short = matrix.rsplit(".", 1)[-1]
        if short in ("embeddings", "lm_head"):
            out[matrix] = MatrixLayout.plain(rows, cols, table)
        elif name not in EMBEDDING:
            out[matrix] = MatrixLayout.plain(rows, cols, name)
        elif short in ("in_proj", "out_proj"):
            signs = _sign_rows(spec, rows) if short == "in_proj" and name == "dfssm" else rows
            column = name == "dfssm" and spec.norm_before(short) is None  # otherwise folded into the norm
            out[matrix] = _sign_layout(signs, rows, cols, rank, column)
        else:  # x_proj and dt_proj of a Mamba-1: 6 % of its weights, and the most sensitive ones
            out[matrix] = MatrixLayout.plain(rows, cols, "int8")
    return out


def preset_dtypes(name: str) -> dict[VectorKind, str]:
    """Dtype of the small tensors by kind: the preset's own for a float preset, else float16 with float32 for ssm."""
    _check(name)
    if name in FLOATS:
        return {"norm": name, "conv": name, "ssm": name, "bias": name}
    return {"norm": "float16", "conv": "float16", "ssm": "float32", "bias": "float16"}


def _check(name: str) -> None:
    if name not in PRESETS:
        raise UserError(f"unknown format {name!r}, known are {', '.join(PRESETS)}")


def _sign_rows(spec: ModelSpec, rows: int) -> int:
    """Leading rows of in_proj stored as signs: z and x of a Mamba-2, everything of a Mamba-1."""
    return 2 * spec.d_inner if spec.architecture == "mamba2" else rows


def _sign_layout(signs: int, rows: int, cols: int, rank: int, column: bool) -> MatrixLayout:
    """Signs with the correction in rows 0..signs, int8 below."""
    segments = [Segment(signs, "sign")]
    if signs < rows:
        segments.append(Segment(rows - signs, "int8"))
    return MatrixLayout(cols, tuple(segments), LowRank(rank, 0, signs) if rank else None, column)
