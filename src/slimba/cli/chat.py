"""`slimba chat MODEL`: talk with a model, line by line.

The recurrent state stays between turns, so a turn costs its own tokens only, however long the talk is. /reset forgets
everything, /exit or Ctrl-D ends, Ctrl-C stops an answer.
"""

from __future__ import annotations

import signal
from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimba.cli.options import (
    Activations,
    Backend,
    MinP,
    Model,
    NoVerify,
    RepetitionPenalty,
    Seed,
    StateDtype,
    Temperature,
    Threads,
    TokenizerFile,
    TopK,
    TopP,
)

if TYPE_CHECKING:
    from slimba.runtime.api import LoadedModel

__all__ = ["Conversation", "chat"]

INTRODUCTION = (
    "plain continuation: no chat template is applied, the model goes on from your lines. "
    "/reset forgets, /exit ends, Ctrl-C stops an answer."
)


class Conversation:
    """The recurrent state of a talk and the ids that it has not seen yet.

    An engine's state has taken in the prompt and every sampled id but the last; that one opens the next turn.
    """

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.reset()

    def reset(self) -> None:
        self.state = self.model.engine.new_state()
        self.pending: list[int] = []
        self.fresh = True

    def say(self, text: str, **sampling: Any) -> Generator[str, None, None]:
        """Iterator over the answer to `text`; the state moves on as it is read, and stays usable if it is closed."""
        tokenizer = self.model.need_tokenizer()
        new = self.model.prompt_ids(text).tolist() if self.fresh else tokenizer.encode(text)
        prompt = self.pending + new
        stream = self.model.stream(prompt, state=self.state, **sampling)
        self.fresh = False
        try:
            yield from stream
        finally:
            stream.close()
            ids = stream.generation.ids
            self.pending = ids[-1:] if ids else []


def chat(
    model: Model,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of one answer at most.")] = 256,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End an answer before this text; may be repeated.")
    ] = None,
    backend: Backend = "auto",
    threads: Threads = None,
    state_dtype: StateDtype = None,
    activations: Activations = None,
    tokenizer: TokenizerFile = None,
    no_verify: NoVerify = False,
) -> None:
    """Talk with a model."""
    from slimba.runtime.engine import SamplingParams
    from slimba.runtime.load import load

    loaded = load(
        model,
        backend=backend,
        threads=threads,
        state_dtype=state_dtype,
        activations=activations,
        tokenizer=tokenizer,
        verify=not no_verify,
    )
    loaded.need_tokenizer()
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    SamplingParams(seed=seed, **settings)  # a bad setting is known before the first line is typed
    typer.echo(INTRODUCTION, err=True)
    talk, turn = Conversation(loaded), 0
    while (line := _read_line()) is not None:
        if line == "/exit":
            break
        if line == "/reset":
            talk.reset()
        elif line.startswith("/"):
            typer.echo(f"unknown command {line}, known are /reset and /exit", err=True)
        elif line:
            _answer(talk.say(line + "\n", stop=stop or (), seed=(seed + turn) % 2**64, **settings))
            turn += 1


def _read_line() -> str | None:
    """What the user typed, None at the end of input."""
    try:
        return input("> ").strip()
    except EOFError:
        return None


def _answer(pieces: Generator[str, None, None]) -> None:
    """Show an answer. Ctrl-C ends it between two tokens, where the state is whole; a second one ends the talk."""
    stopped = False

    def stop(signum: int, frame: Any) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            if stopped:
                print(" ...", end="")
                break
    finally:
        pieces.close()
        signal.signal(signal.SIGINT, before)
    print()
