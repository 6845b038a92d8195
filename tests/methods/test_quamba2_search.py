"""The evolutionary search for mixed precision: against all candidates of a small problem, and in the method.

Run: `pytest tests/methods/test_quamba2_search.py`.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.tiny import tiny_checkpoint
from methods.test_quamba2 import CPU, IDS, recipe, windows_of
from slimba.checkpoints.packed import read_packed, write_packed
from slimba.errors import UserError
from slimba.methods.quamba2.run import quantised
from slimba.methods.quamba2.search import Budget, budget_of, greedy, search
from slimba.runtime.backends.cpu import CpuEngine
from slimba.runtime.backends.reference import ReferenceEngine

CHOICES = ("cheap", "middle", "dear")
COST = {"cheap": 1.0, "middle": 2.0, "dear": 4.0}


def problem(seed: int) -> Any:
    """Layers that gain differently, and pairs that gain only together, so that the greedy choice is not the best."""
    rng = np.random.default_rng(seed)
    gain = rng.exponential(size=7)
    pair = rng.exponential(size=(7, 7)) * (rng.random((7, 7)) < 0.3)

    def loss(modes: tuple[str, ...]) -> float:
        level = np.array([{"cheap": 0, "middle": 0.6, "dear": 1}[m] for m in modes])
        return float(30 - gain @ level - 2 * level @ pair @ level)

    return loss


@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_the_best_of_a_small_problem(seed: int) -> None:
    loss, budget = problem(seed), Budget([COST] * 7, 15.0)
    found, history = search(budget, loss, CHOICES, population=24, generations=25, seed=seed)
    assert budget.fits(found) and history == sorted(history, reverse=True) and history[-1] == loss(found)
    best = min(loss(m) for m in itertools.product(CHOICES, repeat=7) if budget.fits(m))
    first = loss(greedy(budget, loss, CHOICES))
    assert loss(found) <= first and loss(found) - best <= 0.02 * (first - best) + 1e-9


def test_what_is_never_over_budget() -> None:
    seen = []

    def loss(modes: tuple[str, ...]) -> float:
        seen.append(modes)
        return -sum(COST[m] for m in modes)

    budget = Budget([COST] * 5, 9.0)
    found, _ = search(budget, loss, CHOICES, population=8, generations=5, seed=0)
    alone = {m for m in seen if sum(x != "cheap" for x in m) <= 1}  # what the greedy choice measures
    assert all(budget.fits(m) for m in set(seen) - alone) and len(seen) == len(set(seen))
    assert budget.cost(found) == 9
    with pytest.raises(UserError, match="budget"):
        Budget([COST] * 5, 4.0)


def test_budgets_of_bytes_and_of_time(tmp_path: Path) -> None:
    spec = tiny_checkpoint("mamba2").spec
    bits = budget_of(spec, recipe(mode="mixed", bits=6.0))
    assert set(bits.costs[0]) == {"w4a8", "w8a8"} and bits.costs[0]["w4a8"] < bits.costs[0]["w8a8"]
    table = tmp_path / "times.json"
    table.write_text(json.dumps({"w4a8": 0.5, "w4a16": 0.7, "w8a8": 9}))
    times = budget_of(spec, recipe(mode="mixed", choices=["w4a8", "w4a16"], latency_table=str(table), latency=1.3))
    assert times.costs == [{"w4a8": 0.5, "w4a16": 0.7}] * 2 and times.total == 1.3
    table.write_text('{"w4a8": 1}')
    with pytest.raises(UserError, match="w8a8"):
        budget_of(spec, recipe(mode="mixed", latency_table=str(table), latency=3.0))
    table.write_text("[1, 2]")
    with pytest.raises(UserError, match="JSON object"):
        budget_of(spec, recipe(mode="mixed", latency_table=str(table), latency=3.0))


@pytest.mark.parametrize("choices", [["w4a8", "w8a8"], ["w4a8", "w4a16"]])
def test_mixed_models_run_on_the_engines(choices: list[str], tmp_path: Path) -> None:
    table = tmp_path / "times.json"
    table.write_text('{"w4a8": 1, "w4a16": 2, "w8a8": 2}')
    teacher = tiny_checkpoint("mamba2", n_layer=4)
    chosen = recipe(
        mode="mixed",
        choices=choices,
        latency_table=str(table),
        latency=6.0,
        population=6,
        generations=2,
        search_windows=2,
    )
    made, figures = quantised(teacher, chosen, windows_of("", 10), CPU)
    modes = figures["modes"]
    assert sorted(modes) == sorted([choices[0]] * 2 + [choices[1]] * 2)
    assert figures["search_kl"] <= figures["search_first"]
    packed = read_packed(write_packed(made, tmp_path / "packed"))
    for i, mode in enumerate(modes):
        layout = packed.layouts[f"backbone.layers.{i}.mixer.in_proj"]
        assert layout.segments[0].format == ("int8" if mode == "w8a8" else "int4")
        assert layout.activations == ("float32" if mode == "w4a16" else "")
    got = [e.forward(IDS, e.new_state(3)) for e in (ReferenceEngine(packed), CpuEngine(packed, threads=1))]  # type: ignore
    np.testing.assert_allclose(got[0], got[1], atol=0.1 * np.abs(got[0]).max())
