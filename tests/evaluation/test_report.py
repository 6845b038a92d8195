"""`slimba report`: the page is well formed, self-contained, escaped, and says what the files say.

Run: `pytest tests/evaluation/test_report.py`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from helpers.tiny import tiny_checkpoint, tiny_directory
from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.inventory import inventory_of
from slimba.checkpoints.packed import write_packed
from slimba.checkpoints.reader import open_checkpoint
from slimba.cli.main import main
from slimba.evaluation.report import report
from slimba.evaluation.report_data import layer_errors, short_names
from slimba.evaluation.report_svg import Point, Scale, frontier, line_chart, scatter

RECIPE = {"rank": 4, "hidden_until": 0.5, "round_from": 0.75, "freeze_from": 0.9}
VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = '<script>alert("x")</script>&amp;\x07\u202e'


class Page(HTMLParser):
    """Checks that tags are balanced; keeps the text, the tags and the attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self.open else ""


def charts(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, flags=re.S)]


def make(out: Path, preset: str = "dfssm", log: bool = True, seed: int = 0, **recipe: Any) -> Path:
    """A packed tiny model with a provenance and, if asked, a training log."""
    checkpoint = tiny_checkpoint(preset=preset, seed=seed)
    teacher = tiny_checkpoint(preset="float32")
    checkpoint.provenance = {
        "method": "dfssm",
        "recipe": RECIPE | recipe,
        "seed": seed,
        "data": {"sources": ["corpus.txt"]},
        "teacher_sha256": teacher.sha256(),
        "tokens": 4000,
        "steps": 40,
        "seconds": 61.5,
        "device": "cpu",
    }
    write_packed(checkpoint, out)
    if log:
        write_log(out)
    return out


