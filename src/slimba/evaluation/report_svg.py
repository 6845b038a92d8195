"""Charts of `slimba report`: small inline SVG, coloured by the page's style sheet, readable without a script.

    line_chart("KL", x, {"kl": values}, x_label="tokens", marks=[(0.5 * total, "hidden loss off")])
    scatter("Quality per byte", points, x_label="bytes", y_label="perplexity")

Colours are classes (`s0` to `s5` for series, `axis`, `grid`, `mark`), so that one drawing serves a light page, a dark
page and paper. Elements, not text, are built: whatever a name holds is escaped when the page is written.

Run the tests: `pytest tests/evaluation/test_report.py`.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree.ElementTree import Element

__all__ = ["HUGE", "SERIES", "Point", "bar", "clean", "frontier", "line_chart", "scatter"]

FONT = 11.0
SERIES = 6
HUGE = 1e100  # no figure of a model; keeps the arithmetic of the axes finite
MAX_POINTS = 600  # of a drawn line; longer ones are drawn as means of neighbours
LABEL_REACH = (9.0, 20.0, 34.0, 52.0, 74.0)  # how far from its point a label may stand
DIRECTIONS = ((1, 0), (-1, 0), (0, -1), (0, 1), (0.8, -0.8), (-0.8, -0.8), (0.8, 0.8), (-0.8, 0.8))


def clean(text: str) -> str:
    """Without control characters, lone surrogates and marks that turn the writing direction."""
    turns = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
    bad = {c for c in text if (ord(c) < 32 and c not in "\t\n") or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000}
    return "".join("\ufffd" if c in bad or ord(c) in turns else c for c in text)


def node(tag: str, text: str = "", **attributes: object) -> Element:
    """An SVG element; `class_` is class, underscores are hyphens, numbers are shortened."""
    out = Element(tag, {k.rstrip("_").replace("_", "-"): _text(v) for k, v in attributes.items()})
    out.text = clean(text)
    return out


def _text(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def text_width(text: str) -> float:
    """A generous estimate in pixels at the charts' font size."""
    return sum(FONT * (1.0 if unicodedata.east_asian_width(c) in "WF" else 0.63) for c in text)


def bar(share: float) -> Element:
    """A horizontal bar for a table cell, `share` of its width filled."""
    svg = node("svg", viewBox="0 0 100 10", preserveAspectRatio="none", class_="bar", aria_hidden="true")
    svg.append(node("rect", x=0, y=0, width=max(100.0 * share, 0.3), height=10, class_="fill"))
    return svg


# ------------------------------------------------------------------------------------------------------- axes


@dataclass(frozen=True, slots=True)
class Scale:
    """Values lo..hi to pixels start..end, linear or logarithmic."""

    lo: float
    hi: float
    start: float
    end: float
    log: bool = False
    whole: bool = False  # of things that are counted, such as layers: no ticks between

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float, *, log: bool, pad: float = 0.06) -> Scale:
        """Around `values` (not empty) with a margin; logarithmic only where all are positive."""
        lo, hi = min(values), max(values)
        log = log and lo > 1 / HUGE
        if log:
            margin = (hi / lo) ** pad if hi > lo else 1.3
            return cls(lo / margin, hi * margin, start, end, True)
        margin = pad * (hi - lo) or abs(hi) * 0.3 or 1.0
        return cls(lo - margin if lo < 0 or lo - margin > 0 else min(lo, 0.0), hi + margin, start, end)

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.lo) / math.log(self.hi / self.lo)
        else:
            share = (value - self.lo) / (self.hi - self.lo)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the range, about five."""
        ratio = self.hi / self.lo if self.log else 1.0
        if ratio > 2:
            low, high = math.floor(math.log10(self.lo)), math.ceil(math.log10(self.hi))
            steps = (1.0,) if ratio > 1e4 else (1.0, 3.0) if ratio > 100 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
            stride = 1 + (high - low) // 8
            values = [m * 10.0**e for e in range(low, high + 1, stride) for m in steps]
        else:
            raw = (self.hi - self.lo) / 5
            unit = 10.0 ** math.floor(math.log10(raw))
            step = next(m * unit for m in ((1, 2, 5, 10) if self.whole else (1, 2, 2.5, 5, 10)) if m * unit >= raw)
            step = max(step, 1.0) if self.whole else step
            first = math.ceil(self.lo / step)
            values = [k * step for k in range(first, math.floor(self.hi / step) + 1)]
        return [v for v in values if self.lo <= v <= self.hi]


def short_number(value: float) -> str:
    """For ticks: 1.5M, 20k, 0.05."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


