"""The plot of `slimba bench --plot FILE.svg`: decode speed by batch, the memory's limit, and peers of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from slimba.evaluation.report_svg import line_chart

__all__ = ["write_plot"]

STYLE = """svg { background: #fff; font: 11px sans-serif } text { fill: #333 } .grid, .axis { stroke: #ccc }
.line { fill: none; stroke-width: 1.5 } .dot { stroke: none }
.s0 { stroke: #c33 } .s1 { stroke: #999 } .s2 { stroke: #36a } .s3 { stroke: #393 } .s4 { stroke: #a6a }"""


def write_plot(path: Path, record: dict[str, Any]) -> None:
    """Draws what `bench` measured; batches are the points of the horizontal axis."""
    batches = [row.batch for row in record["decode"]]
    series: dict[str, list[float | None]] = {
        "Slimba": [row.tokens_per_second for row in record["decode"]],
        "limit of the memory": [row.batch / row.floor for row in record["decode"]],
    }
    for row in record.get("gpu_peers", []):
        if "missing" not in row:
            line = series.setdefault(f"{row['peer']} {row['how']}".strip(), [None] * len(batches))
            line[batches.index(row["batch"])] = row["decode_tokens_per_second"]
    chart = line_chart(
        "decode", [float(b) for b in batches], series, x_label="sequences", y_label="tokens/s", dots=True
    )
    chart.set("xmlns", "http://www.w3.org/2000/svg")
    style = ElementTree.Element("style")
    style.text = STYLE
    chart.insert(0, style)
    path.write_bytes(ElementTree.tostring(chart, encoding="utf-8", xml_declaration=True))
