"""All arms in one table, ranked by bytes: baselines, our models, ablations, the state study.

    python benchmarks/baselines/quality_table.py --teacher MODEL --rows results/baselines*.jsonl \
        --models OUT-s0 OUT-s1 OUT-s2 OTHER --results eval-*.json --ablations screens.jsonl --state state-field.json \
        --text test.txt.zst --out results/quality-table.json

Our models count with the figures that `slimba eval --json` measured on `--text` (matched as `slimba report` does);
models of one recipe and different seeds share a row. A baseline has the row of its best learning rate by `valid` at
the most tokens; where post-training has two grids, the better by `valid`. What was not chosen is listed apart. An arm
is on the frontier if no other has at most its bytes and at most its mean perplexity. The table is also printed.

Tests: `pytest tests/benchmarks/test_quality_table.py`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rows import read_rows

from slimba.errors import UserError
from slimba.evaluation.report_data import Model, match_results, short_names

__all__ = ["baselines", "build", "models_of", "ours", "with_frontier"]

FIGURES = ("perplexity", "bits_per_byte")
SEED = re.compile(r"[-_]?s(?:eed)?[-_]?\d+$")


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (None for one) and every value, in the order of the seeds."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "sd": sd, "each": list(values)}


def split_of(rows: Sequence[dict[str, Any]], split: str) -> dict[str, Any]:
    return {f: spread([r[split][f] for r in rows]) for f in FIGURES}


def baselines(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(arms, what was not chosen: screens and worse grids) of the rows of run_baselines.py and ptq.py."""
    whole = [r for r in rows if "test" in r]
    not_chosen = [r for r in rows if "test" not in r]
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in whole:
        key = row.get("variant") or row.get("family") or row["arm"], row.get("embedding", "int8")
        families.setdefault(key, []).append(row)
    arms = []
    for (name, embedding), members in families.items():
        groups: dict[str, list[dict[str, Any]]] = {}
        for r in members:
            groups.setdefault(json.dumps([r["arm"], r.get("lr"), r.get("budget")]), []).append(r)
        most = max(r.get("budget", 0) for r in members)
        full = [g for g in groups.values() if g[0].get("budget", 0) == most]
        best = min(full, key=lambda g: statistics.mean(r["valid"]["perplexity"] for r in g))
        not_chosen += [r for g in groups.values() if g is not best for r in g]
        arms.append(arm_of_baseline(name if embedding == "int8" else f"{name}, {embedding} embedding", best))
    return arms, [tried(r) for r in not_chosen]


