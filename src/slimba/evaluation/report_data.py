"""What `slimba report` shows, read and checked before anything is drawn: models, logs, quality figures, errors.

    models = [Model.open("model-1bit", "model-1bit")]
    match_results(models, [Path("eval.json")])           # files that `slimba eval --json` wrote
    layer_errors(models[0].checkpoint, teacher)

Run the tests: `pytest tests/evaluation/test_report.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.inventory import Inventory, inventory_of
from slimba.checkpoints.reader import find_model, open_checkpoint
from slimba.errors import UserError
from slimba.evaluation.perplexity import progress_bar
from slimba.models.spec import ModelSpec

__all__ = ["Errors", "Model", "Result", "layer_errors", "match_results", "short_names"]

LOG = "training.jsonl"
TEXT_FIGURES = ("perplexity", "bits_per_byte", "tokens", "bytes", "window", "stride")


@dataclass(frozen=True, slots=True)
class Result:
    """Figures of one model from one file of `slimba eval --json`. `protocol` is equal where perplexities compare."""

    file: str
    model: str  # as the file names it
    text: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)  # TEXT_FIGURES; empty where only tasks were run
    protocol: tuple[str, ...] = ()
    run: str = ""  # backend and state
    against: str = ""
    comparison: Mapping[str, float] = field(default_factory=dict)  # ratio, kl, agreement
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    matched_by: str = ""

    @property
    def perplexity(self) -> float | None:
        return self.figures.get("perplexity")


@dataclass(slots=True)
class Errors:
    """Relative squared error against a teacher: by column (`in_proj`, `z`, ...) a figure a layer, NaN if undefined."""

    teacher: str
    layers: dict[str, list[float]]
    tables: dict[str, float]  # embedding and head
    same_teacher: bool | None  # whether it is the one that the provenance names; None where it names none


@dataclass(slots=True)
class Model:
    """One model of the page. `log` is None where the directory has no training log."""

    given: str
    name: str
    path: Path
    checkpoint: Checkpoint
    inventory: Inventory
    log: list[dict[str, float]] | None
    repeated: int = 0  # steps that the log holds more than once, because the run was interrupted and resumed
    results: list[Result] = field(default_factory=list)
    errors: Errors | None = None
    is_teacher: bool = False

    @classmethod
    def open(cls, given: str, name: str, *, is_teacher: bool = False) -> Model:
        """Open and check a MODEL argument. UserError: not a model, damaged, a log that is not JSON lines."""
        path = find_model(given)
        checkpoint = open_checkpoint(path)
        log, repeated = _read_log(path / LOG)
        return cls(given, name, path, checkpoint, inventory_of(checkpoint), log, repeated, is_teacher=is_teacher)


def short_names(given: Sequence[str]) -> list[str]:
    """A name for every MODEL argument: its last part, with as many parts before it as tell equal ones apart."""
    parts: list[tuple[str, ...]] = []
    for g in given:
        path = PurePath(g)
        whole = Path(g).resolve() if path.name in ("", "..") else path  # "." has no name of its own
        parts.append(tuple(p for p in whole.parts if p != "/") or (g,))
    out = []
    for i, mine in enumerate(parts):
        n = 1
        while n < len(mine) and any(j != i and other[-n:] == mine[-n:] for j, other in enumerate(parts)):
            n += 1
        out.append("/".join(mine[-n:]) or given[i])
    return out


def _read_log(path: Path) -> tuple[list[dict[str, float]] | None, int]:
    """Rows by step, the last one of a step that occurs twice (a resumed run logs again what it repeats)."""
    if not path.is_file():
        return None, 0
    rows: dict[int, dict[str, float]] = {}
    lines = 0
    for n, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            step = int(row["step"])
            if not math.isfinite(row.get("tokens", step)):
                raise ValueError("a place on the x axis")
            rows[step] = {k: float(v) for k, v in row.items() if isinstance(v, int | float)}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise UserError(
                f"{path}, line {n}: not a row of a training log (JSON with a step); mend or remove the file"
            ) from None
        lines += 1
    return [rows[s] for s in sorted(rows)], lines - len(rows)


# ------------------------------------------------------------------------------------------------ quality figures


def match_results(models: Sequence[Model], files: Sequence[Path]) -> list[str]:
    """Give every model its results; returns one line for each record that belongs to no model.

    A record belongs to the model at the path which it names, else to the one with that name, else to the one that is
    called like the record's file. UserError: a file that `slimba eval --json` did not write.
    """
    unmatched = []
    for file in dict.fromkeys(files):
        for is_main, result in _read_results(file):
            model, how = _owner(models, result, file.stem if is_main else None)
            if model is None:
                unmatched.append(f"{file.name} measures {result.model}")
                continue
            known = {(r.figures.get("nll"), r.protocol, r.run) for r in model.results if r.figures}
            if is_main or (result.figures.get("nll"), result.protocol, result.run) not in known:
                model.results.append(dataclasses.replace(result, matched_by=how))
    return unmatched


def _owner(models: Sequence[Model], result: Result, stem: str | None) -> tuple[Model | None, str]:
    path = Path(result.model).expanduser()
    if path.is_dir():
        for model in models:
            if path.resolve() == model.path.resolve():
                return model, "path"
    for wanted, how in ((PurePath(result.model).name or result.model, "name"), (stem, "file name")):
        named = [m for m in models if wanted in (m.path.name, m.name, m.given)]
        if len(named) == 1:
            return named[0], how
    return None, ""


def _read_results(file: Path) -> list[tuple[bool, Result]]:
    """The record's own result (True), and that of its teacher (False) if it is a comparison."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read the results {file}: {e.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file} is not JSON; --results takes what `slimba eval --json` wrote") from None
    if not isinstance(data, dict) or not isinstance(data.get("model"), str):
        raise UserError(f"{file} does not name a model; --results takes what `slimba eval --json` wrote")
    text = ", ".join(PurePath(str(t)).name for t in _list(data.get("text")))
    student = data.get("student", data)
    if not isinstance(student, dict) or not ("perplexity" in student or isinstance(data.get("tasks"), dict)):
        raise UserError(f"{file} holds neither a perplexity nor tasks; --results takes what `slimba eval --json` wrote")
    against = str(data.get("against", ""))
    comparison = {k: _number(data, k, file) for k in ("ratio", "kl", "agreement") if k in data}
    tasks = _tasks(data.get("tasks") or {}, file)
    fields = _text_fields(student, text, file)
    main = Result(file.name, data["model"], text, against=against, comparison=comparison, tasks=tasks, **fields)
    out = [(True, main)]
    if against and isinstance(data.get("teacher"), dict):
        out.append((False, Result(file.name, against, text, **_text_fields(data["teacher"], text, file))))
    return out


