"""Grids and GPTQ against brute force and against round-to-nearest.

Run: `pytest tests/methods/test_gptq.py`.
"""

import numpy as np
import pytest
import torch

from slimba.formats import Matrix, MatrixLayout
from slimba.methods.gptq import GROUP, Grid, gptq, round_to_nearest

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


@pytest.mark.parametrize(("format", "bits", "group"), [("int4", 4, GROUP), ("int8", 8, None)])
@pytest.mark.parametrize("cols", [GROUP, 3 * GROUP, 77, GROUP + 1])
def test_the_codes_fit_our_formats(format: str, bits: int, group: int | None, cols: int) -> None:
    w, x = random(9, cols), random(600, cols, seed=1)
    for q in (round_to_nearest(w, Grid(bits), group), gptq(w, x.T @ x, Grid(bits), group)):
        layout = MatrixLayout.plain(9, cols, format)
        matrix = Matrix(layout, {layout.part_name(0, part): a for part, a in q.arrays(format).items()})
        assert {k: (a.dtype.name, a.shape) for k, a in matrix.arrays.items()} == {
            k[2:]: v for k, v in layout.tensors("m").items()
        }
        np.testing.assert_array_equal(matrix.dequantize(), q.weight().numpy())


def test_a_scale_a_row_is_also_better_with_gptq() -> None:
    cols = 2 * GROUP
    w = random(40, cols)
    x = random(2000, cols, seed=1) @ (random(cols, cols, seed=2) * 0.1 + torch.eye(cols))
    h = x.T @ x
    ours, plain = gptq(w, h, Grid(8), None), round_to_nearest(w, Grid(8), None)
    assert ours.scale.shape == (40, 1)
    errors = [float(((q.weight() - w) @ h * (q.weight() - w)).sum()) for q in (ours, plain)]
    assert errors[0] < 0.8 * errors[1]
