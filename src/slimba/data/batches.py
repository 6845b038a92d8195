"""Deterministic batches of token windows: the batch of step i depends only on the tokens, the seed and i.

That is what makes a resumed run equal to an uninterrupted one: nothing needs to be saved but the step.

The windows are shuffled within shards of SHARD ids, and the shards come in the order of the text. So the first batch
needs the first shard and not the end of the text, which may still be on its way (tokens.py), and a text of one shard is
shuffled as a whole. Run the tests: `pytest tests/data/test_batches.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from slimba.data.tokens import ArrayTokens, Tokens
from slimba.errors import UserError

__all__ = ["WindowBatches"]

SHARD = 1 << 25  # ids


@dataclass(frozen=True, slots=True)
class WindowBatches:
    """Windows of `window` inputs (and the token after each) in a shuffled order, a fresh order every pass."""

    ids: np.ndarray | Tokens  # int32 [n], or a text on its way
    window: int
    batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        have = self.tokens.wait(self.window + 1)
        if have <= self.window:
            raise UserError(
                f"the text has {have} tokens, fewer than one window of {self.window} and its last target;"
                " give more text or a shorter window"
            )

    @property
    def tokens(self) -> Tokens:
        return ArrayTokens(self.ids) if isinstance(self.ids, np.ndarray) else self.ids

    @property
    def n_windows(self) -> int:
        """Windows of one pass; waits for the end of the text."""
        return (self.tokens.wait(None) - 1) // self.window

    @property
    def tokens_per_step(self) -> int:
        return self.window * self.batch

    def steps_for(self, tokens: int | None) -> int:
        """Optimiser steps that use `tokens` tokens (None: one pass), at least one."""
        total = self.n_windows * self.window if tokens is None else tokens
        return max(1, total // self.tokens_per_step)

    def first(self, n: int) -> np.ndarray:
        """int32 [n, window + 1]: the first windows of the first pass, fewer where the text has fewer."""
        have = (self.tokens.wait(n * self.window + 1) - 1) // self.window
        return np.stack([self._window(i) for i in range(min(n, have))])

    def __getitem__(self, step: int) -> np.ndarray:
        """int32 [batch, window + 1] of optimiser step `step`."""
        return np.stack([self._window(step * self.batch + row) for row in range(self.batch)])

    def _window(self, n: int) -> np.ndarray:
        """int32 [window + 1]: number n of all passes."""
        per_shard = max(1, SHARD // self.window)
        epoch, size = 0, per_shard
        shard, at = divmod(n, per_shard)
        whole = (shard + 1) * per_shard * self.window + 1
        if self.tokens.wait(whole) < whole:  # the last shard of a pass, or a later pass: the end is known
            n_windows = self.n_windows
            epoch, at = divmod(n, n_windows)
            shard, at = divmod(at, per_shard)
            size = min(per_shard, n_windows - shard * per_shard)
        start = (shard * per_shard + int(_order(size, self.seed, epoch, shard)[at])) * self.window
        return self.tokens.read(start, start + self.window + 1)


@lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int, shard: int) -> np.ndarray:
    """The order of a shard's windows in a pass."""
    return np.random.default_rng([seed, epoch, shard] if shard else [seed, epoch]).permutation(size)
