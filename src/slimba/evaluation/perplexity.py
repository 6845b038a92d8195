"""Perplexity and bits per byte of texts, computed by the engine that will be deployed, with the protocol stated.

    model = slimba.load("slimba-demo")
    result = slimba.evaluate(model, ["test.txt"], window=1024, split_documents="blank-line")
    result.perplexity, result.bits_per_byte, result.protocol

Protocol: documents (cut at blank lines, or one per file) are tokenised one by one, the document-start id is put before
each and predicted like any token, everything is concatenated and scored in windows (see `runtime/scoring.py`).

    perplexity    = exp(sum of nll / tokens)
    bits per byte = sum of nll / ln 2 / bytes

over the scored tokens. `bytes` are the UTF-8 bytes of exactly these tokens (`Tokenizer.token_bytes`); a document-start
id counts as one byte, that of the separator which it stands for and which had to be predicted too. Other special tokens
in the text count no bytes.

Run the tests: `pytest tests/evaluation/test_perplexity.py`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from slimba.data.text import Split, documents, encode_documents
from slimba.data.tokenizer import Tokenizer
from slimba.errors import UserError
from slimba.runtime.load import load
from slimba.runtime.scoring import score, window_starts

if TYPE_CHECKING:
    from slimba.runtime.api import LoadedModel

__all__ = ["Perplexity", "TextIds", "byte_lengths", "evaluate", "progress_bar", "read_text"]


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Figures of one model on one text. `nll` is the sum in nats over `tokens`; seconds are of scoring alone."""

    perplexity: float
    bits_per_byte: float
    nll: float
    tokens: int
    bytes: int
    text_tokens: int  # of the whole text, the part that fills no window included
    window: int
    stride: int
    protocol: str
    backend: str
    state_dtype: str
    activations: str
    seconds: float

    @classmethod
    def of(cls, nll: np.ndarray, text: TextIds, **rest: object) -> Perplexity:
        """From the scores of the targets text.ids[1 : n + 1]."""
        total, size = float(nll.sum()), int(text.lengths[text.ids[1 : len(nll) + 1]].sum())
        return cls(
            perplexity=math.exp(total / len(nll)),
            bits_per_byte=total / math.log(2) / size if size else math.nan,
            nll=total,
            tokens=len(nll),
            bytes=size,
            text_tokens=len(text.ids),
            protocol=text.protocol,
            **rest,  # type: ignore[arg-type]
        )


@dataclass(frozen=True, slots=True)
class TextIds:
    """A tokenised text: ids int32 [n], bytes of every id int64 [V], and the words for how it was made."""

    ids: np.ndarray
    lengths: np.ndarray
    protocol: str


def byte_lengths(tokenizer: Tokenizer, vocab_size: int, bos_id: int | None) -> np.ndarray:
    """int64 [V]: UTF-8 bytes of every id; 1 for the document-start id, 0 for other special ids and padding rows."""
    lengths = np.array([len(tokenizer.token_bytes(i)) for i in range(vocab_size)], np.int64)
    if bos_id is not None:
        lengths[bos_id] = 1
    return lengths


def read_text(
    model: LoadedModel,
    sources: Sequence[str | Path],
    *,
    split_documents: Split = "blank-line",
    bos_id: int | Literal["model"] | None = "model",
    max_tokens: int | None = None,
) -> TextIds:
    """Tokenise files (.txt, .zst, .jsonl, .parquet) as the protocol says; the first `max_tokens` ids where given.

    bos_id: the document-start id; "model" takes the model's (`LoadedModel.document_start`), None puts none. Raises
    UserError for no tokenizer, no text, an id outside the vocabulary.
    """
    tokenizer = model.need_tokenizer()
    start = model.document_start if bos_id == "model" else bos_id
    if start is not None and not 0 <= start < model.spec.vocab_size:
        raise UserError(f"--bos-id {start} is outside the model's vocabulary of {model.spec.vocab_size}")
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"--max-tokens is {max_tokens}, it must be at least 1")
    ids = encode_documents(tokenizer, documents(sources, split_documents), start)[:max_tokens]
    head = "nothing" if start is None else f"id {start}"
    protocol = f"documents split by {split_documents}, {head} before each, concatenated"
    if max_tokens is not None:
        protocol += f", the first {max_tokens} tokens"
    return TextIds(ids, byte_lengths(tokenizer, model.spec.vocab_size, start), protocol)


def evaluate(
    model: LoadedModel | str | Path,
    text: Sequence[str | Path] | TextIds,
    *,
    window: int = 2048,
    stride: int | None = None,
    split_documents: Split = "blank-line",
    bos_id: int | Literal["model"] | None = "model",
    max_tokens: int | None = None,
    batch: int = 8,
    show_progress: bool = False,
) -> Perplexity:
    """Perplexity of `model` (from `slimba.load`, or what that takes) on text files, or on ids that `read_text` made.

    window: inputs per window; stride: how far windows move (default: no overlap); batch: windows per engine call.
    Raises UserError for an empty text, a window longer than the text, and what `read_text` refuses.
    """
    if isinstance(model, str | Path):
        model = load(model)
    if not isinstance(text, TextIds):
        text = read_text(model, text, split_documents=split_documents, bos_id=bos_id, max_tokens=max_tokens)
    n = len(window_starts(len(text.ids), window, stride))
    begin = time.perf_counter()
    with progress_bar("scoring", n, show_progress) as advance:
        nll = score(model.engine, text.ids, window=window, stride=stride, batch=batch, progress=advance)
    return Perplexity.of(nll, text, seconds=time.perf_counter() - begin, **run_fields(model, window, stride))


def run_fields(model: LoadedModel, window: int, stride: int | None) -> dict[str, object]:
    """What a result says about the run besides its figures."""
    return {
        "window": window,
        "stride": stride or window,
        "backend": model.engine.name,
        "state_dtype": model.state_dtype,
        "activations": model.activations,
    }


@contextmanager
def progress_bar(what: str, total: int, show: bool) -> Iterator[Callable[[int], object]]:
    """A bar of `total` steps on stderr where that is a terminal, gone when done; yields what advances it."""
    if not show or not sys.stderr.isatty():
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda n: progress.advance(task, n)
