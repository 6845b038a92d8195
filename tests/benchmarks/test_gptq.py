"""Grids and GPTQ against brute force and against round-to-nearest.

Run: `pytest tests/benchmarks/test_gptq.py`.
"""

import pytest
import torch
from gptq import GROUP, Grid, gptq, round_to_nearest

GRIDS = [Grid(4), Grid(3), Grid(3, half=True), Grid(2), Grid(2, half=True)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_nearest_is_the_nearest_level(grid: Grid) -> None:
    levels = torch.arange(grid.low, grid.high + 1)
    assert len(levels) == (15 if grid.bits == 4 else 2**grid.bits)
    x = 3 * random(500)
    brute = levels[(x[:, None] - levels).abs().argmin(1)]
    torch.testing.assert_close((grid.nearest(x) - x).abs(), (brute - x).abs())
    assert set(grid.nearest(50 * x[x.abs() > 0.5]).tolist()) == {grid.low, grid.high}


@pytest.mark.parametrize(("grid", "expected"), [(GRIDS[4], 0.119), (GRIDS[2], 0.037), (GRIDS[0], 0.0135)], ids=str)
def test_scales_reach_the_uniform_quantiser_of_a_gaussian(grid: Grid, expected: float) -> None:
    """Squared error of the best uniform quantisers of 4, 8 and 15 levels (Max 1960), less for 128 at a time."""
    w = random(200, 2 * GROUP)
    error = float((round_to_nearest(w, grid).weight() - w).square().mean())
    assert expected * 0.8 < error < expected * 1.03


def test_scales_are_float16_and_the_last_group_may_be_short() -> None:
    w = random(5, GROUP + 30)
    q = round_to_nearest(w, Grid(4))
    assert q.scale.shape == (5, 2) and torch.equal(q.scale, q.scale.half().float())
    alone = round_to_nearest(w[:, GROUP:], Grid(4))
    torch.testing.assert_close(q.weight()[:, GROUP:], alone.weight())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptq_lowers_the_error_of_the_output(grid: Grid) -> None:
    """On correlated inputs; and with uncorrelated ones it is rounding to nearest."""
    w = random(40, GROUP + 60)
    x = random(2000, GROUP + 60, seed=1) @ (random(GROUP + 60, GROUP + 60, seed=2) * 0.1 + torch.eye(GROUP + 60))
    h = x.T @ x

    def loss(q: torch.Tensor) -> float:
        return float(((q - w) @ h * (q - w)).sum())

    ours, plain = gptq(w, h, grid).weight(), round_to_nearest(w, grid).weight()
    assert loss(ours) < 0.8 * loss(plain)
    eye = gptq(w, torch.eye(GROUP + 60), grid)
    torch.testing.assert_close(eye.weight(), plain, rtol=1e-4, atol=1e-4)


def test_a_dead_column_is_zero_and_harmless() -> None:
    w = random(6, GROUP)
    x = random(500, GROUP, seed=1)
    x[:, 7] = 0
    q = gptq(w, x.T @ x, Grid(4)).weight()
    assert not q[:, 7].any() and torch.isfinite(q).all()
    assert float((q - w).square().mean()) < 0.1
