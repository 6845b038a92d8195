"""`slimba report`: one self-contained HTML page about one packed model, or a comparison of several.

    page = report(["model-1bit"], against="teacher", results=[Path("eval.json")])
    write_report(Path("report.html"), page)

The page needs no other file, no network and no script; it follows the reader's light or dark setting and prints.
Figures come from the models on disk (`checkpoints/inventory.py`), their training logs and the files that `slimba eval
--json` wrote; what is missing is said in words. No torch.

Run the tests: `pytest tests/evaluation/test_report.py`.
"""

from __future__ import annotations

import importlib.resources
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, tostring

from slimba import __version__
from slimba.checkpoints.atomic import atomic_write
from slimba.checkpoints.inventory import describe_value
from slimba.checkpoints.reader import find_model
from slimba.errors import UserError
from slimba.evaluation.report_data import Model, Result, layer_errors, match_results, short_names
from slimba.evaluation.report_page import (
    Child,
    decimals,
    h,
    is_number,
    missing,
    model_section,
    percent,
    table,
    two_sizes,
)
from slimba.evaluation.report_svg import Point, scatter
from slimba.evaluation.report_table import read_table, table_section

__all__ = ["check_page", "report", "write_report"]

GENERATOR = "slimba report"
NEAR = 1.5  # arms up to this multiple of the lowest perplexity are drawn once more, by themselves


def report(
    models: Sequence[str],
    *,
    against: str | None = None,
    results: Sequence[Path] = (),
    quality_table: Path | None = None,
    show_progress: bool = False,
) -> str:
    """The page's text. `models` and `against` are MODEL arguments, `results` files of `slimba eval --json`.

    `quality_table` is a file of benchmarks/baselines/quality_table.py, shown first. Raises UserError: no model, a model
    named twice, one that cannot be opened, a results file, table or training log that is not one, a teacher that has
    the shapes of none of the models.
    """
    every_arm = table_section(read_table(quality_table)) if quality_table else None
    arms = _open(models, against)
    unmatched = match_results(arms, results)
    if against is not None:
        _add_errors(arms, against, show_progress)
    title = arms[0].name if len(models) == 1 else f"{len(models)} models"
    anchors = [f"model-{i}" for i in range(1, len(arms) + 1)]
    comparison = _comparison(arms, anchors, [r.is_teacher for r in arms])
    shown = [(m, a) for m, a in zip(arms, anchors, strict=True) if not m.is_teacher or len(arms) > 2]
    body = h(
        "body",
        h("header", h("h1", f"Slimba: {title}"), h("p", _subtitle(arms, against), class_="what")),
        every_arm,
        *([comparison] if len(models) > 1 or _plotted(arms) else []),
        *(model_section(m, a) for m, a in shown),
        h("footer", *_footer(unmatched)),
    )
    return _document(f"Slimba: {title}", body)


def check_page(path: Path) -> None:
    """UserError where `path` holds something other than a page of ours: asked before the work and before writing."""
    if path.is_dir():
        raise UserError(f"{path} is a directory; --html takes the file to write")
    if path.exists() and f'content="{GENERATOR} ' not in _first_bytes(path):
        raise UserError(f"{path} exists and is not a page of slimba report; choose another name")


def write_report(path: Path, page: str) -> None:
    """Write the page in one step."""
    check_page(path)
    atomic_write(path, page)


def _first_bytes(path: Path) -> str:
    try:
        with open(path, "rb") as f:
            return f.read(1000).decode("utf-8", errors="replace")
    except OSError as e:
        raise UserError(f"cannot look at {path}: {e.strerror}; choose another name") from None


# ---------------------------------------------------------------------------------------------------------- the arms


def _open(models: Sequence[str], against: str | None) -> list[Model]:
    """Every model, and the teacher as a further arm unless it is one of them."""
    if not models:
        raise UserError("give at least one model directory to report on")
    paths = [find_model(m).resolve() for m in models]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise UserError(f"{models[i]} is named twice")
    teacher = find_model(against).resolve() if against is not None else None
    given = [*models, *([against] if against is not None and teacher not in paths else [])]
    names = short_names(given)
    arms = []
    for i, (m, name) in enumerate(zip(given, names, strict=True)):
        is_teacher = i >= len(models) or paths[i] == teacher
        arms.append(Model.open(m, name, is_teacher=is_teacher))
    return arms


def _add_errors(arms: Sequence[Model], against: str, show_progress: bool) -> None:
    teacher = next(m for m in arms if m.is_teacher)
    students = [m for m in arms if not m.is_teacher]
    for m in students:
        m.errors = layer_errors(m.checkpoint, teacher.checkpoint, against, show_progress=show_progress)
    if students and all(m.errors is None for m in students):
        raise UserError(f"--against {against} has other shapes than {students[0].given}; give the teacher it came from")


