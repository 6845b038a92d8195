"""`slimba eval MODEL --text FILE`: perplexity, bits per byte, comparison with a teacher; `--tasks` runs lm-eval."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimba.cli.options import Activations, Backend, JsonFile, Model, NoVerify, StateDtype, Threads, TokenizerFile

if TYPE_CHECKING:
    from slimba.evaluation.compare import Comparison
    from slimba.evaluation.perplexity import Perplexity


def evaluate(
    model: Model,
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="Text (.txt, .zst, .jsonl, .parquet); may be repeated.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens that the model reads from an empty state.")] = 2048,
    stride: Annotated[int | None, typer.Option(help="How far windows move on (default: no overlap).")] = None,
    split_documents: Annotated[str, typer.Option(help="What separates documents: blank-line or file.")] = "blank-line",
    bos_id: Annotated[
        int | None, typer.Option(help="Id before every document (default: the model's; -1 for none).")
    ] = None,
    batch: Annotated[int, typer.Option(help="Windows that are computed together.")] = 8,
    max_tokens: Annotated[int | None, typer.Option(help="Use only the first so many tokens of the text.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, separated by commas.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples per task (default: all).")] = None,
    against: Annotated[str | None, typer.Option(help="Teacher to compare with on the same text.")] = None,
    backend: Backend = "auto",
    threads: Threads = None,
    state_dtype: StateDtype = None,
    activations: Activations = None,
    tokenizer: TokenizerFile = None,
    no_verify: NoVerify = False,
    json_file: JsonFile = None,
) -> None:
    """Measure perplexity and bits per byte of a text, or run standard tasks."""
    from slimba.cli.options import write_json
    from slimba.errors import UserError
    from slimba.evaluation.perplexity import evaluate as measure
    from slimba.evaluation.perplexity import read_text
    from slimba.runtime.load import load

    if not text and not tasks:
        raise UserError("nothing to measure; give --text FILE or --tasks NAMES")
    if against and (not text or stride not in (None, window)):
        raise UserError("--against compares on --text in windows without overlap; give --text and no --stride")
    options: dict[str, Any] = {"backend": backend, "threads": threads, "tokenizer": tokenizer, "verify": not no_verify}
    loaded = load(model, state_dtype=state_dtype, activations=activations, **options)
    record: dict[str, Any] = {"model": model}
    if text:
        ids = read_text(
            loaded,
            text,
            split_documents=split_documents,  # type: ignore[arg-type]
            bos_id="model" if bos_id is None else None if bos_id == -1 else bos_id,
            max_tokens=max_tokens,
        )
        record |= {"text": [str(t) for t in text]}
        if against:
            from slimba.evaluation.compare import compare

            teacher = load(against, **options)
            both = compare(teacher, loaded, ids, window=window, batch=batch, show_progress=True)
            _print_comparison(against, model, both)
            record |= asdict(both) | {"against": against}
        else:
            result = measure(loaded, ids, window=window, stride=stride, batch=batch, show_progress=True)
            _print_result(model, result)
            record |= asdict(result)
    if tasks:
        from slimba.evaluation.harness import run_tasks

        record["tasks"] = run_tasks(loaded, tasks.split(","), limit=limit)
        _print_tasks(record["tasks"])
    if json_file:
        write_json(json_file, record)


def _print_result(model: str, r: Perplexity) -> None:
    typer.echo(f"{model}: perplexity {r.perplexity:.2f}, {r.bits_per_byte:.3f} bits per byte")
    _print_protocol(r)


def _print_protocol(r: Perplexity) -> None:
    typer.echo(f"{r.tokens:,} of {r.text_tokens:,} tokens, {r.bytes:,} bytes; window {r.window}, stride {r.stride}")
    typer.echo(r.protocol)
    numerics = f"activations {r.activations}, state {r.state_dtype}"
    typer.echo(f"backend {r.backend}, {numerics}, {r.seconds:.1f} s ({r.tokens / r.seconds:,.0f} tokens/s)")


def _print_comparison(teacher: str, model: str, both: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "perplexity", "bits per byte", "ratio", "KL in nats", "top-1 agreement")
    t, s = both.teacher, both.student
    table.add_row(teacher, f"{t.perplexity:.2f}", f"{t.bits_per_byte:.3f}", "1", "", "")
    table.add_row(
        model,
        f"{s.perplexity:.2f}",
        f"{s.bits_per_byte:.3f}",
        f"{both.ratio:.3f}",
        f"{both.kl:.4f}",
        f"{100 * both.agreement:.1f} %",
    )
    Console().print(table)
    _print_protocol(s)


def _print_tasks(tasks: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "figure", "value")
    for task, figures in tasks.items():
        for name, value in figures.items():
            table.add_row(task, name, f"{value:.4f}")
    Console().print(table)
