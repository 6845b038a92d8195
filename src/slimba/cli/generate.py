"""`slimba generate MODEL --prompt TEXT`: continue a text. The text goes to stdout, speeds to stderr."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from slimba.cli.options import (
    Activations,
    Backend,
    JsonFile,
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


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue; - reads it from stdin.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; may be repeated.")] = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Show the text while it comes.")] = True,
    backend: Backend = "auto",
    threads: Threads = None,
    state_dtype: StateDtype = None,
    activations: Activations = None,
    tokenizer: TokenizerFile = None,
    no_verify: NoVerify = False,
    json_file: JsonFile = None,
) -> None:
    """Continue a text."""
    from slimba.cli.options import write_json
    from slimba.runtime.load import load

    text = sys.stdin.read() if prompt == "-" else prompt
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
        "seed": seed,
    }
    pieces = loaded.stream(text, stop=stop or (), stride=1 if stream else 16, **settings)
    for piece in pieces:
        if stream:
            print(piece, end="", flush=True)
    out = pieces.generation
    print("" if stream else out.text)
    print(
        f"{out.prompt_tokens} + {len(out.ids)} tokens ({out.finish_reason}), {out.tokens_per_second:.1f} tokens/s, "
        f"first after {out.first_seconds:.2f} s, backend {loaded.engine.name}",
        file=sys.stderr,
    )
    if json_file:
        record = {"model": model, "prompt": text, "text": out.text, "ids": out.ids, "finish_reason": out.finish_reason}
        speed = {
            "prompt_tokens": out.prompt_tokens,
            "tokens_per_second": out.tokens_per_second,
            "first_seconds": out.first_seconds,
            "seconds": out.seconds,
        }
        write_json(json_file, record | speed | {"settings": settings, "backend": loaded.engine.name})
