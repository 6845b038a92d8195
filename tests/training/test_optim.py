"""Muon's steps, and groups sorted to their optimisers. Run: `pytest tests/training/test_optim.py`"""

import pytest
import torch
from torch import nn

from slimba.training.optim import Group, Muon, make_optimizers, orthogonal


@pytest.mark.parametrize("shape", [(2, 30, 12), (2, 12, 30), (9, 9)])
def test_orthogonal_takes_singular_values_to_about_one_and_keeps_directions(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = orthogonal(g)
    assert out.shape == g.shape
    singular = torch.linalg.svdvals(out)
    assert singular.max() < 1.3
    assert singular.median() > 0.6
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    cosine = (out * (u @ v)).sum() / (out.norm() * (u @ v).norm())
    assert cosine > 0.95


def test_every_matrix_of_a_stack_is_orthogonalised_on_its_own():
    g = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonal(g), torch.stack([orthogonal(m) for m in g]), rtol=1e-4, atol=1e-5)


def test_the_first_step_has_the_size_that_adamw_has():
    p = nn.Parameter(torch.zeros(40, 20))
    p.grad = torch.randn(40, 20, generator=torch.Generator().manual_seed(2)) * 1e-3
    Muon([{"params": [p], "lr": torch.tensor(0.01)}]).step()
    assert p.detach().square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.25)
    assert (p.detach() * p.grad).sum() < 0, "downhill"


def test_groups_find_their_optimiser_and_their_rate():
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(3)]
    groups = [Group("a", [params[0]], 1.0), Group("b", [params[1]], 1.0, optimizer="muon"), Group("c", [], 1.0)]
    rates = [torch.tensor(0.1), torch.tensor(0.2), torch.tensor(0.3)]
    adamw, muon = make_optimizers(groups, rates, (0.9, 0.98), False)
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(muon, Muon)
    assert adamw.param_groups[0]["lr"] is rates[0] and muon.param_groups[0]["lr"] is rates[1]
