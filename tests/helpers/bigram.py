"""A real engine whose probabilities are known by hand: the next id depends on the last one only.

    engine = BigramEngine(logits)                    # float [V, V], row = last id

Its state counts the ids that a sequence has seen and remembers them, so tests can see what the engine was fed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from helpers.tiny import tiny_spec
from slimba.runtime.engine import SamplingParams
from slimba.runtime.sampling import Sampler


class BigramState:
    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.seen: list[list[int]] = [[] for _ in range(batch)]

    def clone(self) -> BigramState:
        other = BigramState(self.batch)
        other.seen = [list(s) for s in self.seen]
        return other

    def reset(self) -> None:
        self.seen = [[] for _ in range(self.batch)]


class BigramEngine:
    name = "bigram"

    def __init__(self, logits: np.ndarray) -> None:
        self.table = logits.astype(np.float32)
        self.spec = tiny_spec(vocab_size=len(logits))
        self.log_p = self.table - np.log(np.exp(self.table.astype(np.float64)).sum(-1, keepdims=True))
        self.windows: list[np.ndarray] = []  # what nll was asked for

    def new_state(self, batch: int = 1) -> BigramState:
        return BigramState(batch)

    def forward(self, ids: np.ndarray, state: BigramState) -> np.ndarray:
        for seen, row in zip(state.seen, ids, strict=True):
            seen.extend(row.tolist())
        return self.table[ids]

    def prefill(self, ids: np.ndarray, state: BigramState) -> np.ndarray:
        return self.forward(ids, state)[:, -1]

    def nll(self, ids: np.ndarray, targets: np.ndarray, state: BigramState) -> np.ndarray:
        assert all(not s for s in state.seen), "every window starts from an empty state"
        self.forward(ids, state)
        self.windows.extend(ids)
        return -self.log_p[ids, targets]

    def generate(
        self, prompt: np.ndarray, state: BigramState, params: SamplingParams, *, stride: int = 1
    ) -> Iterator[np.ndarray]:
        sampler, ids = Sampler(params, prompt), prompt
        while not sampler.done:
            out = []
            while len(out) < stride and not sampler.done:
                ids = sampler.step(self.prefill(ids, state))[:, None]
                out.append(ids)
            yield np.concatenate(out, axis=1)
