"""From sampled ids to text that may be shown: whole characters, stop strings cut out, never a part of one printed.

    stream = TextStream(engine.generate(...), tokenizer, stop=["\\n\\n"], stop_ids=(0,))
    for piece in stream: print(piece, end="")
    stream.generation.finish_reason

Run the tests: `pytest tests/runtime/test_text.py`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from slimba.data.tokenizer import StreamDecoder, Tokenizer
from slimba.errors import UserError

__all__ = ["Generation", "StopStrings", "TextStream"]


@dataclass(slots=True)
class Generation:
    """What came out. `text` is without the stop string and None where the model has no tokenizer; `ids` are all sampled
    ids, a stop id or the tokens of a stop string included. `finish_reason`: `eos` (a stop id), `stop` (a stop string)
    or `length`. Seconds are wall time: until the first piece (prefill and its tokens), and in total.
    """

    text: str | None = ""
    ids: list[int] = field(default_factory=list)
    finish_reason: Literal["eos", "stop", "length"] = "length"
    prompt_tokens: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0
    first_ids: int = 0  # ids in the first piece

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: the tokens after the first piece over the time after it; 0 where there are none."""
        n, seconds = len(self.ids) - self.first_ids, self.seconds - self.first_seconds
        return n / seconds if n > 0 and seconds > 0 else 0.0


class StopStrings:
    """Cuts a text at the stop string that is completed first (of those completed together, the one that began first).

    `feed` returns the text that can be no part of a stop string; `hit` is True once one was found, and nothing more
    comes out. How the text is split into pieces changes nothing.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if any(not s for s in stop):
            raise UserError("an empty stop string would end every text at once; leave it out")
        self.stop = tuple(stop)
        self.hit = False
        self._pending = ""

    def feed(self, text: str) -> str:
        if self.hit:
            return ""
        pending = self._pending + text
        found = [(at + len(s), at) for s in self.stop if (at := pending.find(s)) >= 0]
        if found:
            self.hit, self._pending = True, ""
            return pending[: min(found)[1]]
        keep = max((_overlap(pending, s) for s in self.stop), default=0)
        self._pending = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def finish(self) -> str:
        """The text that was kept back and did not become a stop string."""
        rest, self._pending = self._pending, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


class TextStream:
    """Iterator over printable pieces of one sequence; `generation` is complete when the iterator has ended.

    `pieces` is what `Engine.generate` yields for a batch of one, [1, n]. Without a tokenizer no text comes out, only
    ids are collected. Closing the stream (or dropping it) closes the engine's generator, which stops its work.
    """

    def __init__(
        self,
        pieces: Iterator[np.ndarray],
        tokenizer: Tokenizer | None,
        *,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        prompt_tokens: int = 0,
    ) -> None:
        if stop and tokenizer is None:
            raise UserError(
                "stop strings need a tokenizer and the model has none; give one with --tokenizer (tokenizer=)"
            )
        self.generation = Generation(text=None if tokenizer is None else "", prompt_tokens=prompt_tokens)
        self._pieces = pieces
        self._decoder = StreamDecoder(tokenizer) if tokenizer else None
        self._stop = StopStrings(stop)
        self._stop_ids = frozenset(stop_ids)
        self._run: Generator[str, None, None] = self._texts()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._run)

    def close(self) -> None:
        """End early: the text so far stays in `generation`."""
        self._run.close()

    def _texts(self) -> Generator[str, None, None]:
        out, begin = self.generation, time.perf_counter()
        try:
            for piece in self._pieces:
                out.seconds = time.perf_counter() - begin
                text = self._take(piece[0])
                if not out.first_ids:
                    out.first_seconds, out.first_ids = out.seconds, len(out.ids)
                if text:
                    yield self._show(text)
                if out.finish_reason != "length":
                    break
            if self._decoder and not self._stop.hit:
                rest = self._stop.feed(self._decoder.finish())
                rest += self._stop.finish()
                if rest:
                    yield self._show(rest)
        finally:
            close = getattr(self._pieces, "close", None)
            if close:
                close()

    def _take(self, ids: np.ndarray) -> str:
        """Add ids until one ends the sequence; the text they make certain."""
        out, text = self.generation, ""
        for token in ids.tolist():
            if token < 0 or out.finish_reason != "length":
                break
            out.ids.append(token)
            if token in self._stop_ids:
                out.finish_reason = "eos"
            elif self._decoder:
                text += self._stop.feed(self._decoder.feed([token]))
                if self._stop.hit:
                    out.finish_reason = "stop"
        return text

    def _show(self, text: str) -> str:
        assert self.generation.text is not None
        self.generation.text += text
        return text
