"""Negative log-likelihoods of a long text in windows: the arithmetic that evaluation and `LoadedModel` share.

    nll = score(engine, ids, window=1024)            # float64 [n]: of the targets ids[1], ids[2], ..., ids[n]

Window i has the inputs ids[i*S : i*S + W] and the targets one further and starts from an empty state; ids that fill no
window are dropped. With stride S = W the windows do not overlap; with S < W every window but the first counts only its
last S targets, which then have at least W - S ids before them. Every target counts once.

Run the tests: `pytest tests/evaluation/test_perplexity.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from slimba.errors import UserError
from slimba.runtime.engine import Engine

__all__ = ["check_ids", "score", "window_starts"]


def check_ids(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """ids as int32; UserError where one is no row of the embedding."""
    ids = np.asarray(ids)
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"token ids must be integers, these are {ids.dtype}")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise UserError(
            f"token id {bad} is outside the model's vocabulary of {vocab_size}; is it the model's tokenizer?"
        )
    return ids.astype(np.int32, copy=False)


def window_starts(n: int, window: int, stride: int | None = None) -> range:
    """First index of every window over n ids. UserError for sizes that make no window."""
    stride = window if stride is None else stride
    if window < 1:
        raise UserError(f"--window is {window}, it must be at least 1")
    if not 1 <= stride <= window:
        raise UserError(f"--stride is {stride}, it must be between 1 and the window ({window})")
    if n == 0:
        raise UserError("the text is empty; there is nothing to score")
    if n < window + 1:
        remedy = f"give --window {n - 1} or less, or more text" if n > 1 else "give more text"
        raise UserError(f"the text has {n} tokens and a window of {window} needs {window + 1}; {remedy}")
    return range(0, n - window, stride)


def score(
    engine: Engine,
    ids: np.ndarray,
    *,
    window: int,
    stride: int | None = None,
    batch: int = 8,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Negative log-likelihoods in nats, float64 [n], of the targets ids[1 : n + 1].

    `batch` windows go through the engine at a time. `progress` is called with the number of windows done since the last
    call. Raises UserError as `window_starts` and `check_ids` do.
    """
    if batch < 1:
        raise UserError(f"--batch is {batch}, it must be at least 1")
    ids = check_ids(ids, engine.spec.vocab_size)
    starts = window_starts(len(ids), window, stride)
    out: list[np.ndarray] = []
    for at in range(0, len(starts), batch):
        some = starts[at : at + batch]
        x = np.stack([ids[s : s + window] for s in some])
        y = np.stack([ids[s + 1 : s + window + 1] for s in some])
        nll = engine.nll(x, y, engine.new_state(len(some)))
        for row, start in zip(nll, some, strict=True):
            out.append(row if start == 0 else row[window - starts.step :])
        if progress:
            progress(len(some))
    scores = np.concatenate(out)
    if not np.isfinite(scores).all():
        raise UserError("the model's likelihoods are not finite; its weights are damaged (see slimba inspect)")
    return scores
