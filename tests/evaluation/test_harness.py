"""The lm-eval adapter: likelihoods against the engine's own, and a tiny local task from end to end.

`pytest tests/evaluation/test_harness.py`
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from helpers.bigram import BigramEngine
from helpers.tiny import tiny_checkpoint, tiny_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")

from slimba.data.tokenizer import Tokenizer
from slimba.errors import UserError
from slimba.evaluation.harness import HarnessModel, run_tasks
from slimba.runtime.api import LoadedModel


@pytest.fixture
def model(tmp_path: Path) -> LoadedModel:
    file = tiny_tokenizer(tmp_path / "tokenizer.json")
    table = np.random.default_rng(0).standard_normal((304, 304))
    return LoadedModel(BigramEngine(table), tiny_checkpoint(tokenizer=file), Tokenizer.from_file(file))


def ask(*args: object) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def by_hand(model: LoadedModel, before: list[int], ids: list[int]) -> float:
    chain = [before[-1], *ids]
    return float(sum(model.engine.log_p[a, b] for a, b in zip(chain, ids, strict=False)))


def test_likelihoods(model: LoadedModel) -> None:
    encode = model.need_tokenizer().encode
    cases = [("the sea", " was calm"), ("the sea", " is"), ("the sea ", "was calm"), ("", "the ship")]
    got = HarnessModel(model).loglikelihood([ask(*c) for c in cases])
    before, whole = encode("the sea"), encode("the sea was calm")
    assert whole[: len(before)] == before
    assert got[0][0] == pytest.approx(by_hand(model, before, whole[len(before) :]))
    assert got[2] == got[0], "a space at the border belongs to the continuation"
    assert got[3][0] == pytest.approx(by_hand(model, [0], encode("the ship")))
    best = model.engine.table.argmax(-1)
    first = int(best[before[-1]])
    adapter = HarnessModel(model)
    assert adapter._score(before, [first, int(best[first])])[1] is True
    assert adapter._score(before, [first, int(best[first]) - 1])[1] is False


def test_rolling_and_generation(model: LoadedModel) -> None:
    adapter = HarnessModel(model)
    ids = model.need_tokenizer().encode("the ship lay at anchor")
    rolling = adapter.loglikelihood_rolling([ask("the ship lay at anchor"), ask("")])
    assert rolling == [pytest.approx(by_hand(model, [0], ids)), 0]
    free = model.generate("the sea", max_new_tokens=12).text
    settings = {"until": [free[4:6]], "max_gen_toks": 12}
    assert adapter.generate_until([ask("the sea", settings)]) == [free[: free.index(free[4:6])]]
    assert adapter.generate_until([ask("the sea", {"until": "", "max_gen_toks": 12})]) == [free]


def test_a_local_task(model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = [
        {"question": "the sea was", "choices": [" calm", " 12345"]},
        {"question": "the men", "choices": [" sang", "!"]},
    ]
    adapter = HarnessModel(model)
    for row in rows:
        scores = adapter.loglikelihood([ask(row["question"], c) for c in row["choices"]])
        row["answer"] = int(np.argmax([s for s, _ in scores]))
    rows[1]["answer"] = 1 - rows[1]["answer"]  # the second is made wrong: accuracy one half
    file = tmp_path / "task.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = {
        "task": "two_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    figures = run_tasks(model, [task])["two_questions"]
    assert figures["acc"] == 0.5
    assert all(math.isfinite(v) for v in figures.values())


def test_bad_tasks_are_user_errors(model: LoadedModel) -> None:
    with pytest.raises(UserError, match="no_such_task_at_all"):
        run_tasks(model, ["no_such_task_at_all"])
    with pytest.raises(UserError, match="no task given"):
        run_tasks(model, [""])
    with pytest.raises(UserError, match="--limit"):
        run_tasks(model, ["arc_easy"], limit=0)
