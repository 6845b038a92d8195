"""Mixed precision: which mode each layer gets, by an evolutionary search under a budget (Quamba2, section 4.4).

    modes, history = search(budget_of(spec, recipe), fitness, recipe.modes, population=16, generations=8, seed=0)

A candidate is a mode for every layer; its fitness is the KL to the float model on a few windows, lower is better. The
first generation holds the greedy choice, layers upgraded in the order of what their upgrade alone gains for its cost,
and random ones; the better half lives on, and mutations and crossovers of it fill the other half. Who is over budget
is repaired by downgrading layers at random.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from slimba.errors import UserError
from slimba.formats import MatrixLayout
from slimba.methods.quamba2.recipe import QuambaRecipe, layer_layouts
from slimba.models.spec import ModelSpec

__all__ = ["Budget", "budget_of", "greedy", "search"]

Modes = tuple[str, ...]


class Budget:
    """What each mode costs in each layer [layer][mode], and how much there is for all layers together."""

    def __init__(self, costs: Sequence[dict[str, float]], total: float) -> None:
        self.costs, self.total = costs, total
        cheapest = sum(min(c.values()) for c in costs)
        if cheapest > total:
            raise UserError(
                f"recipe: the budget of {total:.6g} is below {cheapest:.6g}, what the cheapest choices cost"
            )

    def cost(self, modes: Sequence[str]) -> float:
        return sum(c[m] for c, m in zip(self.costs, modes, strict=True))

    def fits(self, modes: Sequence[str]) -> bool:
        return self.cost(modes) <= self.total * (1 + 1e-9)

    def cheapest(self, layer: int) -> str:
        return min(self.costs[layer], key=lambda m: self.costs[layer][m])


def budget_of(spec: ModelSpec, recipe: QuambaRecipe) -> Budget:
    """Bytes for `bits` bits a projection weight; or, with `latency_table`, its seconds for `latency` in all.

    The table is a JSON object of a number for each mode, the time of one layer.
    """
    if recipe.latency_table:
        try:
            table = {m: float(v) for m, v in json.loads(Path(recipe.latency_table).read_text("utf-8")).items()}
        except (OSError, ValueError, AttributeError, TypeError):
            raise UserError(f"latency_table {recipe.latency_table} is not a JSON object of a number a mode") from None
        missing = [m for m in recipe.modes if m not in table]
        if missing:
            raise UserError(f"latency_table {recipe.latency_table} has no time for {missing[0]}")
        return Budget([{m: table[m] for m in recipe.modes}] * spec.n_layer, recipe.latency)
    each = {m: list(layer_layouts(spec, recipe, m).values()) for m in recipe.modes}
    weights = sum(x.rows * x.cols for x in next(iter(each.values())))
    costs = {m: float(_bytes(layouts)) for m, layouts in each.items()}
    return Budget([costs] * spec.n_layer, recipe.bits * weights * spec.n_layer / 8)


def _bytes(layouts: Sequence[MatrixLayout]) -> int:
    return sum(x.nbytes for x in layouts)


def greedy(budget: Budget, fitness: Callable[[Modes], float], choices: Sequence[str]) -> Modes:
    """From the cheapest model, the upgrades that gain most for their cost, each measured alone."""
    base = tuple(budget.cheapest(i) for i in range(len(budget.costs)))
    start = fitness(base)
    gains = []
    for i, mode in enumerate(base):
        for other in choices:
            extra = budget.costs[i][other] - budget.costs[i][mode]
            if other != mode:
                gain = start - fitness((*base[:i], other, *base[i + 1 :]))
                gains.append((gain / max(extra, 1e-30), gain, i, other))
    best = list(base)
    for _, gain, i, mode in sorted(gains, reverse=True):
        trial = [*best[:i], mode, *best[i + 1 :]]
        if gain > 0 and best[i] == base[i] and budget.fits(trial):
            best = trial
    return tuple(best)


def search(
    budget: Budget,
    fitness: Callable[[Modes], float],
    choices: Sequence[str],
    *,
    population: int,
    generations: int,
    seed: int,
) -> tuple[Modes, list[float]]:
    """The fittest candidate, and the best fitness of every generation, the first included."""
    rng = np.random.default_rng(seed)
    known: dict[Modes, float] = {}

    def score(modes: Modes) -> float:
        if modes not in known:
            known[modes] = fitness(modes)
        return known[modes]

    def repaired(modes: Sequence[str]) -> Modes:
        out = list(modes)
        for i in rng.permutation(len(out)):
            if budget.fits(out):
                break
            out[i] = budget.cheapest(int(i))
        return tuple(out)

    def random() -> Modes:
        return repaired([choices[int(k)] for k in rng.integers(len(choices), size=len(budget.costs))])

    def mutated(modes: Modes) -> Modes:
        out = list(modes)
        for i in rng.permutation(len(out))[: 1 + rng.integers(2)]:
            out[i] = choices[int(rng.integers(len(choices)))]
        return repaired(out)

    def crossed(a: Modes, b: Modes) -> Modes:
        return repaired([x if rng.random() < 0.5 else y for x, y in zip(a, b, strict=True)])

    living = [greedy(budget, score, choices)]
    living += [random() for _ in range(population - 1)]
    history = []
    for generation in range(generations + 1):
        living = sorted(dict.fromkeys(living), key=score)[: max(2, population // 2)]
        history.append(score(living[0]))
        if generation == generations:
            break
        parents = list(living)
        while len(living) < population:
            a, b = (parents[int(k)] for k in rng.integers(len(parents), size=2))
            living.append(mutated(a) if len(living) % 2 else crossed(a, b))
    return living[0], history