def _frame(svg: Element, x: Scale, y: Scale, x_label: str, y_label: str) -> None:
    """Grid, tick labels and the names of both axes. y.start is the bottom of the plot, y.end its top."""
    for v in y.ticks():
        svg.append(node("line", x1=x.start, x2=x.end, y1=y(v), y2=y(v), class_="grid"))
        svg.append(node("text", short_number(v), x=x.start - 5, y=y(v) + 4, text_anchor="end", class_="tick"))
    last = -math.inf
    for v in x.ticks():
        label, at = short_number(v), x(v)
        if at - text_width(label) / 2 > last + 4:  # logarithmic ticks crowd at their right end
            svg.append(node("line", x1=at, x2=at, y1=y.start, y2=y.start + 4, class_="axis"))
            svg.append(node("text", label, x=at, y=y.start + 16, text_anchor="middle", class_="tick"))
            last = at + text_width(label) / 2
    svg.append(node("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"))
    svg.append(node("text", x_label, x=x.end, y=y.start + 31, text_anchor="end", class_="name"))
    svg.append(node("text", y_label, x=2, y=y.end - 8, class_="name"))


def _canvas(title: str, width: float, height: float) -> Element:
    svg = node("svg", viewBox=f"0 0 {width:g} {height:g}", role="img", class_="chart")
    svg.append(node("title", title))
    return svg


# ------------------------------------------------------------------------------------------------------ line charts


def line_chart(
    title: str,
    x: Sequence[float],
    lines: Mapping[str, Sequence[float | None]],
    *,
    x_label: str,
    y_label: str,
    marks: Sequence[tuple[float, str]] = (),
    width: float = 440,
    height: float = 230,
    dots: bool = False,
) -> Element:
    """Lines over a common x; None and non-finite values are gaps. `marks` are vertical lines with a word.

    The y axis is logarithmic where the values span more than a factor of four. ValueError where nothing can be drawn.
    """
    drawn = [(label, _runs(x, values)) for label, values in lines.items()]
    values = [v for _, runs in drawn for run in runs for _, v in run]
    rows = _mark_rows(marks, x, width)
    legend = _legend_rows(list(lines), width) if len(lines) > 1 else []
    legend_height = 10 + 13 * (1 + max(r for *_, r in legend)) if legend else 0
    top = 22.0 + legend_height + 13 * (1 + max((r for *_, r in rows), default=-1))
    positive = min(values) > 1 / HUGE and max(values) / min(values) > 4
    y = Scale.of(values, height - 36, top, log=positive)
    across = _across(x, width)
    svg = _canvas(title, width, height)
    _frame(svg, across, y, x_label, y_label)
    for at, word, anchor, row in rows:
        svg.append(node("line", x1=across(at), x2=across(at), y1=top - 4, y2=y.start, class_="mark"))
        shift = 3 if anchor == "start" else -3
        svg.append(
            node("text", word, x=across(at) + shift, y=top - 6 - 13 * row, text_anchor=anchor, class_="mark-name")
        )
    for i, (_, runs) in enumerate(drawn):
        for run in runs:
            _draw_run(svg, run, across, y, i % SERIES, dots=dots or len(run) == 1)
    for label, i, left, row in legend:
        svg.append(
            node("line", x1=left, x2=left + 16, y1=20 + 13 * row, y2=20 + 13 * row, class_=f"line s{i % SERIES}")
        )
        svg.append(node("text", label, x=left + 20, y=24 + 13 * row, class_="tick"))
    return svg


