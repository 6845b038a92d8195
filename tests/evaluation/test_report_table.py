"""The quality table on the report's page: every arm, ours apart, the frontier, ablations, curves; bad tables refused.

Run: `pytest tests/evaluation/test_report_table.py`.
"""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from helpers.tiny import tiny_directory
from slimba.cli.main import main
from slimba.errors import UserError
from slimba.evaluation.report import report
from slimba.evaluation.report_table import read_table

HOSTILE = '<script>alert("x")</script>&amp;\x07\u202e'


class Text(HTMLParser):
    """The page's text and tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags = "", []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def spread(*values: float) -> dict[str, Any]:
    mean = sum(values) / len(values)
    sd = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else None
    return {"mean": mean, "sd": sd, "each": list(values)}


def arm(name: str, size: int, *values: float, family: str = "baseline", **more: Any) -> dict[str, Any]:
    out = dict(name=name, family=family, kind="trained", about=f"about {name}", file_bytes=size, simulated=False)
    out |= dict(bits_per_projection_weight=size / 1e6, seeds=list(range(len(values))), tokens=33_000_000, seconds=40.0)
    out |= dict(device="H100", test={"perplexity": spread(*values), "bits_per_byte": spread(1.25)}, frontier=False)
    return out | more


def table_of() -> dict[str, Any]:
    curve = [[i * 1e6, 3.0 / (i + 1)] for i in range(5)]
    arms = [
        arm("sign", 4_000_000, 31.0, beaten_by=None, frontier=True, curve=curve),
        arm("mine", 5_000_000, 25.5, 26.0, 26.5, family="ours", frontier=True, curve=curve),
        arm("ternary", 6_000_000, 27.5, beaten_by="mine", simulated=True),
        arm("gptq-int2", 7_000_000, 950.0, beaten_by="mine"),
        arm("int4", 15_000_000, 24.8, beaten_by=None, frontier=True),
    ]
    ablations = [
        {"change": "as it is", "tokens": 8_000_000, "bits": 1.9, "valid": spread(30.0, 30.2)},
        {"change": "rank=0", "tokens": 8_000_000, "bits": 1.2, "valid": spread(31.0)},
    ]
    state_row = dict(case="field", tokens_between_storings=64, bits_per_entry=9.5, perplexity=20.5, state_error=0.093)
    state_row |= dict(feature_error=0.1, feature_error_first_quarter=0.05, feature_error_last_quarter=0.2)
    state = dict(teacher="t", text="test.txt", sequences=4, length=4096, protocol="p", rows=[state_row])
    tried = [{"variant": "sign", "lr": 0.003, "seed": 0, "tokens": 8_000_000, "valid": 40.25}]
    out = {"table": "quality", "text": "test.txt", "protocol": "cut at blank lines", "tokens": 900, "arms": arms}
    teacher = {"name": "t", "file_bytes": 50_000_000, "test": {"perplexity": 24.33}}
    return out | {"teacher": teacher, "ablations": ablations, "not_chosen": tried, "state": state}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_directory(tmp_path / "small", preset="dfssm")


def page_of(tmp_path: Path, model: Path, table: dict[str, Any]) -> str:
    file = tmp_path / "table.json"
    file.write_text(json.dumps(table))
    return report([str(model)], quality_table=file)


def test_every_arm_is_in_the_plot_and_the_table(tmp_path: Path, model: Path) -> None:
    page = page_of(tmp_path, model, table_of())
    text = Text(page).text
    for said in ("26.00 ± 0.50", "1.069", "about ternary (simulated)", "4,000,000", "H100", "cut at blank lines"):
        assert said in text
    assert "1 of ours and 4 baselines on test.txt." in text and "than 2 of the baselines" in text
    assert "Smaller than the smallest of ours: sign." in text
    assert "The teacher, with 50,000,000 bytes, has 24.33." in text
    plots = [ElementTree.fromstring(s) for s in re.findall(r"<svg.*?</svg>", page, flags=re.S)]
    plots = [p for p in plots if p.findtext("title") == "Perplexity against bytes, every arm"]
    titles = [[t.text for t in p.iter("title")][1:] for p in plots]
    assert all(len(t) == 5 for t in titles[:2]), "the first plot, in both sizes, has all"
    assert any(len(t) == 4 for t in titles[2:]), "the next ones leave out what is far off"
    for p in plots:
        (square,) = p.iter("rect")
        assert square.get("class") == "arm best ours"
        (span,) = [e for e in p.iter("line") if e.get("class") == "span"]
        assert float(span.get("y2", 0)) < float(span.get("y1", 0))


def test_ablations_curves_screens_and_state(tmp_path: Path, model: Path) -> None:
    page = page_of(tmp_path, model, table_of())
    text = Text(page).text
    assert "rank=0" in text and "+0.90" in text and "30.10 ± 0.14" in text
    assert "0.003" in text and "40.25" in text
    assert "9.30 %" in text and "20.500" in text and "4 sequences of 4,096 tokens of test.txt" in text
    curves = re.findall(r"KL over the tokens, sign, mine", page)
    assert len(curves) == 2, "one chart in two sizes"


def test_parts_that_are_missing_leave_no_trace(tmp_path: Path, model: Path) -> None:
    table = table_of() | {"ablations": [], "not_chosen": [], "state": None, "teacher": {}}
    table["arms"] = [{k: v for k, v in a.items() if k not in ("curve", "about", "device")} for a in table["arms"]]
    text = Text(page_of(tmp_path, model, table)).text
    for absent in ("Ablations", "Screens of", "recurrent state", "Loss curves", "ratio to the teacher", "None", "nan"):
        assert absent not in text


def test_hostile_names_stay_text(tmp_path: Path, model: Path) -> None:
    table = table_of()
    table["arms"][0] |= {"name": HOSTILE, "about": HOSTILE, "device": HOSTILE}
    table["ablations"][0]["change"] = table["not_chosen"][0]["variant"] = table["text"] = HOSTILE
    table["state"]["rows"][0]["case"] = HOSTILE
    page = page_of(tmp_path, model, table)
    assert "script" not in Text(page).tags and '<script>alert("x")' in Text(page).text.replace("\ufffd", "")
    assert "\x07" not in page and "\u202e" not in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": "other"}, "not a quality table"),
        ({"arms": 3}, "not a quality table"),
        ({"arms": [3]}, "no object"),
        ({"arms": [{"name": "half"}]}, "half"),
        ({"arms": [arm("low", 1000, 0.5)]}, "low"),
        ({"arms": [arm("wide", 1000, float("inf"))]}, "wide"),
        ({"arms": [arm("empty", 0, 20.0)]}, "empty"),
    ],
)
def test_bad_tables_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "table.json"
    file.write_text(json.dumps(table_of() | change))
    with pytest.raises(UserError, match=message):
        read_table(file)
    for content, said in (("{", "not JSON"), ("[1]", "not a quality table")):
        file.write_text(content)
        with pytest.raises(UserError, match=said):
            read_table(file)
    with pytest.raises(UserError, match="cannot read"):
        read_table(tmp_path / "absent.json")


def test_the_verb_takes_the_table(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, html = tmp_path / "table.json", tmp_path / "page.html"
    file.write_text(json.dumps(table_of()))
    assert main(["report", str(model), "--table", str(file), "--html", str(html)]) == 0
    assert "Every arm, ranked by bytes" in html.read_text()
    file.write_text("{}")
    assert main(["report", str(model), "--table", str(file), "--html", str(html)]) == 2
    assert "not a quality table" in capsys.readouterr().err
