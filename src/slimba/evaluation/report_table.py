"""The quality table as a section of `slimba report`: every arm per byte, ablations, what was tried, curves, the state.

    table = read_table(Path("quality-table.json"))       # what benchmarks/baselines/quality_table.py wrote
    table_section(table)

Run the tests: `pytest tests/evaluation/test_report_table.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from slimba.errors import UserError
from slimba.evaluation.report_page import Child, decimals, h, is_number, missing, table, two_sizes
from slimba.evaluation.report_svg import HUGE, SERIES, Point, line_chart, scatter

__all__ = ["read_table", "table_section"]

NEAR = (1.5, 1.15)  # arms up to these multiples of the best perplexity of an arm are drawn again, by themselves
WRITER = "benchmarks/baselines/quality_table.py"


def read_table(path: Path) -> dict[str, Any]:
    """The table, checked as far as the page relies on it. UserError: unreadable, not JSON, not such a table."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read the table {path}: {e.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON; --table takes what {WRITER} wrote") from None
    if not isinstance(data, dict) or data.get("table") != "quality" or not isinstance(data.get("arms"), list):
        raise UserError(f"{path} is not a quality table; --table takes what {WRITER} wrote")
    for arm in data["arms"]:
        try:
            mean = arm["test"]["perplexity"]["mean"]
            good = 1 <= mean < HUGE and is_number(mean) and arm["file_bytes"] > 0 and isinstance(arm["name"], str)
            good = good and is_number(arm["bits_per_projection_weight"]) and bool(arm["seeds"])
        except (KeyError, TypeError):
            good = False
        if not good:
            name = arm.get("name", "one without a name") if isinstance(arm, dict) else "one that is no object"
            raise UserError(f"{path}: the arm {name!r} lacks a figure of the table; write it again with {WRITER}")
    return data


def table_section(data: Mapping[str, Any]) -> Element:
    """Everything about the table, with the anchor `table`."""
    arms = data["arms"]
    parts: list[Child] = [
        h("h2", "Every arm, ranked by bytes", id="table"),
        h("p", _summary(data), class_="what"),
        *_plots(data),
        _ranking(data),
        h("p", _notes(data), class_="note"),
    ]
    parts += _ablations(data.get("ablations") or [])
    parts += _curves(arms)
    parts += _tried(data.get("not_chosen") or [])
    parts += _state(data.get("state"))
    return h("section", *parts)


def _summary(data: Mapping[str, Any]) -> str:
    """What the table shows about ours against the baselines, counted from it."""
    baselines = [a for a in data["arms"] if a.get("family") == "baseline"]
    mine = [a for a in data["arms"] if a.get("family") == "ours"]
    beaten = [a for a in baselines if a.get("beaten_by")]
    text = f"{len(mine)} of ours and {len(baselines)} baselines on {data.get('text', 'a text without a name')}."
    if baselines and mine:
        smallest = min(a["file_bytes"] for a in mine)
        small = [a["name"] for a in baselines if a["file_bytes"] < smallest]
        text += f" Ours reach a lower perplexity in at most the same bytes than {len(beaten)} of the baselines."
        text += f" Smaller than the smallest of ours: {', '.join(small)}." if small else ""
    return text


def _plots(data: Mapping[str, Any]) -> list[Child]:
    points = []
    for number, arm in enumerate(data["arms"], 1):
        p = arm["test"]["perplexity"]
        each = [v for v in p.get("each", []) if is_number(v)]
        span = (min(each), max(each)) if len(each) > 1 else None
        mine = arm.get("family") == "ours"
        points.append(Point(arm["file_bytes"], p["mean"], arm["name"], number, mark="ours" if mine else "", span=span))
    caption = "Lower and further left is better; the line joins the arms that no other beats. Ours are squares; "
    caption += "a bar spans the seeds. A number stands for the arm of that number in the table."
    best = min(p.y for p in points)
    teacher = _teacher_figure(data)
    level = f" The teacher, with {data['teacher']['file_bytes']:,} bytes, has {teacher:.2f}." if teacher else ""
    out: list[Child] = [_plot(points, caption + level)]
    drawn = len(points)
    for factor in NEAR:
        near = [p for p in points if p.y <= factor * best]
        if 2 < len(near) < drawn:
            out.append(_plot(near, f"The same, only perplexities up to {factor} times the lowest."))
            drawn = len(near)
    return out