def _across(x: Sequence[float], width: float) -> Scale:
    """The x axis of a line chart, from 0 where the first value is near it."""
    lo, hi = min(x), max(x)
    lo = 0.0 if 0 < lo < 0.1 * hi else lo
    whole = all(v == int(v) for v in x)
    return Scale(lo, hi if hi > lo else lo + 1, 48, width - 10, whole=whole)


def _draw_run(svg: Element, run: list[tuple[float, float]], x: Scale, y: Scale, series: int, *, dots: bool) -> None:
    points = [(x(a), y(b)) for a, b in run]
    if len(points) > 1:
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        svg.append(node("path", d=path, class_=f"line s{series}"))
    for a, b in points if dots else ():
        svg.append(node("circle", cx=a, cy=b, r=2.2, class_=f"dot s{series}"))


def _runs(x: Sequence[float], values: Sequence[float | None]) -> list[list[tuple[float, float]]]:
    """Unbroken stretches of finite values; long ones thinned to means of neighbours. Beyond 1e100 nothing is drawn."""
    runs: list[list[tuple[float, float]]] = [[]]
    for a, v in zip(x, values, strict=True):
        if v is not None and abs(v) < HUGE:
            runs[-1].append((a, v))
        elif runs[-1]:
            runs.append([])
    size = -(-len(x) // MAX_POINTS)
    return [_thin(run, size) for run in runs if run]


def _thin(run: list[tuple[float, float]], size: int) -> list[tuple[float, float]]:
    pieces = [run[i : i + size] for i in range(0, len(run), size)]
    return [(p[-1][0], sum(v for _, v in p) / len(p)) for p in pieces]


def _mark_rows(
    marks: Sequence[tuple[float, str]], x: Sequence[float], width: float
) -> list[tuple[float, str, str, int]]:
    """(x, word, anchor, row): words that would touch go to different rows above the plot."""
    if not marks:
        return []
    across = _across(x, width)
    out: list[tuple[float, str, str, int]] = []
    ends: list[float] = []
    for at, word in sorted(marks):
        size, left, anchor = text_width(word) + 5, across(at), "start"
        if left + size > width:
            left, anchor = left - size, "end"
        row = next((i for i, end in enumerate(ends) if left >= end), len(ends))
        ends[row : row + 1] = [left + size]
        out.append((at, word, anchor, row))
    return out


def _legend_rows(labels: Sequence[str], width: float) -> list[tuple[str, int, float, int]]:
    """(label, series, left, row) from left to right, wrapped."""
    out, left, row = [], 48.0, 0
    for i, label in enumerate(labels):
        size = 34 + text_width(label)
        if left + size > width and left > 48:
            left, row = 48.0, row + 1
        out.append((label, i, left, row))
        left += size
    return out


# ------------------------------------------------------------------------------------------------- quality per byte


@dataclass(frozen=True, slots=True)
class Point:
    """One arm: x bytes, y perplexity (less is better in both), its name and its number in the table.

    `mark` is a further class, `ours` a square instead of a circle; `span` the least and largest y of several seeds.
    """

    x: float
    y: float
    label: str
    number: int
    hollow: bool = False
    mark: str = ""
    span: tuple[float, float] | None = None


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats: none has fewer bytes and at most their perplexity, or the reverse."""
    out: list[Point] = []
    for p in sorted(points, key=lambda p: (p.x, p.y)):
        if not out or p.y < out[-1].y:
            out.append(p)
    return out


def scatter(
    title: str, points: Sequence[Point], *, x_label: str, y_label: str, width: float = 720, height: float = 420
) -> Element:
    """Arms with their frontier as steps. A name that finds no room is drawn as its number in the table."""
    across = Scale.of([p.x for p in points], 48, width - 14, log=True, pad=0.14)
    y = Scale.of([p.y for p in points], height - 36, 28, log=True, pad=0.14)
    svg = _canvas(title, width, height)
    _frame(svg, across, y, x_label, y_label)
    best = frontier(points)
    path = f"M{across(best[0].x):.1f} {y(best[0].y):.1f}"
    path += "".join(f"H{across(p.x):.1f}V{y(p.y):.1f}" for p in best[1:])
    svg.append(node("path", d=path + f"H{across.end:.1f}", class_="frontier"))
    boxes = [(across(p.x) - 5, y(p.y) - 5, across(p.x) + 5, y(p.y) + 5) for p in points]
    on_frontier = {p.number for p in best}
    for p in points:
        if p.span:
            low, high = (min(max(y(v), y.end), y.start) for v in p.span)
            svg.append(node("line", x1=across(p.x), x2=across(p.x), y1=low, y2=high, class_="span"))
        if p.mark == "ours":
            dot = node("rect", x=across(p.x) - 4.5, y=y(p.y) - 4.5, width=9, height=9)
        else:
            dot = node("circle", cx=across(p.x), cy=y(p.y), r=4.5)
        kind = "arm hollow" if p.hollow else "arm best" if p.number in on_frontier else "arm"
        dot.set("class", f"{kind} {p.mark}".strip())
        dot.append(node("title", f"{p.label}: {short_number(p.x)} bytes, perplexity {p.y:.2f}"))
        svg.append(dot)
    steps = [(across(a.x), y(a.y), across(b.x), y(b.y)) for a, b in pairwise(best)]
    lines = [(x0, y0 - 1, x1, y0 + 1) for x0, y0, x1, _ in steps] + [
        (x1 - 1, y0, x1 + 1, y1) for _, y0, x1, y1 in steps
    ]
    lines.append((across(best[-1].x), y(best[-1].y) - 1, across.end, y(best[-1].y) + 1))
    inside = (across.start, y.end - 4, width, y.start)
    for p in points:
        _label(svg, p, across(p.x), y(p.y), boxes, lines, inside)
    return svg


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _label(svg: Element, point: Point, x: float, y: float, boxes: list[Box], lines: Sequence[Box], inside: Box) -> None:
    """The name beside its point where nothing is in the way, farther off with a leader, else its number."""
    name = point.label if len(point.label) <= 30 else point.label[:29] + "…"
    for word, obstacles in ((name, lines), (name, ()), (str(point.number), ())):  # the frontier may be written over
        w = text_width(word)
        for reach in LABEL_REACH:
            for dx, dy in DIRECTIONS:
                cx = x + dx * (reach + w / 2 if abs(dx) == 1 else reach + w / 4)
                cy = y + dy * (reach + 2)
                box = (cx - w / 2, cy - 6, cx + w / 2, cy + 6)
                if _fits(box, [*boxes, *obstacles], inside):
                    boxes.append(box)
                    if reach > LABEL_REACH[0]:
                        edge = min(max(x, box[0]), box[2])
                        svg.append(node("line", x1=x, y1=y, x2=edge, y2=cy - 6 * dy, class_="leader"))
                    anchor = "start" if dx == 1 else "end" if dx == -1 else "middle"  # fonts differ: exact at the point
                    at = {"start": box[0], "end": box[2], "middle": cx}[anchor]
                    svg.append(node("text", word, x=at, y=cy + 4, text_anchor=anchor, class_="arm-name"))
                    return
    svg.append(node("text", str(point.number), x=x + 7, y=y + 4, class_="arm-name"))


def _fits(box: Box, boxes: Sequence[Box], inside: Box) -> bool:
    if box[0] < inside[0] or box[1] < inside[1] or box[2] > inside[2] or box[3] > inside[3]:
        return False
    return all(box[2] < b[0] or box[0] > b[2] or box[3] < b[1] or box[1] > b[3] for b in boxes)
