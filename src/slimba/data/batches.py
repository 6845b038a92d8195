"""Deterministic batches of token windows: the batch of step i depends only on the tokens, the seed and i.

That is what makes a resumed run equal to an uninterrupted one: nothing needs to be saved but the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slimba.errors import UserError

__all__ = ["WindowBatches"]


@dataclass(frozen=True, slots=True)
class WindowBatches:
    """Windows of `window` inputs (and the token after each) in a shuffled order, a fresh order every pass."""

    ids: np.ndarray  # int32 [n]
    window: int
    batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_windows < 1:
            raise UserError(
                f"the text has {len(self.ids)} tokens, fewer than one window of {self.window} and its last target;"
                " give more text or a shorter window"
            )

    @property
    def n_windows(self) -> int:
        return (len(self.ids) - 1) // self.window

    @property
    def tokens_per_step(self) -> int:
        return self.window * self.batch

    def steps_for(self, tokens: int | None) -> int:
        """Optimiser steps that use `tokens` tokens (None: one pass), at least one."""
        total = self.n_windows * self.window if tokens is None else tokens
        return max(1, total // self.tokens_per_step)

    def __getitem__(self, step: int) -> np.ndarray:
        """int32 [batch, window + 1] of optimiser step `step`."""
        out = np.empty((self.batch, self.window + 1), np.int32)
        for row in range(self.batch):
            n = step * self.batch + row
            epoch, at = divmod(n, self.n_windows)
            start = int(self._order(epoch)[at]) * self.window
            out[row] = self.ids[start : start + self.window + 1]
        return out

    def _order(self, epoch: int) -> np.ndarray:
        key = (self.n_windows, self.seed, epoch)
        if key not in _ORDERS:
            if len(_ORDERS) > 3:
                _ORDERS.clear()
            _ORDERS[key] = np.random.default_rng([self.seed, epoch]).permutation(self.n_windows)
        return _ORDERS[key]


_ORDERS: dict[tuple[int, int, int], np.ndarray] = {}  # the order of the current pass, not worth a field of its own