# ---------------------------------------------------------------------------------------------------------- comparison

Arm = tuple[int, Model, Result]


def _plotted(arms: Sequence[Model]) -> bool:
    """Whether some text was used to measure two of the arms."""
    return any(len({n for n, _, _ in rows}) > 1 for rows in _by_text(arms).values())


def _by_text(arms: Sequence[Model]) -> dict[tuple[str, ...], list[Arm]]:
    """Measured arms by protocol, each ranked by total bytes; numbers are those of the table of all arms."""
    out: dict[tuple[str, ...], list[Arm]] = {}
    for number, m in _ranked(arms):
        for r in m.results:
            if r.perplexity is not None:
                out.setdefault(r.protocol, []).append((number, m, r))
    return out


def _ranked(arms: Sequence[Model]) -> list[tuple[int, Model]]:
    return list(enumerate(sorted(arms, key=lambda m: (m.inventory.file_bytes, m.name)), 1))


def _comparison(arms: Sequence[Model], anchors: Sequence[str], teachers: Sequence[bool]) -> Element:
    """Plot and ranked table for every text that was measured, then the sizes of all."""
    parts: list[Child] = []
    texts = _by_text(arms)
    links = {id(m): a for m, a, t in zip(arms, anchors, teachers, strict=True) if not t or len(arms) > 2}
    for protocol, rows in texts.items():
        parts += _one_text(protocol, rows, arms, links)
    if not texts:
        parts.append(missing("No quality figures: no file given with --results belongs to these models."))
    parts += [h("h3", "Sizes"), _sizes(arms, links), *_settings(arms)]
    return h("section", h("h2", "Quality per byte"), *parts)


def _one_text(
    protocol: tuple[str, ...], rows: Sequence[Arm], arms: Sequence[Model], links: Mapping[int, str]
) -> list[Child]:
    several = {n for n, _, _ in rows if sum(n == other for other, _, _ in rows) > 1}
    points = []
    for number, m, r in rows:
        label = m.name + (f" ({r.run})" if number in several else "")
        assert r.perplexity is not None
        points.append(Point(m.inventory.file_bytes, r.perplexity, label, number, hollow=m.is_teacher))
    out: list[Child] = [h("h3", f"On {protocol[0] or 'a text without a name'}")]
    if len({p.number for p in points}) > 1:
        caption = "Lower and further left is better; the line joins the arms that no other beats."
        caption += " The open circle is the teacher." if any(p.hollow for p in points) else ""
        caption += " A number stands for the arm of that number in the table." if len(points) > 9 else ""
        out.append(_plot(points, caption))
        near = [p for p in points if p.y <= NEAR * min(q.y for q in points)]
        if 2 < len(near) < len(points):
            out.append(_plot(near, f"The same, only perplexities up to {NEAR} times the lowest."))
    out.append(_ranking(rows, links))
    absent = [m.name for _, m in _ranked(arms) if not any(m is other for _, other, _ in rows)]
    note = f"Protocol: {'; '.join(p for p in protocol if p)}."
    out.append(h("p", note, class_="note"))
    if absent:
        out.append(missing(f"Not measured on this text: {', '.join(absent)}."))
    return out


def _plot(points: Sequence[Point], caption: str) -> Element:
    title = "Perplexity against bytes"
    axes: dict[str, Any] = {"x_label": "bytes of weights, headers included", "y_label": "perplexity"}
    return two_sizes(scatter(title, points, **axes), scatter(title, points, **axes, width=380, height=340), caption)


def _ranking(rows: Sequence[Arm], links: Mapping[int, str]) -> Element:
    teacher = next((r.perplexity for _, m, r in rows if m.is_teacher), None)
    head = ["#", "model", "bytes", "bits per projection weight", "perplexity", "bits per byte"]
    head += [] if teacher is None else ["ratio to the teacher"]
    body: list[list[Child]] = []
    for number, m, r in rows:
        bits = f"{m.inventory.bits_per_projection_weight:.3f}"
        line: list[Child] = [str(number), _link(m, links), f"{m.inventory.file_bytes:,}", bits]
        line += [f"{r.perplexity:.2f}", decimals(r.figures["bits_per_byte"], 4)]
        if teacher is not None and r.perplexity is not None:
            line.append(f"{r.perplexity / teacher:.3f}")
        body.append(line)
    return table(head, body, left=2)


def _link(model: Model, links: Mapping[int, str]) -> Child:
    name = model.name + (" (teacher)" if model.is_teacher else "")
    anchor = links.get(id(model))
    return h("a", name, href=f"#{anchor}") if anchor else name