def write_log(out: Path) -> None:
    rows: list[dict[str, float]] = []
    for step in range(1, 41):
        row = {"step": step, "tokens": 100 * step, "kl": 2.0 / step, "loss": 3.0 / step, "grad_norm": 1.0 + 1 / step}
        rows.append(row | ({"hidden": 1.0 / step} if step <= 20 else {}))
    (out / "training.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def result(file: Path, model: str, perplexity: float, **changes: Any) -> Path:
    """What `slimba eval --json` writes."""
    record = dict(model=model, text=["texts/test.txt"], perplexity=perplexity, bits_per_byte=1.25, nll=100 * perplexity)
    record |= dict(tokens=900, bytes=3000, text_tokens=1000, window=64, stride=64, protocol="cut at blank lines")
    record |= dict(backend="cpu", state_dtype="float32", seconds=0.5)
    file.write_text(json.dumps(record | changes))
    return file


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return tiny_directory(tmp_path / "teacher", preset="float32")


def test_one_model(tmp_path: Path, teacher: Path) -> None:
    out = make(tmp_path / "small")
    file = result(tmp_path / "figures.json", str(out), 27.5119)
    text = report([str(out)], against=str(teacher), results=[file])
    page = Page(text)
    inventory = inventory_of(open_checkpoint(out))
    for size in inventory.bytes.values():
        assert f"{size:,}" in page.text
    assert f"{inventory.file_bytes:,}" in page.text
    assert inventory.file_bytes == (out / "model.safetensors").stat().st_size
    assert f"{inventory.bits_per_projection_weight:.3f}" in page.text
    for said in ("27.51", "1.2500", "900 tokens, 3,000 bytes, window 64", "(matched by path)", "corpus.txt", "61.5 s"):
        assert said in page.text
    assert "+r4 +plane:" in page.text and "It is the teacher that the provenance names." in page.text
    curves = [c for c in charts(text) if c.get("class") == "chart"]
    titles = [c.findtext("title") for c in curves]
    assert titles[:3] == ["kl of small", "hidden of small", "grad_norm of small"]
    assert [t.text for t in curves[0].iter("text") if t.get("class") == "mark-name"] == [
        "hidden off",
        "rounding",
        "frozen",
    ]


def test_the_page_needs_nothing_else(tmp_path: Path, teacher: Path) -> None:
    text = report([str(make(tmp_path / "small"))], against=str(teacher))
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [v for k, v in page.attributes if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")]
    assert not [k for k, _ in page.attributes if k.startswith("on")]
    assert not re.search(r"https?:|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text and "@media print" in text and 'name="viewport"' in text


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    out = tiny_directory(tmp_path / "bare", with_tokenizer=False)
    text = Page(report([str(out)])).text
    assert "Not measured: no file given with --results" in text
    assert "has no training log" in text
    assert "Not computed: --against TEACHER was not given" in text
    assert "says nothing about where it came from" in text
    assert "perplexity" not in text
    (out / "training.jsonl").write_text("\n")
    other = result(tmp_path / "other.json", "elsewhere/else", 9.0)
    text = Page(report([str(out)], results=[other])).text
    assert "empty training log" in text and "other.json measures elsewhere/else" in text and "9.00" not in text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(preset="dfssm")
    checkpoint.provenance = {
        HOSTILE: HOSTILE,
        "recipe": {HOSTILE: HOSTILE},
        "data": {HOSTILE: [HOSTILE]},
        "tokens": 100,
    }
    out = write_packed(checkpoint, tmp_path / "<b onclick=x>&" / "<img src=x>")
    other = make(tmp_path / 'a"b')
    rows = [{"step": i, "tokens": i, "kl": 1.0 / i, HOSTILE: i} for i in (1, 2, 3)]
    (out / "training.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = [result(tmp_path / "<i>.json", str(out), 12.0, text=[HOSTILE], protocol=HOSTILE, backend=HOSTILE)]
    files.append(
        result(tmp_path / "b.json", str(other), 13.0, text=[HOSTILE], protocol=HOSTILE, tasks={HOSTILE: {HOSTILE: 1}})
    )
    text = report([str(out), str(other)], results=files)
    page = Page(text)
    assert not {"script", "img", "b onclick", "i"} & set(page.tags)
    assert "<img src=x>" in page.text and '<script>alert("x")</script>&amp;' in page.text
    assert "\x07" not in text and "\u202e" not in text
    assert len([c for c in charts(text) if c.findtext("title") == "Perplexity against bytes"]) == 2


def test_several_models(tmp_path: Path, teacher: Path) -> None:
    """Ranked by bytes, numbered, on the frontier or not; seeds share a row; each text by itself."""
    arms = [make(tmp_path / f"r4-s{s}", seed=s) for s in (0, 1)]
    arms += [make(tmp_path / "int8", "int8", rank=0), make(tmp_path / "int4", "int4", rank=1)]
    figures = zip(arms, (20.0, 22.0, 18.0, 25.0), strict=True)
    files = [result(tmp_path / f"{a.name}.json", a.name, p) for a, p in figures]
    files.append(result(tmp_path / "t.json", str(teacher), 17.0))
    files.append(result(tmp_path / "u.json", str(arms[0]), 99.0, text=["valid.txt"]))
    text = report([str(a) for a in arms], against=str(teacher), results=files)
    page = Page(text)
    ranked = sorted([*arms, teacher], key=lambda a: ((a / "model.safetensors").stat().st_size, a.name))
    body = text[text.index("On test.txt") : text.index("Protocol: test.txt")]
    rows = re.findall(r"<tr><td>(\d)</td><td><a[^>]*>([\w-]+)", body)
    assert rows == [(str(i), a.name) for i, a in enumerate(ranked, 1)]
    assert f"{20 / 17:.3f}" in body and "(teacher)" in body
    assert "On valid.txt" in page.text and "Not measured on this text: " in page.text
    assert "21.00 ± 1.41 (2)" in page.text, "two seeds of one recipe"
    plot = next(c for c in charts(text) if c.findtext("title") == "Perplexity against bytes")
    names = {t.text for t in plot.iter("text") if t.get("class") == "arm-name"}
    assert names == {a.name for a in ranked}
    for anchor in re.findall(r'href="#([^"]+)"', text):
        assert f'id="{anchor}"' in text


def test_a_comparison_gives_both_models_their_figures(tmp_path: Path, teacher: Path) -> None:
    out = make(tmp_path / "small")
    part = json.loads(result(tmp_path / "x.json", "x", 17.0).read_text())
    record = {
        "model": "small",
        "text": ["t.txt"],
        "against": str(teacher),
        "ratio": 1.118,
        "kl": 0.2137,
        "agreement": 0.81,
    }
    file = tmp_path / "both.json"
    file.write_text(json.dumps(record | {"teacher": part, "student": part | {"perplexity": 19.0, "nll": 1900.0}}))
    page = Page(report([str(out)], against=str(teacher), results=[file]))
    for said in ("19.00", "17.00", "1.118", "0.2137", "81.0 %", "(matched by name)"):
        assert said in page.text


def test_results_find_their_model(tmp_path: Path) -> None:
    """By path before name before the name of the file; never by chance when two models are called alike."""
    a, b = make(tmp_path / "one" / "small"), make(tmp_path / "two" / "small", seed=1)
    files = [result(tmp_path / "a.json", str(a), 31.0), result(tmp_path / "b.json", "moved/small", 32.0)]
    text = Page(report([str(a), str(b)], results=files)).text
    assert "one/small" in text and "two/small" in text and "31.00" in text
    assert "b.json measures moved/small" in text and "32.00" not in text
    text = Page(report([str(a)], results=[result(tmp_path / "small.json", "gone/away", 33.0)])).text
    assert "33.00" in text and "(matched by file name)" in text
    assert short_names(["x/a", "y/a", "b/", "demo-teacher"]) == ["x/a", "y/a", "b", "demo-teacher"]


def with_column_scale(teacher: Checkpoint, spread: float) -> Checkpoint:
    """The same function with a scale moved from every projection's columns into the norm before it."""
    tensors = dict(teacher.tensors)
    rng = np.random.default_rng(3)
    for i in range(teacher.spec.n_layer):
        at = f"backbone.layers.{i}."
        for matrix, norm in (("mixer.in_proj", "norm"), ("mixer.out_proj", "mixer.norm")):
            scale = np.exp(spread * rng.standard_normal(tensors[f"{at}{norm}.weight"].shape)).astype(np.float32)
            tensors[f"{at}{norm}.weight"] = tensors[f"{at}{norm}.weight"] * scale
            tensors[f"{at}{matrix}.weight"] = tensors[f"{at}{matrix}.weight"] / scale
    return dataclasses.replace(teacher, tensors=tensors)


def test_errors_compare_products_with_the_norm() -> None:
    teacher = tiny_checkpoint(preset="float32")
    moved = layer_errors(with_column_scale(teacher, 1.0), teacher, "t")
    assert moved is not None and moved.same_teacher is None
    assert max(max(v) for v in moved.layers.values()) < 1e-10 and moved.tables == {"embedding": 0.0}


@pytest.mark.parametrize("architecture", ["mamba1", "mamba2"])
def test_errors_by_layer_and_rows(architecture: str) -> None:
    teacher = tiny_checkpoint(architecture, preset="float32", tie_embeddings=False)
    student = dataclasses.replace(teacher, tensors=dict(teacher.tensors))
    name, rows = "backbone.layers.1.mixer.in_proj.weight", teacher.spec.in_proj_rows
    w = teacher.tensors[name].copy()
    w[: next(iter(rows.values()))] *= 0.5
    student.tensors = student.tensors | {name: w}  # type: ignore[operator]
    errors = layer_errors(student, teacher, "t")
    assert errors is not None and set(errors.tables) == {"embedding", "head"}
    first, *others = rows
    assert errors.layers[first] == pytest.approx([0.0, 0.25])
    assert all(errors.layers[n] == [0.0, 0.0] for n in [*others, "out_proj"])
    assert 0 < errors.layers["in_proj"][1] < 0.25
    assert layer_errors(student, tiny_checkpoint(architecture, d_model=16), "t") is None


def test_another_teacher_is_pointed_out(tmp_path: Path) -> None:
    out = make(tmp_path / "small")
    other = tiny_directory(tmp_path / "other", preset="float32", seed=9)
    assert "It is NOT the teacher of the provenance" in Page(report([str(out)], against=str(other))).text


def test_a_resumed_log_is_drawn_once(tmp_path: Path) -> None:
    out = make(tmp_path / "small", log=False)
    rows = [{"step": s, "tokens": s, "kl": k} for s, k in ((1, 5.0), (2, 4.0), (3, 9.0), (3, 3.0), (4, float("nan")))]
    (out / "training.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = report([str(out)])
    assert "4 rows of training.jsonl" in text and "1 steps were logged twice" in text
    path = next(p for c in charts(text) for p in c.iter("path")).get("d") or ""
    assert path.count("L") == 2 and "nan" not in text.lower().replace("nanobind", "")


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, html = make(tmp_path / "small"), tmp_path / "page.html"
    for name, content in (
        ("list.json", "[1]"),
        ("broken.json", "{"),
        ("empty.json", '{"model": "small"}'),
        ("words.json", '{"model": "small", "perplexity": "good"}'),
        ("low.json", result(tmp_path / "low.json", "small", 0.5).read_text()),
    ):
        (tmp_path / name).write_text(content)
    (tmp_path / "notes.html").write_text("<p>mine</p>")
    narrow = tiny_directory(tmp_path / "narrow", d_model=16)
    for arguments, message in (
        ([str(out), "--results", str(tmp_path / "list.json")], "does not name a model"),
        ([str(out), "--results", str(tmp_path / "broken.json")], "is not JSON"),
        ([str(out), "--results", str(tmp_path / "empty.json")], "neither a perplexity nor tasks"),
        ([str(out), "--results", str(tmp_path / "words.json")], "not a number"),
        ([str(out), "--results", str(tmp_path / "low.json")], "a perplexity of 0.5"),
        ([str(out), "--results", str(tmp_path / "none.json")], "cannot read the results"),
        ([str(out), str(out)], "is named twice"),
        ([str(tmp_path / "nothing")], "no model called"),
        ([str(tmp_path / "low.json")], "give at least one model"),
        ([str(out), "--against", str(narrow)], "has other shapes than"),
        ([str(out), "--html", str(tmp_path / "notes.html")], "is not a page of slimba report"),
        ([str(out), "--html", str(tmp_path)], "is a directory"),
    ):
        assert main(["report", "--html", str(html), *arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err and err.count("\n") == 1, err
    for row in ('{"step"', "[1]", '{"step": 2, "tokens": Infinity}', '{"step": "two"}', '{"step": 2, "tokens": "x"}'):
        (out / "training.jsonl").write_text('{"step": 1, "kl": 1}\n' + row)
        assert main(["report", str(out), "--html", str(html)]) == 2
        assert "line 2: not a row of a training log" in capsys.readouterr().err
    assert not html.exists() and (tmp_path / "notes.html").read_text() == "<p>mine</p>"


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shell pattern after --results gives the further files as arguments; a page is replaced by the next one."""
    out, html = make(tmp_path / "small"), tmp_path / "page.html"
    files = [result(tmp_path / "a.json", "small", 41.0), result(tmp_path / "b.json", "small", 42.0, text=["b.txt"])]
    for _ in range(2):
        assert main(["report", str(out), "--html", str(html), "--results", *map(str, files)]) == 0
    page = html.read_text(encoding="utf-8")
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {html}, {len(page.encode()):,} bytes"
    assert "41.00" in Page(page).text and "42.00" in Page(page).text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json", "page.html", "small"]


def test_odd_figures_do_not_stop_the_page(tmp_path: Path) -> None:
    """Values no chart can show, a recipe of stages, figures that are not numbers where numbers are usual."""
    checkpoint = tiny_checkpoint(preset="dfssm")
    stages = [{"method": "a"}, {"method": "b"}]
    checkpoint.provenance = {"recipe": stages, "tokens": "many", "seconds": None, "steps": 1e300}
    out = write_packed(checkpoint, tmp_path / "odd")
    rows = [{"step": s, "kl": k} for s, k in ((1, 1e308), (2, -1e308), (3, 1e-308), (4, 5.0), (5, float("inf")))]
    (out / "training.jsonl").write_text("\n".join(json.dumps(r | {"zero": 0.0, "none": float("nan")}) for r in rows))
    other = make(tmp_path / "other", log=False)
    files = [
        result(tmp_path / "a.json", "odd", 9e99, bits_per_byte=float("nan")),
        result(tmp_path / "b.json", "other", 2),
    ]
    text = report([str(out), str(other)], results=files)
    assert {"kl of odd", "zero of odd"} <= {c.findtext("title") for c in charts(text)}
    assert '[{"method": "a"}, {"method": "b"}]' in Page(text).text and "not stated" in text
    assert not re.search(r'="[^"]*(nan|inf)[ "]', re.sub(r"<style>.*</style>", "", text, flags=re.S))


def test_frontier_and_scatter() -> None:
    points = [
        Point(10, 5, "a", 1),
        Point(10, 4, "b", 2),
        Point(20, 4, "c", 3),
        Point(30, 3, "d", 4),
        Point(5, 9, "e", 5),
    ]
    assert [p.label for p in frontier(points)] == ["e", "b", "d"]
    crowd = [Point(1000 + i, 20 + i / 100, f"a rather long name {i}", i) for i in range(40)]
    svg = scatter("t", crowd, x_label="x", y_label="y")
    words = [t.text for t in svg.iter("text") if t.get("class") == "arm-name"]
    numbers = [int((w or "").rpartition(" ")[2]) for w in words]
    assert sorted(numbers) == list(range(40)), "every arm has its name or its number"
    assert any(w and w.isdigit() for w in words)


def test_scales_and_lines() -> None:
    for values in ([3.0], [0.0], [-2.0, 5.0], [1e-6, 1e9], [26.1, 26.2], [5.0, 75.0], [0.0, 1e-9]):
        for log in (False, True):
            scale = Scale.of(values, 300, 20, log=log)
            assert all(20 <= scale(v) <= 300 for v in values)
            assert 2 <= len(scale.ticks()) <= 12, (values, log)
    x = [float(i) for i in range(5000)]
    svg = line_chart("t", x, {"a": [1.0 + i for i in x], "b": [None] * 4999 + [7.0]}, x_label="x", y_label="y")
    assert len(list(svg.iter("path"))) == 1 and len(list(svg.iter("circle"))) == 1
    assert (next(svg.iter("path")).get("d") or "").count("L") < 600
