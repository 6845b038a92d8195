"""`slimba report OUT...`: one self-contained HTML page about a compressed model, or a comparison of several.

Run the tests: `pytest tests/evaluation/test_report.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="OUT...",
            help="Models: directories, hub ids or bundled names. A .json file among them "
            "counts as --results, so that a shell pattern may follow that option.",
        ),
    ],
    html: Annotated[Path, typer.Option("--html", help="The page to write.")] = Path("report.html"),
    against: Annotated[
        str | None, typer.Option("--against", help="Teacher: gives the error of every layer and a line in the table.")
    ] = None,
    results: Annotated[
        list[Path] | None, typer.Option("--results", help="A file that `slimba eval --json` wrote; may be repeated.")
    ] = None,
    quality_table: Annotated[
        Path | None,
        typer.Option("--table", help="A quality table of benchmarks/baselines: every arm, ablations, baselines."),
    ] = None,
) -> None:
    """Write what a model weighs, how it was trained and how good it is as one HTML page."""
    from slimba.evaluation.report import check_page, write_report
    from slimba.evaluation.report import report as build

    files = [m for m in models if m.endswith(".json") and Path(m).is_file()]
    check_page(html)
    page = build(
        [m for m in models if m not in files],
        against=against,
        results=[*(results or []), *map(Path, files)],
        quality_table=quality_table,
        show_progress=True,
    )
    write_report(html, page)
    typer.echo(f"wrote {html}, {len(page.encode()):,} bytes")
