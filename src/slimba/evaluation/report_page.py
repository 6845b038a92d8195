"""The sections that `slimba report` writes for each model: quality, bytes, formats, training, errors, provenance.

Everything is built as elements (`h`), so a name from a config or a file can add text to the page but no markup. What a
model lacks is said in words where its figures would stand.

Run the tests: `pytest tests/evaluation/test_report.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from slimba.checkpoints.inventory import describe_value, layer_groups
from slimba.evaluation.report_data import LOG, Model, Result
from slimba.evaluation.report_svg import HUGE, bar, clean, line_chart

__all__ = ["decimals", "h", "is_number", "missing", "model_section", "percent", "table", "two_sizes"]

Child = Element | str | None

# (name in the log, caption); whatever else a log holds follows them under its own name
CURVES = {
    "kl": "KL divergence from the teacher, nats per token",
    "hidden": "Relative squared error of the hidden states",
    "grad_norm": "Gradient norm before clipping",
    "loss": "Loss",
}
# key of the recipe, a fraction of the steps -> what begins there
PHASES = {
    "hidden_until": "hidden off",
    "round_from": "rounding",
    "freeze_from": "frozen",
}
PART_NAMES = ("in_proj", "z", "x", "B", "C", "dt", "x_proj", "dt_proj", "out_proj")


def h(tag: str, *children: Child, **attributes: str) -> Element:
    """An HTML element; `class_` is class. Text is kept as text and loses characters that no page can hold."""
    out = Element(tag, {k.rstrip("_").replace("_", "-"): clean(v) for k, v in attributes.items()})
    last: Element | None = None
    for child in children:
        if isinstance(child, str):
            if last is None:
                out.text = (out.text or "") + clean(child)
            else:
                last.tail = (last.tail or "") + clean(child)
        elif child is not None:
            out.append(child)
            last = child
    return out


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def table(head: Sequence[str], rows: Sequence[Sequence[Child]], *, left: int = 1) -> Element:
    """A table that scrolls sideways on a narrow screen; the first `left` columns are text, the others figures."""
    body = h("tbody", *(h("tr", *(_cell("td", c, i < left) for i, c in enumerate(row))) for row in rows))
    top = h("thead", h("tr", *(_cell("th", c, i < left) for i, c in enumerate(head))))
    return h("div", h("table", top, body), class_="scroll")


def _cell(tag: str, content: Child, is_text: bool) -> Element:
    return h(tag, content, **({} if is_text else {"class_": "n"}))


def figure(svg: Element, caption: str) -> Element:
    return h("figure", svg, h("figcaption", caption))


def two_sizes(wide: Element, narrow: Element, caption: str) -> Element:
    """One chart drawn twice: for a page and for a phone, where the first one's letters would be too small."""
    return h("figure", h("div", wide, class_="wide"), h("div", narrow, class_="narrow"), h("figcaption", caption))


def missing(text: str) -> Element:
    return h("p", text, class_="missing")


def model_section(model: Model, anchor: str) -> Element:
    """Everything about one model."""
    spec = model.checkpoint.spec
    what = (
        f"{spec.architecture}, {spec.n_layer} layers of width {spec.d_model}, {model.inventory.parameters:,} parameters"
    )
    return h(
        "section",
        h("h2", model.name, id=anchor),
        h("p", f"{what}. ", h("code", model.given), class_="what"),
        _cards(model),
        h("h3", "Quality"),
        *_quality(model),
        h("h3", "Where the bytes go"),
        *_bytes(model),
        h("h3", "Formats"),
        *_formats(model),
        h("h3", "Training"),
        *_training(model),
        h("h3", "Error of the weights, layer by layer"),
        *_errors(model),
        h("h3", "Where it came from"),
        *_provenance(model),
        class_="model",
    )


def _cards(model: Model) -> Element:
    inventory = model.inventory
    cards = [
        (f"{inventory.file_bytes:,}", "bytes of weights, headers included"),
        (f"{inventory.bits_per_projection_weight:.3f}", "bits per projection weight, all parts counted"),
        (f"{inventory.bits_per_parameter:.3f}", "bits per parameter, whole file"),
    ]
    measured = [r for r in model.results if r.perplexity is not None]
    if measured:
        cards.append((f"{measured[0].perplexity:.2f}", f"perplexity on {measured[0].text}"))
    return h("div", *(h("div", h("b", value), h("span", name)) for value, name in cards), class_="cards")


# ---------------------------------------------------------------------------------------------------------- quality


