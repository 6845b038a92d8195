"""Standard tasks through lm-eval (extra `eval`): its interface on top of a model from `slimba.load`.

    run_tasks(slimba.load("model"), ["lambada_openai", "arc_easy"], limit=100)    # {task: {figure: value}}

A recurrent model has no longest context: nothing is cut, a rolling likelihood is one pass, and the choices of a
question continue from one copy of the state that read it. A text with nothing before its first token starts with the
model's document-start id.

Run the tests: `pytest tests/evaluation/test_harness.py` (skipped where lm-eval is missing).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from slimba.errors import UserError
from slimba.evaluation.perplexity import progress_bar

if TYPE_CHECKING:
    from slimba.runtime.api import LoadedModel
    from slimba.runtime.engine import State

__all__ = ["HarnessModel", "run_tasks"]

MAX_NEW_TOKENS = 256  # where a task does not say; lm-eval's own default


class HarnessModel:
    """The questions that lm-eval asks of a model, answered by a LoadedModel. `run_tasks` makes lm-eval's `LM` of it."""

    def __init__(self, model: LoadedModel) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = model.need_tokenizer()
        self._context: list[int] = []
        self._state: State | None = None

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(context, continuation) -> (log-likelihood of the continuation in nats, is it the greedy one?)."""
        out = []
        with progress_bar("likelihoods", len(requests), True) as advance:
            for request in requests:
                out.append(self._score(*self._split(*request.args)))
                advance(1)
        return out

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Log-likelihood in nats of whole texts, each from its own empty state."""
        out = []
        engine = self.model.engine
        with progress_bar("texts", len(requests), True) as advance:
            for request in requests:
                ids = np.array([self._start() + self.tokenizer.encode(request.args[0])], np.int32)
                some = ids.shape[1] > 1
                nll = engine.nll(ids[:, :-1], ids[:, 1:], engine.new_state()) if some else np.zeros(1)
                out.append(-float(nll.sum()))
                advance(1)
        return out

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Continuations of (context, settings), cut at the task's stop strings."""
        out = []
        with progress_bar("answers", len(requests), True) as advance:
            for request in requests:
                context, settings = request.args
                until = settings.get("until") or []
                sampled = settings.get("do_sample", False)
                done = self.model.generate(
                    self._whole(context),
                    stop=[s for s in ([until] if isinstance(until, str) else until) if s],
                    max_new_tokens=int(settings.get("max_gen_toks", MAX_NEW_TOKENS)),
                    temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
                    top_p=float(settings.get("top_p", 1.0)) if sampled else 1.0,
                    top_k=int(settings.get("top_k", 0)) if sampled else 0,
                )
                out.append(done.text or "")
                advance(1)
        return out

    def _start(self) -> list[int]:
        start = self.model.document_start
        if start is None:
            raise UserError("the model has no beginning-of-text or end-of-text id to start a text with")
        return [start]

    def _whole(self, context: str) -> list[int]:
        """Ids of a context by the model's own policy."""
        return self.model.prompt_ids(context).tolist() if context else self._start()

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of context and continuation, tokenised together; spaces at the border belong to the continuation."""
        bare = context.rstrip(" ")
        continuation = context[len(bare) :] + continuation
        before = self._whole(bare)
        if not bare:
            return before, self.tokenizer.encode(continuation)
        whole = self._whole(bare + continuation)
        return whole[: len(before)], whole[len(before) :]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        engine = self.model.engine
        if self._state is None or context != self._context:
            self._context, self._state = context, engine.new_state()
            if len(context) > 1:
                engine.prefill(np.array([context[:-1]], np.int32), self._state)
        x = np.array([[context[-1], *continuation[:-1]]], np.int32)
        logits = engine.forward(x, self._state.clone())[0].astype(np.float64)
        targets = np.array(continuation)
        top = logits.max(-1)
        picked = logits[np.arange(len(targets)), targets]
        nll = top + np.log(np.exp(logits - top[:, None]).sum(-1)) - picked
        return -float(nll.sum()), bool((logits.argmax(-1) == targets).all())


def run_tasks(
    model: LoadedModel, tasks: Sequence[str | dict[str, Any]], *, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Run lm-eval's tasks (names, or task configs as lm-eval writes them) and return {task: {figure: value}}.

    limit: examples per task. Raises UserError for a task that lm-eval does not know or whose data is out of reach.
    """
    names = [t.strip() if isinstance(t, str) else t for t in tasks if t]
    if not names:
        raise UserError("no task given; --tasks takes names of lm-eval, separated by commas")
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}, it must be at least 1")
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM

    class Adapter(HarnessModel, LM):  # type: ignore[misc]
        """lm-eval accepts nothing but its own base class."""

    try:
        found = simple_evaluate(model=Adapter(model), tasks=names, limit=limit, log_samples=False, verbosity="ERROR")
    except (KeyError, ValueError, OSError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"lm-eval could not run {', '.join(map(str, names))[:100]}: {reason}") from e
    return {
        task: {k.removesuffix(",none"): float(v) for k, v in figures.items() if isinstance(v, int | float)}
        for task, figures in found["results"].items()
    }
