"""A model against its teacher on the same ids: both perplexities, their ratio, KL divergence and top-1 agreement.

    result = compare(teacher, student, text, window=1024)
    result.ratio, result.kl, result.agreement

One pass through both engines, chunk by chunk, so the logits of a window never all exist at once.

Run the tests: `pytest tests/evaluation/test_compare.py`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from slimba.errors import UserError
from slimba.evaluation.perplexity import Perplexity, TextIds, progress_bar, run_fields
from slimba.runtime.scoring import check_ids, window_starts

if TYPE_CHECKING:
    from slimba.runtime.api import LoadedModel

__all__ = ["Comparison", "compare"]

CHUNK_BYTES = 64_000_000  # of one engine's logits


@dataclass(frozen=True, slots=True)
class Comparison:
    """`ratio`: student's perplexity over teacher's. `kl`: mean over positions of KL(teacher || student) in nats.
    `agreement`: share of positions where both hold the same token for likeliest.
    """

    teacher: Perplexity
    student: Perplexity
    ratio: float
    kl: float
    agreement: float


def compare(
    teacher: LoadedModel,
    student: LoadedModel,
    text: TextIds,
    *,
    window: int = 2048,
    batch: int = 8,
    show_progress: bool = False,
) -> Comparison:
    """Both models on windows of `text` without overlap. UserError where their vocabularies differ."""
    rows = teacher.spec.vocab_size
    if rows != student.spec.vocab_size:
        raise UserError(f"the two models have different vocabularies, {rows} and {student.spec.vocab_size} rows")
    ids = check_ids(text.ids, rows)
    starts = window_starts(len(ids), window)
    parts: list[np.ndarray] = []
    begin = time.perf_counter()
    with progress_bar("comparing", len(starts), show_progress) as advance:
        for at in range(0, len(starts), batch):
            some = starts[at : at + batch]
            x = np.stack([ids[s : s + window + 1] for s in some])
            parts.append(_windows(teacher, student, x))
            advance(len(some))
    seconds = time.perf_counter() - begin
    both = np.concatenate([p.reshape(4, -1) for p in parts], axis=1)
    if not np.isfinite(both).all():
        raise UserError("the likelihoods are not finite; the weights of one model are damaged (see slimba inspect)")
    t, s = (
        Perplexity.of(nll, text, seconds=seconds, **run_fields(model, window, None))
        for nll, model in ((both[0], teacher), (both[1], student))
    )
    return Comparison(t, s, s.perplexity / t.perplexity, float(both[2].mean()), float(both[3].mean()))


def _windows(teacher: LoadedModel, student: LoadedModel, x: np.ndarray) -> np.ndarray:
    """ids [B, W + 1] -> float64 [4, B, W]: nll of teacher and student, KL, 1 where the likeliest ids agree."""
    inputs, targets = x[:, :-1], x[:, 1:]
    out = np.empty((4, *inputs.shape))
    states = teacher.engine.new_state(len(x)), student.engine.new_state(len(x))
    chunk = max(1, CHUNK_BYTES // (4 * teacher.spec.vocab_size * len(x)))
    for at in range(0, inputs.shape[1], chunk):
        piece, y = inputs[:, at : at + chunk], targets[:, at : at + chunk, None]
        p, q = (
            _log_softmax(m.engine.forward(np.ascontiguousarray(piece), state))
            for m, state in zip((teacher, student), states, strict=True)
        )
        to = slice(at, at + piece.shape[1])
        out[0, :, to] = -np.take_along_axis(p, y, -1)[..., 0]
        out[1, :, to] = -np.take_along_axis(q, y, -1)[..., 0]
        out[3, :, to] = p.argmax(-1) == q.argmax(-1)
        out[2, :, to] = np.einsum("blv,blv->bl", np.exp(p), p - q, dtype=np.float64)
    return out


def _log_softmax(x: np.ndarray) -> np.ndarray:
    """float32 [..., V]; the sum of exponentials in float64."""
    x = x - x.max(-1, keepdims=True)
    out: np.ndarray = x - np.log(np.exp(x).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return out
