"""Choosing the next token: the NumPy reference of what `SamplingParams` documents, and the random numbers behind it.

    sampler = Sampler(params, prompt)                # prompt int32 [B, L]
    ids = sampler.step(logits)                       # float32 [B, V] -> int32 [B]; -1 for a sequence that has ended

Engines written in another language follow `sample` step by step (the C++ twin is `slimba._core.sample`) and draw from
`uniform`, so a seed gives the same text everywhere.

Run the tests: `pytest tests/runtime/test_sampling.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from slimba.errors import UserError
from slimba.runtime.engine import SamplingParams

__all__ = ["Sampler", "sample", "uniform"]

MASK = 2**64 - 1


def uniform(seed: int, b: int, i: int) -> float:
    """The draw in [0, 1) for token i of sequence b: one output of SplitMix64 (Steele, Lea and Flood 2014).

    The generator's counter is seed + 0x9E3779B97F4A7C15 * (1 + i + b * 2**32), so that every (b, i) has its own draw.
    """
    z = (seed + 0x9E3779B97F4A7C15 * (1 + i + b * 2**32)) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    z ^= z >> 31
    return float((z >> 11) * 2.0**-53)


def sample(logits: np.ndarray, seen: Iterable[int], params: SamplingParams, b: int = 0, i: int = 0) -> int:
    """The id chosen from logits [V]; `seen` are the ids of prompt and output so far, (b, i) select the draw.

    Raises UserError when a logit is NaN or infinite, which only damaged weights produce.
    """
    n = min(params.n_valid or len(logits), len(logits))
    x = logits[:n].astype(np.float64)
    if not np.isfinite(x).all():
        raise UserError("the model's logits are not finite; its weights are damaged (check them with slimba inspect)")
    if params.repetition_penalty != 1.0:
        at = np.array(sorted({t for t in seen if 0 <= t < n}), dtype=np.int64)
        x[at] = np.where(x[at] > 0, x[at] / params.repetition_penalty, x[at] * params.repetition_penalty)
    if params.temperature == 0:
        return int(np.argmax(x))
    x /= params.temperature
    order = np.argsort(-x, kind="stable")  # descending, equal logits by id
    if params.top_k:
        order = order[: params.top_k]
    p = np.exp(x[order] - x[order[0]])
    p /= p.sum()
    keep = len(p)
    if params.top_p < 1:  # the smallest set that reaches top_p; rounding may leave the whole sum short of it
        keep = min(int(np.searchsorted(np.cumsum(p), params.top_p, side="left")) + 1, keep)
    if params.min_p > 0:
        keep = min(keep, int(np.count_nonzero(p >= params.min_p * p[0])))
    mass = np.cumsum(p[:keep])
    drawn = np.searchsorted(mass, uniform(params.seed, b, i) * mass[-1], side="right")
    return int(order[min(int(drawn), keep - 1)])


class Sampler:
    """Sampling state of a batch: what each sequence has seen, which have ended, and the number of tokens so far."""

    def __init__(self, params: SamplingParams, prompt: np.ndarray) -> None:
        self.params = params
        self.seen = [{int(t) for t in row} for row in prompt]
        self.ended = np.zeros(len(prompt), dtype=bool)
        self.n = 0

    def step(self, logits: np.ndarray) -> np.ndarray:
        """float32 [B, V] -> int32 [B]: the next id of every sequence, -1 for one that met a stop id earlier."""
        chosen = np.zeros(len(logits), dtype=np.int32)
        for b in np.flatnonzero(~self.ended):
            chosen[b] = sample(logits[b], self.seen[b], self.params, int(b), self.n)
        return self.accept(chosen)

    def accept(self, chosen: np.ndarray) -> np.ndarray:
        """Takes ids [B] that were chosen elsewhere as this step's: int32 [B], -1 for a sequence that has ended."""
        out = np.where(self.ended, -1, chosen).astype(np.int32)
        for b in np.flatnonzero(~self.ended):
            self.seen[b].add(int(out[b]))
            self.ended[b] = int(out[b]) in self.params.stop_ids
        self.n += 1
        return out

    @property
    def done(self) -> bool:
        return bool(self.ended.all()) or self.n >= self.params.max_new_tokens