def _sizes(arms: Sequence[Model], links: Mapping[int, str]) -> Element:
    head = ["#", "model", "bytes", "bits per projection weight", "embedding and head", "training tokens", "seconds"]
    body: list[list[Child]] = []
    for number, m in _ranked(arms):
        size, record = m.inventory, m.checkpoint.provenance
        tables = size.bytes.get("embedding", 0) + size.bytes.get("head", 0)
        line: list[Child] = [
            str(number),
            _link(m, links),
            f"{size.file_bytes:,}",
            f"{size.bits_per_projection_weight:.3f}",
        ]
        line += [percent(tables / size.file_bytes), _count(record.get("tokens")), _count(record.get("seconds"))]
        body.append(line)
    return table(head, body, left=2)


def _count(value: Any) -> str:
    return f"{value:,}" if is_number(value) else "not stated"


# ------------------------------------------------------------------------------------------------ settings that differ


def _settings(arms: Sequence[Model]) -> list[Child]:
    """The ablations: a table for each method and teacher that made several of the models with different settings."""
    families: dict[str, list[Model]] = {}
    for _, m in _ranked(arms):
        record = m.checkpoint.provenance
        if isinstance(record.get("recipe"), dict):
            families.setdefault(json.dumps([record.get("method"), record.get("teacher_sha256")]), []).append(m)
    texts = [p for p, rows in _by_text(arms).items() if len({n for n, _, _ in rows}) > 1]
    out: list[Child] = []
    for members in families.values():
        made = _settings_table(members, texts)
        if made is not None:
            method = members[0].checkpoint.provenance.get("method")
            out += [h("h3", f"Settings that differ, method {describe_value(method)}"), made]
            note = "Models that differ only in their seed share a row: mean ± standard deviation. The rest is equal."
            out.append(h("p", note, class_="note"))
    return out


def _settings_table(members: Sequence[Model], texts: Sequence[tuple[str, ...]]) -> Element | None:
    """One row for each set of settings, its columns those that differ; None where nothing does."""
    settings = {id(m): _flat(m) for m in members}
    keys = dict.fromkeys(k for s in settings.values() for k in s)
    differ = [k for k in keys if len({json.dumps(s.get(k)) for s in settings.values()}) > 1]
    if not differ:
        return None
    columns = [k for k in differ if k != "seed"]
    groups: dict[str, list[Model]] = {}
    for m in members:
        groups.setdefault(json.dumps([settings[id(m)].get(k) for k in columns]), []).append(m)
    body: list[list[Child]] = []
    for same in groups.values():
        line: list[Child] = [", ".join(m.name for m in same)]
        line += [_setting(settings[id(same[0])].get(k)) for k in columns]
        line += [_spread([r for m in same for r in m.results if r.protocol == p]) for p in texts]
        body.append(line)
    return table(["models", *columns, *(f"perplexity, {p[0]}" for p in texts)], body)


def _flat(model: Model) -> dict[str, Any]:
    record = model.checkpoint.provenance
    return {k: record.get(k) for k in ("tokens", "seed")} | {str(k): v for k, v in record["recipe"].items()}


def _setting(value: Any) -> str:
    if value is None:
        return "—"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else describe_value(value)


def _spread(results: Sequence[Result]) -> str:
    values = [r.perplexity for r in results if r.perplexity is not None]
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "not measured"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)})"


# ---------------------------------------------------------------------------------------------------------- the page


def _subtitle(arms: Sequence[Model], against: str | None) -> str:
    what = "What is in the file, what it cost, and how well it does, from the files on disk."
    return (
        what
        + (f" Teacher: {against}." if against else "")
        + ("" if len(arms) < 3 else " Tables rank the models by bytes.")
    )


def _footer(unmatched: Sequence[str]) -> list[Child]:
    out: list[Child] = [h("p", f"Written by slimba {__version__}. This page needs no network and no script.")]
    if unmatched:
        out.insert(0, missing(f"Results that belong to no model of this page: {'; '.join(unmatched)}."))
    return out


def _document(title: str, body: Element) -> str:
    css = (importlib.resources.files("slimba") / "evaluation" / "report.css").read_text(encoding="utf-8")
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", name="generator", content=f"{GENERATOR} {__version__}"),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("meta", name="color-scheme", content="light dark"),
        h("title", title),
    )
    style = Element("style")
    style.text = css
    head.append(style)
    for part in (*head, *body.iter("section"), *body.iter("tr"), *body.iter("h3"), *body.iter("figure")):
        part.tail = (part.tail or "") + "\n"  # lines of a length that an editor can show
    return "<!DOCTYPE html>\n" + tostring(h("html", head, body, lang="en"), encoding="unicode", method="html") + "\n"