def _quality(model: Model) -> list[Child]:
    if not model.results:
        return [missing("Not measured: no file given with --results belongs to this model.")]
    out: list[Child] = []
    measured = [r for r in model.results if r.perplexity is not None]
    if measured:
        out.append(_measured_table(measured))
        out += [h("p", _protocol(r), class_="note") for r in measured]
    rows = [
        [task, name, f"{value:.4f}"]
        for r in model.results
        for task, figures in r.tasks.items()
        for name, value in figures.items()
    ]
    if rows:
        out.append(table(["task", "figure", "value"], rows, left=2))
    return out


def _measured_table(rows: Sequence[Result]) -> Element:
    """Perplexities on one text; with a comparison's figures only where some row has them."""
    compared = any(r.comparison for r in rows)
    head = ["text", "perplexity", "bits per byte"] + (["ratio", "KL, nats", "top-1 agreement"] if compared else [])
    body: list[list[Child]] = []
    for r in rows:
        line: list[Child] = [r.text, f"{r.perplexity:.2f}", decimals(r.figures["bits_per_byte"], 4)]
        if compared:
            c = r.comparison
            line += [decimals(c.get("ratio"), 3), decimals(c.get("kl"), 4)]
            line.append(percent(c["agreement"]) if "agreement" in c else "—")
        body.append(line)
    return table(head, body)


def decimals(value: float | None, digits: int) -> str:
    return "—" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _protocol(r: Result) -> str:
    f = r.figures
    counts = (
        f"{int(f['tokens']):,} tokens, {int(f['bytes']):,} bytes, window {int(f['window'])}, stride {int(f['stride'])}"
    )
    against = f" Compared with {r.against}." if r.against else ""
    source = f"{r.file}, which measured {r.model} (matched by {r.matched_by})"
    return f"{r.text}: {counts}; {r.protocol[-1]}; {r.run}. From {source}.{against}"


# ------------------------------------------------------------------------------------------------ bytes and formats


def _bytes(model: Model) -> list[Child]:
    inventory = model.inventory
    biggest = max(inventory.bytes.values())
    rows: list[list[Child]] = []
    for name, size in inventory.bytes.items():
        weights = inventory.weights.get(name)
        bits = f"{8 * size / weights:.3f}" if weights else ""
        rows.append([name, bar(size / biggest), f"{size:,}", percent(size / inventory.file_bytes), bits])
    rows.append(
        [h("b", "all"), "", h("b", f"{inventory.file_bytes:,}"), "100.0 %", f"{inventory.bits_per_parameter:.3f}"]
    )
    return [
        table(["component", "", "bytes", "share", "bits per weight"], rows, left=2),
        h(
            "p",
            f"Projections with their scales and corrections: {inventory.projection_bytes:,} bytes for "
            f"{inventory.projection_weights:,} weights.",
            class_="note",
        ),
    ]


def _formats(model: Model) -> list[Child]:
    checkpoint = model.checkpoint
    rows: list[list[Child]] = []
    for group in layer_groups(checkpoint.spec, checkpoint.layouts):
        first, last = group["first"], group["last"]
        where = f"layer {first}" if first == last else f"layers {first} to {last}"
        rows += [[where, name, h("code", text)] for name, text in group["formats"].items()]
    names = ["backbone.embeddings", *([] if checkpoint.spec.tie_embeddings else ["lm_head"])]
    rows += [["", n.rpartition(".")[2], h("code", checkpoint.layouts[n].describe())] for n in names]
    numerics = ", ".join(f"{k} {v}" for k, v in checkpoint.numerics.items())
    return [
        table(["where", "matrix", "format (rows in each format, rank of the correction)"], rows, left=3),
        h("p", f"Computed with: {numerics}." if numerics else "The numerics are not stated.", class_="note"),
    ]


# --------------------------------------------------------------------------------------------------------- training


def _training(model: Model) -> list[Child]:
    if not model.log:
        what = "has no training log" if model.log is None else "has an empty training log"
        return [missing(f"The directory {what} ({LOG}), so there are no curves.")]
    by_tokens = all("tokens" in row for row in model.log)
    x = [row["tokens" if by_tokens else "step"] for row in model.log]
    charts: list[Child] = []
    for name in _curve_names(model.log):
        values = [row.get(name) for row in model.log]
        if any(v is not None and abs(v) < HUGE for v in values):
            svg = line_chart(
                f"{name} of {model.name}",
                x,
                {name: values},
                x_label="training tokens" if by_tokens else "step",
                y_label=name,
                marks=_phases(model, by_tokens),
            )
            charts.append(figure(svg, CURVES.get(name, name)))
    notes = f"{len(model.log):,} rows of {LOG}, as logged, each of one step's batch."
    if model.repeated:
        notes += f" {model.repeated:,} steps were logged twice because the run was resumed; the later row is drawn."
    if not _phases(model, by_tokens):
        notes += " The provenance gives no phases to mark."
    else:
        notes += " Dashed lines mark where the recipe's phases begin."
    return [h("div", *charts, class_="charts"), h("p", notes, class_="note")]