def _plot(points: Sequence[Point], caption: str) -> Element:
    axes: dict[str, Any] = {"x_label": "bytes of the whole file, all parts counted", "y_label": "test perplexity"}
    title = "Perplexity against bytes, every arm"
    wide = scatter(title, points, **axes, width=720, height=460)
    return two_sizes(wide, scatter(title, points, **axes, width=380, height=340), caption)


def _teacher_figure(data: Mapping[str, Any]) -> float | None:
    test = (data.get("teacher") or {}).get("test") or {}
    return _finite(test.get("perplexity"))


def plus_minus(value: Mapping[str, Any] | None, digits: int) -> str:
    """Mean, and the standard deviation where there were several."""
    if not value or not is_number(value.get("mean")):
        return "—"
    sd = value.get("sd")
    return f"{value['mean']:.{digits}f}" + (f" ± {sd:.{digits}f}" if is_number(sd) else "")


def _ranking(data: Mapping[str, Any]) -> Element:
    teacher = _teacher_figure(data)
    head = ["#", "arm", "what it is", "bytes", "bits per projection weight", "perplexity", "bits per byte"]
    head += ["ratio to the teacher"] if teacher else []
    head += ["valid", "seeds", "tokens", "seconds", "frontier"]
    rows: list[list[Child]] = []
    for number, arm in enumerate(data["arms"], 1):
        name = h("b", arm["name"]) if arm.get("family") == "ours" else arm["name"]
        about = str(arm.get("about", "")) + (" (simulated)" if arm.get("simulated") else "")
        test = arm["test"]
        line: list[Child] = [str(number), name, about, f"{arm['file_bytes']:,}"]
        line += [f"{arm['bits_per_projection_weight']:.3f}", plus_minus(test["perplexity"], 2)]
        line.append(plus_minus(test.get("bits_per_byte"), 4))
        line += [f"{test['perplexity']['mean'] / teacher:.3f}"] if teacher else []
        line += [plus_minus((arm.get("valid") or {}).get("perplexity"), 2), str(len(arm["seeds"]))]
        line += [_count(arm.get("tokens")), decimals(_finite(arm.get("seconds")), 0)]
        line.append("yes" if arm.get("frontier") else "")
        rows.append(line)
    return table(head, rows, left=3)


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and is_number(value) else None


def _count(value: Any) -> str:
    return f"{value:,}" if is_number(value) else "—"


def _notes(data: Mapping[str, Any]) -> str:
    devices = sorted({str(a["device"]) for a in data["arms"] if a.get("device")})
    text = f"Protocol: {data.get('text', '')}; {data.get('protocol', '')}; {_count(data.get('tokens'))} tokens. "
    text += "Bytes are those of the weight file, header included. Simulated: no packed format exists, the numbers were "
    text += "held in float32 and the bytes counted with all parts. Mean ± standard deviation over the seeds. "
    return text + f"Seconds are of training or fitting, on {', '.join(devices) or 'a device that is not stated'}."


# ------------------------------------------------------------------------------------------------- the smaller tables


def _ablations(rows: Sequence[Mapping[str, Any]]) -> list[Child]:
    """Each choice against the first row, which is the recipe as it is."""
    if not rows:
        return []
    base = _finite((rows[0].get("valid") or {}).get("mean"))
    body: list[list[Child]] = []
    for row in rows:
        valid = row.get("valid") or {}
        mean, each = _finite(valid.get("mean")), valid.get("each") or []
        change = f"{mean - base:+.2f}" if mean is not None and base is not None and row is not rows[0] else ""
        cells: list[Child] = [str(row.get("change", "")), decimals(_finite(row.get("bits")), 3), plus_minus(valid, 2)]
        body.append([*cells, str(len(each)), change, _count(row.get("tokens"))])
    head = ["what is changed", "bits per projection weight", "valid perplexity", "seeds", "against the first", "tokens"]
    note = "One choice of the recipe changed at a time; mean ± standard deviation over the seeds."
    return [h("h3", "Ablations"), table(head, body), h("p", note, class_="note")]