def arm_of_baseline(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rows = sorted(rows, key=lambda r: r["seed"])
    first = rows[0]
    return {
        "name": name,
        "family": "baseline",
        "kind": first["kind"],
        "about": first.get("about", ""),
        "file_bytes": first["file_bytes"],
        "bits_per_projection_weight": first["bits_per_projection_weight"],
        "simulated": first["simulated"],
        "lr": first.get("lr"),
        "seeds": [r["seed"] for r in rows],
        "valid": split_of(rows, "valid"),
        "test": split_of(rows, "test"),
        "tokens": first["tokens"],
        "seconds": statistics.mean(r["seconds"] for r in rows),
        "device": first["device"],
        "curve": first.get("curve", []),
    }


def tried(row: dict[str, Any]) -> dict[str, Any]:
    kept = ("arm", "variant", "lr", "seed", "tokens", "embedding", "bits_per_projection_weight", "file_bytes")
    out = {k: row[k] for k in kept if k in row}
    return out | {s: row[s]["perplexity"] for s in ("valid", "test") if s in row}


def models_of(given: Sequence[str], results: Sequence[Path]) -> list[Model]:
    """The models with their figures, as `slimba report` matches them."""
    models = [Model.open(g, name) for g, name in zip(given, short_names(given), strict=True)]
    for line in match_results(models, results):
        print("not used:", line)
    return models


def figures_on(model: Model, text: str) -> dict[str, float] | None:
    found = [r for r in model.results if r.perplexity is not None and r.text == text]
    if len({r.figures["nll"] for r in found if r.run.endswith("state float32")}) > 1:
        raise UserError(f"{model.given} was measured on {text} with different outcomes; give one file for it")
    return dict(found[0].figures) if found else None


def ours(models: Sequence[Model], texts: dict[str, str]) -> list[dict[str, Any]]:
    """An arm for every recipe; `texts` maps valid and test to their file names. UserError: no figure on test."""
    groups: dict[str, list[Model]] = {}
    for m in models:
        record = m.checkpoint.provenance
        recipe = record.get("recipe") or {k: v for k, v in record.get("settings", {}).items() if k != "seed"}
        settings = [record.get("method"), recipe, record.get("tokens"), m.inventory.file_bytes]
        key = settings if recipe else [SEED.sub("", m.name), *settings]
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(m)
    return [arm_of_ours(g, texts) for g in groups.values()]


def arm_of_ours(group: Sequence[Model], texts: dict[str, str]) -> dict[str, Any]:
    group = sorted(group, key=lambda m: m.checkpoint.provenance.get("seed", 0))
    first, record = group[0], group[0].checkpoint.provenance
    measured: dict[str, Any] = {}
    for split, text in texts.items():
        rows = [figures_on(m, text) for m in group]
        if all(r is not None for r in rows):
            measured[split] = {f: spread([r[f] for r in rows if r is not None]) for f in FIGURES}
        elif split == "test":
            absent = next(m.given for m, r in zip(group, rows, strict=True) if r is None)
            raise UserError(f"no figure of {absent} on {text}; measure it with slimba eval --json and give the file")
    name = SEED.sub("", first.name) if len(group) > 1 else first.name
    records = [m.checkpoint.provenance for m in group]
    seconds = [r.get("seconds", r.get("train_s")) for r in records]
    return {
        "name": name or first.name,
        "family": "ours",
        "kind": "trained",
        "about": str(record.get("method", "")),
        "file_bytes": first.inventory.file_bytes,
        "bits_per_projection_weight": first.inventory.bits_per_projection_weight,
        "simulated": False,
        "lr": None,
        "seeds": [m.checkpoint.provenance.get("seed", 0) for m in group],
        **measured,
        "tokens": record.get("tokens"),
        "seconds": statistics.mean(s for s in seconds if s is not None) if any(seconds) else None,
        "device": record.get("device", ""),
        "curve": curve_of(first),
    }


def curve_of(model: Model, points: int = 60) -> list[list[float]]:
    """KL over the tokens, thinned, from the training log in the directory or beside it."""
    beside = model.path.with_name(model.path.name + ".jsonl")
    log: Sequence[Mapping[str, Any]] = model.log or (read_rows(beside) if beside.is_file() else [])
    log = [r for r in log if "kl" in r and "tokens" in r]
    size = max(1, -(-len(log) // points))
    pieces = [log[i : i + size] for i in range(0, len(log), size)]
    return [[p[-1]["tokens"], round(statistics.mean(r["kl"] for r in p), 4)] for p in pieces]


def with_frontier(arms: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ranked by bytes, each with `frontier` and, for a baseline, `beaten_by`: ours with at most its bytes, if any."""
    ranked = sorted(arms, key=lambda a: (a["file_bytes"], a["test"]["perplexity"]["mean"]))
    out = []
    for arm in ranked:
        mine = arm["test"]["perplexity"]["mean"]

        def beats(other: dict[str, Any], arm: dict[str, Any] = arm, mine: float = mine) -> bool:
            theirs = other["test"]["perplexity"]["mean"]
            fewer, better = other["file_bytes"] <= arm["file_bytes"], theirs <= mine
            return fewer and better and (other["file_bytes"], theirs) != (arm["file_bytes"], mine)

        rivals = [o for o in ranked if o["family"] == "ours" and beats(o)]
        best = min(rivals, key=lambda o: o["test"]["perplexity"]["mean"], default=None)
        beaten = {"beaten_by": best["name"] if best else None} if arm["family"] == "baseline" else {}
        out.append(arm | {"frontier": not any(beats(o) for o in ranked)} | beaten)
    return out


def ablations_of(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows of screen_dfssm.py: those of equal settings and tokens, whatever the seed, are one.

    `change` are the settings that differ from those of the first row, which is the recipe as it is.
    """
    rows = [r for file in files for r in read_rows(file) if r.get("arm") != "teacher"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        own = {k: v for k, v in row.get("settings", {}).items() if k not in ("seed", "tokens", "keep")}
        groups.setdefault(json.dumps([own, row.get("tokens")], sort_keys=True), []).append(row)
    out: list[dict[str, Any]] = []
    first: dict[str, Any] | None = None
    for key, members in groups.items():
        settings, tokens = json.loads(key)
        first = settings if first is None else first
        differs = [k for k in {**first, **settings} if first.get(k) != settings.get(k)]
        change = ", ".join(f"{k} {settings.get(k, 'as by default')}" for k in differs) or "as it is"
        good = [r for r in members if "valid_ppl" in r]
        failed = len(members) - len(good)
        row = {"change": change + (f" ({failed} diverged)" if failed else ""), "tokens": tokens}
        row |= {"arms": [r["arm"] for r in members], "bits": members[0].get("bits"), "bytes": members[0].get("bytes")}
        for split in ("valid", "test"):
            values = [float(r[f"{split}_ppl"]) for r in good if f"{split}_ppl" in r]
            row |= {split: spread(values)} if values else {}
        out.append(row)
    return out


def build(a: argparse.Namespace) -> dict[str, Any]:
    rows = [r for file in a.rows for r in read_rows(file)]
    arms, not_chosen = baselines(rows)
    models = models_of([*a.models, a.teacher], a.results)
    teacher = models.pop()
    texts = {"valid": a.valid_text, "test": a.text}
    arms += ours(models, texts)
    reference = figures_on(teacher, a.text)
    if not arms:
        raise UserError("no arm to tabulate; give --rows or --models")
    return {
        "table": "quality",
        "text": a.text,
        "protocol": next((r["test"]["protocol"] for r in rows if "test" in r), ""),
        "tokens": next((r["test"]["tokens"] for r in rows if "test" in r), None),
        "teacher": {"name": teacher.name, "file_bytes": teacher.inventory.file_bytes, "test": reference},
        "arms": with_frontier(arms),
        "not_chosen": not_chosen,
        "ablations": ablations_of(a.ablations),
        "state": json.loads(a.state.read_text(encoding="utf-8")) if a.state else None,
    }


def markdown(table: dict[str, Any]) -> str:
    lines = ["| arm | bytes | bits | test | bits per byte | seeds | |", "|---|---|---|---|---|---|---|"]
    for arm in table["arms"]:
        p, b = arm["test"]["perplexity"], arm["test"]["bits_per_byte"]
        figure = f"{p['mean']:.2f}" + (f" ± {p['sd']:.2f}" if p["sd"] is not None else "")
        bold = "**" if arm["family"] == "ours" else ""
        note = ("frontier" if arm["frontier"] else "") + (" simulated" if arm["simulated"] else "")
        cells = [f"{bold}{arm['name']}{bold}", f"{arm['file_bytes']:,}", f"{arm['bits_per_projection_weight']:.3f}"]
        cells += [figure, f"{b['mean']:.4f}", str(len(arm["seeds"])), note.strip()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = argparse.ArgumentParser(description="Gather every arm into the quality table.")
    args.add_argument("--teacher", required=True)
    args.add_argument("--rows", type=Path, nargs="*", default=[], help="rows of run_baselines.py and ptq.py")
    args.add_argument("--models", nargs="*", default=[], help="our packed models")
    args.add_argument("--results", type=Path, nargs="*", default=[], help="files of slimba eval --json")
    args.add_argument("--ablations", type=Path, nargs="*", default=[], help="rows of screen_dfssm.py")
    args.add_argument("--state", type=Path, help="what state_field.py wrote")
    args.add_argument("--text", default="test.txt.zst", help="name of the text that is reported")
    args.add_argument("--valid-text", default="valid.txt.zst")
    args.add_argument("--out", type=Path, required=True)
    a = args.parse_args()
    table = build(a)
    a.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(markdown(table))


if __name__ == "__main__":
    main()