def _text_fields(record: Mapping[str, Any], text: str, file: Path) -> dict[str, Any]:
    if "perplexity" not in record:
        return {}
    figures = {k: _number(record, k, file) for k in (*TEXT_FIGURES, "nll")}
    if not 1 <= figures["perplexity"] < 1e100:
        raise UserError(f"{file}: a perplexity of {figures['perplexity']} is not a figure of a language model")
    same = [f"{k} {int(figures[k]):,}" for k in ("tokens", "bytes", "window", "stride")]
    return {
        "figures": figures,
        "protocol": (text, *same, str(record.get("protocol", ""))),
        "run": f"backend {record.get('backend', 'unknown')}, state {record.get('state_dtype', 'unknown')}",
    }


def _number(record: Mapping[str, Any], key: str, file: Path) -> float:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{file}: {key} is {value!r}, not a number; --results takes what `slimba eval --json` wrote")
    if key in ("tokens", "bytes", "window", "stride") and not (math.isfinite(value) and value >= 0):
        raise UserError(f"{file}: {key} is {value}, which is not a count")
    return float(value)


def _tasks(tasks: Any, file: Path) -> dict[str, dict[str, float]]:
    if not isinstance(tasks, dict) or not all(isinstance(t, dict) for t in tasks.values()):
        raise UserError(f"{file}: tasks is not what `slimba eval --json` writes")
    return {str(t): {str(k): _number(f, k, file) for k in f} for t, f in tasks.items()}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# ------------------------------------------------------------------------------------------------- error by layer


def layer_errors(student: Checkpoint, teacher: Checkpoint, name: str, *, show_progress: bool = False) -> Errors | None:
    """||W_s diag(g_s) - W_t diag(g_t)||^2 / ||W_t diag(g_t)||^2 of every projection; None where the shapes differ.

    g is the weight of the norm whose output the matrix reads (1 where there is none): methods fold column scales into
    it, so that only the products of the two models can be compared. Rows of in_proj are also given by name.
    """
    spec = student.spec
    if spec.matrices() != teacher.spec.matrices() or spec.in_proj_rows != teacher.spec.in_proj_rows:
        return None
    layers: dict[str, list[float]] = {}
    with progress_bar("comparing layers", spec.n_layer, show_progress) as advance:
        for i in range(spec.n_layer):
            for short in spec.layer_matrices():
                norms = [_norm_name(c.spec, i, short) for c in (student, teacher)]
                error, size = _row_errors(student, teacher, f"backbone.layers.{i}.mixer.{short}", norms)
                layers.setdefault(short, []).append(_ratio(error.sum(), size.sum()))
                at = 0
                for part, rows in spec.in_proj_rows.items() if short == "in_proj" else ():
                    here = slice(at, at + rows)
                    layers.setdefault(part, []).append(_ratio(error[here].sum(), size[here].sum()))
                    at += rows
            advance(1)
    tables = {"embedding": "backbone.embeddings"} | ({} if spec.tie_embeddings else {"head": "lm_head"})
    of_tables = {}
    for label, matrix in tables.items():
        norm = "backbone.norm_f.weight" if label == "head" else None
        error, size = _row_errors(student, teacher, matrix, [norm, norm])
        of_tables[label] = _ratio(error.sum(), size.sum())
    wanted = student.provenance.get("teacher_sha256")
    same = None if wanted is None else wanted == teacher.sha256()
    return Errors(name, layers, of_tables, same)


def _norm_name(spec: ModelSpec, layer: int, short: str) -> str | None:
    """Full name of the norm whose weight multiplies the input of a projection, column by column."""
    norm = spec.norm_before(short)
    return norm and f"backbone.layers.{layer}.{norm}"


def _row_errors(
    student: Checkpoint, teacher: Checkpoint, name: str, norms: Sequence[str | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Squared error and squared size of every row, float64 [rows] each."""
    pair = []
    for checkpoint, norm in zip((student, teacher), norms, strict=True):
        w = checkpoint.matrix(name).dequantize()
        pair.append(w * checkpoint.vector(norm) if norm else w)
    s, t = pair
    return np.square(s - t).sum(1, dtype=np.float64), np.square(t).sum(1, dtype=np.float64)


def _ratio(error: float, size: float) -> float:
    return float(error / size) if size > 0 else math.nan
