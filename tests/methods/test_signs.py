"""Sign weights: values by hand, gradients as each estimator says. Run: `pytest tests/methods/test_signs.py`"""

import torch

from slimba.methods.signs import Estimator, PlaneScale, sign_weights


def clip(limit=1.5, kind="clip", alpha=1.0):
    return Estimator(kind, limit, torch.tensor(alpha))


def test_sign_of_zero_is_plus_and_gradient_is_clipped():
    latent = torch.tensor([[[-2.0, -1.0, -0.0, 0.0, 0.5, 3.0]]], requires_grad=True)
    row = torch.tensor([[2.0]], requires_grad=True)
    w = sign_weights(latent, row, None, clip())
    assert w.tolist() == [[[-2, -2, 2, 2, 2, 2]]]
    w.sum().backward()
    assert latent.grad.tolist() == [[[0, 2, 2, 2, 2, 0]]]
    assert row.grad.tolist() == [[2.0]]


def test_second_plane_makes_four_levels_in_its_columns():
    latent = torch.tensor([[[-1.8, -0.3, 0.3, 1.0, 1.9, 2.1, 0.3, 1.9]]], requires_grad=True)
    row, scale = torch.tensor([[2.0]], requires_grad=True), torch.tensor([[0.5]], requires_grad=True)
    on = torch.tensor([[[1.0, 1, 1, 1, 1, 1, 0, 0]]])
    w = sign_weights(latent, row, PlaneScale(scale, on), clip())
    assert w.tolist() == [[[-2.5, -1.5, 1.5, 2.5, 2.5, 2.5, 2.0, 2.0]]]
    upstream = torch.arange(1.0, 9.0)
    (w * upstream).sum().backward()
    # the plane's columns clip half a unit later
    assert latent.grad.tolist() == [[[2.0, 4, 6, 8, 10, 0, 14, 0]]]
    assert row.grad.item() == -1 - 2 + 3 + 4 + 5 + 6 + 7 + 8
    assert scale.grad.item() == -1 + 2 - 3 + 4 + 5 + 6


def test_a_row_without_the_plane_is_signs_alone():
    latent = torch.randn(2, 3, 8)
    scale = torch.tensor([[0.0, 0.4, 0.4], [0.4, 0.0, 0.4]])
    w = sign_weights(latent, torch.ones(2, 3), PlaneScale(scale, torch.ones(2, 1, 8)), clip())
    assert (w[0, 0].abs() == 1).all() and (w[1, 1].abs() == 1).all()
    assert ((w[0, 1].abs() - 1).abs() - 0.4).abs().max() < 1e-6


def test_tanh_passes_its_slope_and_blend_ends_in_signs():
    latent = torch.tensor([[[-0.5, 0.2, 1.2]]], requires_grad=True)
    row = torch.ones(1, 1)
    sign_weights(latent, row, None, clip(kind="tanh", alpha=0.0)).sum().backward()
    torch.testing.assert_close(latent.grad, 1 - torch.tanh(latent.detach()).square())
    latent.grad = None
    start, end = (sign_weights(latent, row, None, clip(kind="blend", alpha=a)) for a in (0.0, 1.0))
    torch.testing.assert_close(start, latent)
    assert end.tolist() == [[[-1, 1, 1]]]
    start.sum().backward()
    assert latent.grad.tolist() == [[[1, 1, 1]]]
