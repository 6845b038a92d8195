"""Continuous batching on the GPU: sequences join and leave between steps, each with its own prompt, settings and seed.

    batcher = Batcher(engine, slots=64)
    number = batcher.add(prompt, SamplingParams(temperature=0.8, seed=1))
    while batcher.busy:
        for token in batcher.step():            # a piece of one prompt, and a token for every running sequence
            ...                                 # token.request, token.id, token.last

A state takes a slot of one pool. A request gets the draws that it would get alone; the tokens are the same but for the
rounding of sums, whose order depends on how many sequences run.

Run the tests: `pytest tests/runtime/test_cuda_batcher.py`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from slimba.errors import UserError
from slimba.runtime.backends.cuda import ASK_HOST, NOT_FINITE, CudaEngine
from slimba.runtime.engine import SamplingParams
from slimba.runtime.sampling import Sampler

__all__ = ["Batcher", "Token"]

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # of a step: one CUDA graph each


@dataclass(frozen=True, slots=True)
class Token:
    """A new id of a request; `last` with the one that ends it."""

    request: int
    id: int
    last: bool


@dataclass(slots=True)
class Request:
    """A sequence: `at` tokens of its prompt are in its state, `id` is the newest one and not in it yet."""

    number: int
    prompt: np.ndarray
    sampler: Sampler
    saved: dict[str, np.ndarray] | None
    slot: int = -1
    at: int = 0
    id: int = -1


class Batcher:
    """Runs up to `slots` sequences at once on an engine; others wait for a slot. chunk: most tokens of a prompt between
    two steps of the others."""

    def __init__(self, engine: CudaEngine, slots: int, *, chunk: int = 1024) -> None:
        if not 1 <= slots <= SIZES[-1] or chunk < 1:
            raise UserError(
                f"slots is {slots} and chunk {chunk}; there may be 1 to {SIZES[-1]} slots, and chunks from 1"
            )
        self._engine, self._chunk = engine, chunk
        self._pool = engine.new_state(slots + 1)  # the last slot fills steps up to one of SIZES
        self._free = list(range(slots))[::-1]
        self._waiting: deque[Request] = deque()
        self._joining: Request | None = None
        self._running: list[Request] = []
        self._next = 0

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._joining or self._running)

    def add(self, prompt: np.ndarray, params: SamplingParams, saved: dict[str, np.ndarray] | None = None) -> int:
        """Queues a sequence; its number. prompt: int32 [L], of what comes after `saved`, a state of `save`."""
        ids = np.asarray(prompt, np.int32).reshape(-1)
        if not len(ids):
            raise UserError("the prompt is empty; a sequence needs at least one token")
        if params.n_valid > self._engine.spec.vocab_size:
            raise UserError(f"n_valid is {params.n_valid} but the model has {self._engine.spec.vocab_size} ids")
        self._waiting.append(Request(self._next, ids, Sampler(params, ids[None]), saved))
        self._next += 1
        return self._next - 1

    def save(self, request: int) -> dict[str, np.ndarray]:
        """The state of a running sequence: all of its tokens but the newest."""
        return self._pool.view([self._find(request).slot]).save()

    def cancel(self, request: int) -> None:
        """Ends a sequence, wherever it is."""
        self._waiting = deque(r for r in self._waiting if r.number != request)
        if self._joining and self._joining.number == request:
            self._free.append(self._joining.slot)
            self._joining = None
        for r in [r for r in self._running if r.number == request]:
            self._leave(r)

    def step(self) -> list[Token]:
        """A piece of the prompt of one sequence that joins, and a token for each that runs."""
        running = list(self._running)
        first = self._join()
        return first + (self._decode(running) if running else [])

    def _find(self, request: int) -> Request:
        for r in self._running:
            if r.number == request:
                return r
        raise UserError(f"request {request} is not running")

    def _leave(self, r: Request) -> None:
        self._running.remove(r)
        self._free.append(r.slot)

    def _take(self, r: Request, accepted: np.ndarray) -> Token:
        """The token that a request's sampler has accepted."""
        r.id = int(accepted[0])
        if r.sampler.done:
            self._leave(r)
        return Token(r.number, r.id, r.sampler.done)

    def _join(self) -> list[Token]:
        if self._joining is None and self._waiting and self._free:
            r = self._joining = self._waiting.popleft()
            r.slot = self._free.pop()
            view = self._pool.view([r.slot])
            if r.saved is None:
                view.reset()
            else:
                view.load(r.saved)
        joining = self._joining
        if joining is None:
            return []
        piece = joining.prompt[joining.at : joining.at + self._chunk]
        logits = self._engine.prefill(piece[None], self._pool.view([joining.slot]))
        joining.at += len(piece)
        if joining.at < len(joining.prompt):
            return []
        self._joining = None
        self._running.append(joining)
        return [self._take(joining, joining.sampler.step(logits))]

    def _decode(self, running: list[Request]) -> list[Token]:
        """One step of these. Requests with a repetition penalty, and draws that the GPU leaves, are sampled here."""
        size = SIZES[bisect_left(SIZES, len(running))]
        step = self._engine.stepper(self._pool.padded([r.slot for r in running], size))
        spare = [SamplingParams()] * (size - len(running))
        params = [r.sampler.params for r in running]
        greedy = all(p.temperature == 0 for p in params)
        valid = {p.n_valid for p in params}
        step.allow(valid.pop() if len(valid) == 1 else 0)
        step.sample_by(None if greedy else [*params, *spare], [0] * size)
        step.first_token([*(r.sampler.n for r in running), *(0 for _ in spare)])
        step.count.zero_()
        step.ids.copy_(torch.tensor([*(r.id for r in running), *(0 for _ in spare)], dtype=torch.int32))
        self._engine.run(step, choose=True)
        chosen = step.chosen[: len(running), 0].cpu().numpy()
        out = []
        for b, (r, own) in enumerate(zip(running, chosen, strict=True)):
            if own == NOT_FINITE:
                raise UserError(f"the logits of request {r.number} hold NaN or infinity: the weights are damaged")
            if own == ASK_HOST or r.sampler.params.repetition_penalty != 1 or valid:
                out.append(self._take(r, r.sampler.step(step.logits[b : b + 1].cpu().numpy())))
            else:
                out.append(self._take(r, r.sampler.accept(np.array([own], np.int32))))
        return out
