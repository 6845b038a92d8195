"""The interface that every backend implements, and the sampling settings that all of them read the same way.

engine = CpuEngine(checkpoint, threads=2)
state = engine.new_state(batch=1)
logits = engine.forward(ids, state)     # [B, L, V]; the state moves on by L tokens
for tokens in engine.generate(state, last_logits, params): ...
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from slimba.errors import UserError
from slimba.models.spec import ModelSpec

__all__ = ["Engine", "SamplingParams", "State"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen. The order is fixed and the same in every backend:

    1. ids at or beyond `n_valid` (padding rows of the embedding) are never chosen;
    2. repetition penalty over the ids in prompt and output (positive logits divided, negative ones multiplied);
    3. temperature 0 means greedy (lowest id among equals);
    4. logits / temperature, then top_k (0 = off), then top_p over what is left (1 = off; the smallest set whose
       probability reaches top_p), then min_p (0 = off; at least min_p times the largest probability);
    5. one draw u in [0, 1) against the cumulative probabilities in descending order (ties by id), in float64.

    u for the i-th token of sequence b comes from SplitMix64 over (seed, b, i), see `runtime/sampling.py`: a seed gives
    the same draws in every backend.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    n_valid: int = 0  # 0: all rows of the head
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        checks = [
            (self.max_new_tokens >= 1, "max_new_tokens must be at least 1"),
            (self.temperature >= 0, "temperature must be 0 (greedy) or more"),
            (self.top_k >= 0, "top_k must be 0 (off) or more"),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (0 <= self.min_p <= 1, "min_p must be between 0 and 1"),
            (self.repetition_penalty > 0, "repetition_penalty must be above 0"),
            (0 <= self.seed < 2**64, "seed must be between 0 and 2**64 - 1"),
        ]
        for good, message in checks:
            if not good:
                raise UserError(message)


class State(Protocol):
    """Recurrent state of a batch of sequences; opaque, owned by the backend that made it."""

    batch: int

    def clone(self) -> State: ...

    def reset(self) -> None: ...


class Engine(Protocol):
    """A model ready to run."""

    name: str
    spec: ModelSpec

    def new_state(self, batch: int = 1) -> State: ...

    def forward(self, ids: np.ndarray, state: State) -> np.ndarray:
        """int32 [B, L] -> float32 logits [B, L, V]; continues from `state` and moves it on by L tokens."""
        ...

    def prefill(self, ids: np.ndarray, state: State) -> np.ndarray:
        """int32 [B, L] -> float32 logits of the last position [B, V], in bounded memory for any L."""
        ...

    def nll(self, ids: np.ndarray, targets: np.ndarray, state: State) -> np.ndarray:
        """int32 [B, L] twice -> float64 negative log-likelihoods [B, L] in nats, without keeping the logits."""
        ...

    def generate(
        self, prompt: np.ndarray, state: State, params: SamplingParams, *, stride: int = 1
    ) -> Iterator[np.ndarray]:
        """int32 prompt [B, L] -> new ids in pieces [B, <= stride]; -1 pads a sequence that met a stop id.

        The stop id itself is yielded. The loop between two pieces runs inside the backend. A consumer that
        stops iterating stops the work.
        """
        ...