def _curves(arms: Sequence[Mapping[str, Any]]) -> list[Child]:
    """KL over the tokens, as many arms a chart as there are colours."""
    drawn = [(a["name"], [p for p in a.get("curve") or [] if _is_point(p)]) for a in arms]
    drawn = [(name, curve) for name, curve in drawn if len(curve) > 1]
    if not drawn:
        return []
    charts: list[Child] = []
    for at in range(0, len(drawn), SERIES):
        some = drawn[at : at + SERIES]
        x = sorted({p[0] for _, curve in some for p in curve})
        lines = {}
        for name, curve in some:
            known = {p[0]: p[1] for p in curve}
            lines[name] = _between(x, known)
        title = f"KL over the tokens, {', '.join(name for name, _ in some)}"
        axes: dict[str, Any] = {"x_label": "training tokens", "y_label": "KL, nats per token"}
        wide = line_chart(title, x, lines, **axes, width=720, height=320)
        narrow = line_chart(title, x, lines, **axes, width=380, height=300)
        charts.append(two_sizes(wide, narrow, "KL divergence from the teacher while training, first seed."))
    return [h("h3", "Loss curves"), *charts]


def _is_point(p: Any) -> bool:
    return isinstance(p, list) and len(p) == 2 and all(is_number(v) for v in p)


def _between(x: Sequence[float], known: Mapping[float, float]) -> list[float | None]:
    """The curve at every place of x, straight between its points, a gap outside of them."""
    places = sorted(known)
    out: list[float | None] = []
    k = 0
    for v in x:
        while k + 1 < len(places) and places[k + 1] <= v:
            k += 1
        if v < places[0] or v > places[-1]:
            out.append(None)
        elif v == places[k] or k + 1 == len(places):
            out.append(known[places[k]])
        else:
            a, b = places[k], places[k + 1]
            out.append(known[a] + (known[b] - known[a]) * (v - a) / (b - a))
    return out


def _tried(rows: Sequence[Mapping[str, Any]]) -> list[Child]:
    """Learning rates that were screened and grids that were not chosen."""
    if not rows:
        return []
    body: list[list[Child]] = []
    for r in rows:
        name = str(r.get("variant") or r.get("arm", ""))
        rate = f"{r['lr']:g}" if is_number(r.get("lr")) else "—"
        figures = [decimals(_finite(r.get(s)), 2) for s in ("valid", "test")]
        body.append([name, rate, _count(r.get("tokens")), str(r.get("seed", "")), *figures])
    head = ["arm", "learning rate", "tokens", "seed", "valid", "test"]
    note = "What each baseline was chosen from, by the perplexity on valid."
    return [h("h3", "Screens of the baselines"), table(head, body), h("p", note, class_="note")]


def _state(state: Any) -> list[Child]:
    """The recurrent state in fewer bits: what state_field.py measured."""
    if not isinstance(state, dict):
        return []
    rows = [r for r in state.get("rows") or [] if isinstance(r, dict)]
    if not rows:
        return [h("h3", "The recurrent state in fewer bits"), missing("The study holds no rows.")]
    body: list[list[Child]] = []
    for r in rows:
        cells: list[Child] = [str(r.get("case", "")), _count(r.get("tokens_between_storings"))]
        cells.append(decimals(_finite(r.get("bits_per_entry")), 2))
        errors = ("state_error", "feature_error", "feature_error_first_quarter", "feature_error_last_quarter")
        cells += [_percent(r.get(k)) for k in errors]
        body.append([*cells, decimals(_finite(r.get("perplexity")), 3)])
    head = [
        "state",
        "tokens between storings",
        "bits per entry",
        "error of a state stored once",
        "error of the features",
    ]
    head += ["in the first quarter", "in the last quarter", "perplexity"]
    what = (
        f"{state.get('teacher', '')}, {state.get('sequences', '')} sequences of {_count(state.get('length'))} tokens "
    )
    what += f"of {state.get('text', '')}; errors are relative, against a float32 state. {state.get('protocol', '')}."
    return [h("h3", "The recurrent state in fewer bits"), table(head, body), h("p", what, class_="note")]


def _percent(value: Any) -> str:
    return f"{100 * value:.2f} %" if is_number(value) and math.isfinite(value) else "—"
