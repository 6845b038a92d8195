"""LoadedModel: what `slimba.load()` returns. Text or ids in, text, logits or perplexity out, whatever the backend.

    model = slimba.load("demo-teacher")
    model.generate("Once upon a time", max_new_tokens=50, temperature=0.8, seed=1).text
    for piece in model.stream("Once upon a time"): print(piece, end="", flush=True)
    model.logits([1, 2, 3])                          # float32 [3, V]

Run the tests: `pytest tests/runtime/test_load.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast, overload

import numpy as np

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.data.tokenizer import Tokenizer
from slimba.errors import UserError
from slimba.models.spec import ModelSpec
from slimba.runtime.engine import Engine, SamplingParams, State
from slimba.runtime.scoring import check_ids, score
from slimba.runtime.text import Generation, TextStream

__all__ = ["LoadedModel"]

LOGIT_CHUNK = 512  # positions per call of the engine, so that `logits` holds one copy of the result only
STRIDE = 16  # tokens per piece where nobody watches them appear


@dataclass(slots=True)
class LoadedModel:
    """A model ready to run: the engine, the checkpoint it came from, and the tokenizer where there is one."""

    engine: Engine
    checkpoint: Checkpoint
    tokenizer: Tokenizer | None = None
    state_dtype: str = "float32"
    activations: str = "float32"

    @property
    def spec(self) -> ModelSpec:
        return self.engine.spec

    @overload
    def generate(self, prompt: str | Sequence[int], *, stop: Sequence[str] = (), **sampling: Any) -> Generation: ...

    @overload
    def generate(self, prompt: list[str], *, stop: Sequence[str] = (), **sampling: Any) -> list[Generation]: ...

    def generate(
        self, prompt: str | Sequence[int] | list[str], *, stop: Sequence[str] = (), **sampling: Any
    ) -> Generation | list[Generation]:
        """Continue `prompt`: a text, a list of ids, or a list of texts (the k-th of them uses seed + k).

        `sampling` are the fields of `SamplingParams` (max_new_tokens, temperature, top_k, top_p, min_p,
        repetition_penalty, seed). Generation ends at the model's end-of-text id, at a string of `stop` (which is cut
        off), or after max_new_tokens. Raises UserError for bad settings, ids outside the vocabulary, an empty prompt
        that the model has no beginning-of-text id for, and text without a tokenizer.
        """
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            seed = int(sampling.pop("seed", 0))
            return [self.generate(p, stop=stop, seed=(seed + k) % 2**64, **sampling) for k, p in enumerate(prompt)]
        stream = self.stream(cast("str | Sequence[int]", prompt), stop=stop, stride=STRIDE, **sampling)
        for _ in stream:
            pass
        return stream.generation

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        stop: Sequence[str] = (),
        stride: int = 1,
        state: State | None = None,
        **sampling: Any,
    ) -> TextStream:
        """Iterator over the text as it comes; its `.generation` is what `generate` returns once it has ended.

        Arguments are those of `generate`; `stride` is the number of tokens per piece. `state` continues a state of
        `engine.new_state()` that has seen the text before `prompt`; it moves on by the prompt and by every sampled id
        but the last.
        """
        ids = self.prompt_ids(prompt)
        params = SamplingParams(n_valid=self.n_valid, stop_ids=self.stop_ids, **sampling)
        pieces = self.engine.generate(ids[None], state or self.engine.new_state(), params, stride=stride)
        return TextStream(pieces, self.tokenizer, stop=stop, stop_ids=self.stop_ids, prompt_tokens=len(ids))

    def logits(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Token ids [L] -> float32 [L, V]: row i is the prediction of what follows ids[: i + 1]."""
        x = check_ids(np.asarray(ids), self.spec.vocab_size)
        if x.ndim != 1 or not len(x):
            raise UserError(f"logits takes a non-empty list of token ids, got an array of shape {x.shape}")
        out = np.empty((len(x), self.spec.vocab_size), np.float32)
        state = self.engine.new_state()
        for at in range(0, len(x), LOGIT_CHUNK):
            out[at : at + LOGIT_CHUNK] = self.engine.forward(x[None, at : at + LOGIT_CHUNK], state)[0]
        return out

    def perplexity(self, text: str | Sequence[int] | np.ndarray, window: int = 1024) -> float:
        """exp of the mean negative log-likelihood of a text (as one document) or of ids, in windows of `window` inputs
        without overlap (see `runtime/scoring.py`). `slimba.evaluate` counts more and splits documents.
        """
        if isinstance(text, str):
            head = [] if self.document_start is None else [self.document_start]
            ids = np.array(head + self.need_tokenizer().encode(text), np.int32) if text else np.zeros(0, np.int32)
        else:
            ids = np.asarray(text)
        return math.exp(float(score(self.engine, ids, window=window).mean()))

    def prompt_ids(self, prompt: str | Sequence[int]) -> np.ndarray:
        """int32 [L] of a prompt: text gets the beginning-of-text id where the model's policy wants one; ids stay as
        they are; an empty text becomes the document-start id.
        """
        if isinstance(prompt, str):
            ids = self.need_tokenizer().encode(prompt)
            if self.spec.add_bos and self.spec.bos_token_id is not None:
                ids = [self.spec.bos_token_id, *ids]
            if not ids and self.document_start is not None:
                ids = [self.document_start]
        else:
            ids = list(prompt)
        if not ids:
            raise UserError("the prompt is empty and the model has no beginning-of-text id; give a prompt")
        return check_ids(np.array(ids), self.spec.vocab_size)

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer, or a UserError that names the remedy."""
        if self.tokenizer is None:
            where = self.checkpoint.path or "the model"
            raise UserError(f"{where} has no tokenizer and text needs one; give it with --tokenizer FILE (tokenizer=)")
        return self.tokenizer

    @property
    def n_valid(self) -> int:
        """Ids that may be sampled: those of the tokenizer; padding rows of the embedding are left out."""
        rows = self.spec.vocab_size
        return min(rows, self.tokenizer.n_vocab) if self.tokenizer else rows

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generation: those of both configs, else the tokenizer's end of text."""
        listed = self.checkpoint.generation.get("eos_token_id")
        ids = {int(i) for i in (listed if isinstance(listed, list) else [listed]) if i is not None}
        if self.spec.eos_token_id is not None:
            ids.add(self.spec.eos_token_id)
        if not ids and self.tokenizer and self.tokenizer.eot_id is not None:
            ids.add(self.tokenizer.eot_id)
        return tuple(sorted(i for i in ids if 0 <= i < self.spec.vocab_size))

    @property
    def document_start(self) -> int | None:
        """The id that stands before every document of a text: the config's beginning of text, else its end of text,
        else the tokenizer's end of text; None where there is none."""
        eot = self.tokenizer.eot_id if self.tokenizer else None
        found = (self.spec.bos_token_id, self.spec.eos_token_id, eot)
        return next((i for i in found if i is not None and 0 <= i < self.spec.vocab_size), None)