def _curve_names(log: Sequence[Mapping[str, float]]) -> list[str]:
    """What to draw, in order; the loss only where it is more than the KL."""
    found = dict.fromkeys(k for row in log for k in row if k not in ("step", "tokens", "seconds"))
    if "kl" in found and "hidden" in found:
        found.pop("loss", None)  # their weighted sum, with a weight that changes
    elif "kl" in found and all(row.get("loss") == row.get("kl") for row in log):
        found.pop("loss", None)
    return [n for n in CURVES if n in found] + [n for n in found if n not in CURVES]


def _phases(model: Model, by_tokens: bool) -> list[tuple[float, str]]:
    """Where the recipe's fractions lie on the x axis; none without a recipe or its number of steps."""
    record = model.checkpoint.provenance
    recipe, total = record.get("recipe"), record.get("tokens" if by_tokens else "steps")
    if not isinstance(recipe, dict) or not is_number(total):
        return []
    marks = [(recipe[k], word) for k, word in PHASES.items() if is_number(recipe.get(k))]
    return [(share * total, word) for share, word in marks if 0 < share < 1]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ----------------------------------------------------------------------------------------------------------- errors


def _errors(model: Model) -> list[Child]:
    if model.is_teacher:
        return [missing("This is the teacher that the others are compared with.")]
    if model.errors is None:
        return [missing("Not computed: --against TEACHER was not given, or its shapes are others than this model's.")]
    e = model.errors
    names = [n for n in PART_NAMES if n in e.layers]
    layers = range(model.checkpoint.spec.n_layer)
    parts = {n: e.layers[n] for n in names if n != "in_proj" and any(map(math.isfinite, e.layers[n]))}
    out: list[Child] = []
    if parts:
        axes: dict[str, Any] = {"x_label": "layer", "y_label": "relative squared error", "dots": len(layers) <= 24}
        title, x = f"Relative squared error by layer of {model.name}", [float(i) for i in layers]
        wide = line_chart(title, x, parts, **axes, width=720, height=300)
        narrow = line_chart(title, x, parts, **axes, width=380, height=280)
        out.append(two_sizes(wide, narrow, "Rows of in_proj by what they compute, and out_proj."))
    rows: list[list[Child]] = [[str(i), *(decimals(e.layers[n][i], 4) for n in names)] for i in layers]
    means = [float(sum(e.layers[n]) / len(layers)) for n in names]
    rows.append([h("b", "mean"), *(decimals(m, 4) for m in means)])
    out.append(table(["layer", *names], rows))
    tables = ", ".join(f"{n} {decimals(v, 5)}" for n, v in e.tables.items())
    said = {True: "It is the teacher that the provenance names.", None: "The provenance names no teacher to check."}
    said[False] = "It is NOT the teacher of the provenance: its weights have another SHA-256."
    out.append(
        h(
            "p",
            f"Against {e.teacher}. {said[e.same_teacher]} Compared are the products of each matrix with the weight of "
            "the norm before it, because column scales are folded into that norm. Distillation may move weights away "
            f"from the teacher's and improve the model: this is where they differ, not how good it is. Also: {tables}.",
            class_="note" if e.same_teacher is not False else "missing",
        )
    )
    return out


# ------------------------------------------------------------------------------------------------------- provenance


def _provenance(model: Model) -> list[Child]:
    record = dict(model.checkpoint.provenance)
    if not record:
        return [missing("The checkpoint says nothing about where it came from.")]
    recipe = record.pop("recipe") if isinstance(record.get("recipe"), dict) else None
    rows: list[list[Child]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            rows += [[f"{key}: {k}", _value(k, v)] for k, v in value.items()]
        else:
            rows.append([key, _value(key, value)])
    out: list[Child] = [table(["field", "value"], rows, left=2)]
    if recipe:
        out += [h("h4", "Recipe"), h("dl", *_pairs(recipe), class_="recipe")]
    elif not record.get("recipe"):
        out.append(missing("The provenance holds no recipe."))
    return out


def _pairs(recipe: Mapping[str, Any]) -> list[Element]:
    return [h("div", h("dt", k), h("dd", _value(k, v))) for k, v in recipe.items()]


def _value(key: str, value: Any) -> Child:
    if key == "seconds" and is_number(value) and 0 <= value < 1e9:
        spent = time.strftime("%H:%M:%S", time.gmtime(value % 86400))
        return f"{value:,} s ({int(value // 86400)} d {spent})" if value >= 86400 else f"{value:,} s ({spent})"
    if key in ("tokens", "steps") and is_number(value):
        return f"{value:,}"
    if "sha256" in key:
        return h("code", describe_value(value))
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return ", ".join(value)
    return describe_value(value)
