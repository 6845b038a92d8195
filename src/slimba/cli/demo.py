"""`slimba demo`: compress the bundled teacher in a few minutes on this CPU, measure both files, let both write.

Every figure of the table is computed here, from the packed file, by the CPU engine. Beside it stands what a full pass
over the teacher's text reached on a GPU: `assets/demo-text/full-pass.json`, with the commands that measured it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

import typer

from slimba.cli.options import JsonFile, Seed, Threads

TEACHER = "demo-teacher"
WINDOW = 512  # of the evaluation
PROMPT = "The people of the United States"
TRIAL_STEPS = 6  # timed before the run, to choose how many steps fit the minutes


@dataclass(slots=True)
class Measured:
    """One row of the table."""

    name: str
    file_bytes: int
    bits_per_weight: float
    perplexity: float
    tokens_per_second: float
    text: str


def demo(
    out: Annotated[Path, typer.Option("--out", help="Where the compressed model goes.")] = Path("slimba-demo"),
    minutes: Annotated[float, typer.Option(help="Minutes of distillation on this machine.")] = 3.0,
    seed: Seed = 0,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Compress the bundled model to one bit per weight, compare it with the original, let it write."""
    from slimba.checkpoints.atomic import check_target
    from slimba.cli.options import write_json
    from slimba.errors import UserError

    if not 0 < minutes <= 600:
        raise UserError(f"--minutes is {minutes}, it must be above 0 and at most 600")
    check_target(out, overwrite=True)
    try:
        import torch
    except ImportError:
        raise UserError('the demo compresses a model, which needs torch; pip install "slimba[train]"') from None
    if threads:
        torch.set_num_threads(threads)
    with as_file(files("slimba.assets") / "demo-text") as texts:
        typer.echo(f"1/3  measuring {TEACHER} on text that it has not seen")
        teacher = measure(TEACHER, TEACHER, texts / "heldout.txt", threads, seed)
        typer.echo(
            f"2/3  distilling it to one bit a weight and a little more where it counts, about {minutes:g} minutes"
        )
        record = distil(out, texts / "train.txt", minutes, seed)
        typer.echo(f"3/3  measuring {out}, the packed file, with the CPU engine")
        student = measure(out.name, str(out), texts / "heldout.txt", threads, seed)
        full_pass = json.loads((texts / "full-pass.json").read_text("utf-8"))
    show(teacher, student, record, full_pass)
    typer.echo(f"\n{PROMPT}{student.text}\n")
    typer.echo(f"talk to it:   slimba chat {out} --temperature 0.8\nlook into it: slimba inspect {out}")
    if json_file:
        write_json(json_file, {"teacher": teacher, "student": student, "run": record, "full_pass": full_pass})


def measure(name: str, model: str, text: Path, threads: int | None, seed: int) -> Measured:
    """Perplexity, bytes, speed and a paragraph of `model`, by the CPU engine."""
    from slimba.checkpoints.inventory import inventory_of
    from slimba.evaluation.perplexity import evaluate
    from slimba.runtime.load import load

    loaded = load(model, backend="cpu", threads=threads)
    perplexity = evaluate(loaded, [text], window=WINDOW, show_progress=True).perplexity
    runs = [loaded.generate(PROMPT, max_new_tokens=256).tokens_per_second for _ in range(6)]
    sample = loaded.generate(PROMPT, max_new_tokens=90, temperature=0.7, top_p=0.9, seed=seed)
    sizes = inventory_of(loaded.checkpoint)
    bits, speed = sizes.bits_per_projection_weight, statistics.median(runs[1:])  # the first one warms up
    return Measured(name, sizes.file_bytes, bits, perplexity, speed, sample.text or "")


def distil(out: Path, text: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Compress with the demo's recipe, as many steps as the minutes hold on this machine."""
    from slimba.methods.run import compress

    with as_file(files("slimba.recipes") / "demo.yaml") as recipe, tempfile.TemporaryDirectory() as scratch:

        def run(target: Path, tokens: int) -> dict[str, Any]:
            return compress(
                TEACHER, target, recipe=recipe, data=[text], tokens=tokens, seed=seed, device="cpu", overwrite=True
            )

        started = time.monotonic()
        trial = run(Path(scratch) / "trial", TRIAL_STEPS * tokens_per_step(recipe))
        left = minutes * 60 - (time.monotonic() - started)
        steps = max(TRIAL_STEPS, int(left / (trial["seconds"] / trial["steps"])))
        return run(out, steps * tokens_per_step(recipe))


def tokens_per_step(recipe: Path) -> int:
    from slimba.methods.dfssm.recipe import DfssmRecipe
    from slimba.training.recipes import load_recipe

    r = load_recipe(DfssmRecipe, "dfssm.yaml", recipe, {})
    return r.window * r.batch


def show(teacher: Measured, student: Measured, record: dict[str, Any], full_pass: dict[str, Any]) -> None:
    """The one table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"held-out text, windows of {WINDOW}, measured from the files by the CPU engine")
    for column in ("model", "bytes", "bits/weight", "perplexity", "ratio", "tokens/s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for m in (teacher, student):
        table.add_row(
            m.name,
            f"{m.file_bytes:,}",
            f"{m.bits_per_weight:.2f}",
            f"{m.perplexity:.2f}",
            f"{m.perplexity / teacher.perplexity:.2f}x",
            f"{m.tokens_per_second:,.0f}",
        )
    table.add_row(
        f"[dim]the default recipe, a full pass on {full_pass['device']}",
        f"[dim]{full_pass['file_bytes']:,}",
        f"[dim]{full_pass['bits_per_projection_weight']:.2f}",
        f"[dim]{full_pass['perplexity']:.2f}",
        f"[dim]{full_pass['perplexity'] / full_pass['teacher_perplexity']:.2f}x",
        "",
    )
    Console().print(table)
    smaller = teacher.file_bytes / student.file_bytes
    typer.echo(
        f"{smaller:.1f} times smaller after {record['tokens']:,} tokens in {record['seconds']:.0f} s;"
        f" the full pass took {full_pass['tokens']:,} tokens and {full_pass['seconds']:.0f} s"
    )
