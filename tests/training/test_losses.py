"""The chunked losses equal their plain forms, values and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from slimba.training import losses


@pytest.fixture(params=[1 << 28, 64], ids=["one-chunk", "many-chunks"])
def chunking(request, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", request.param)


def case(seed=0):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(2, 7, 5, generator=g, requires_grad=True) for _ in range(2))
    head, teacher_head = (torch.randn(19, 5, generator=g, requires_grad=True) for _ in range(2))
    return student, head, teacher, teacher_head


def plain_loss(student, head, teacher, teacher_head, temperature, labels, weight):
    log_q, log_p = (F.log_softmax(f @ h.T / temperature, -1) for f, h in ((student, head), (teacher, teacher_head)))
    kl = F.kl_div(log_q.flatten(0, 1), log_p.flatten(0, 1), log_target=True, reduction="none").sum(-1).mean()
    ce = F.cross_entropy((student @ head.T).flatten(0, 1), labels.flatten())
    return kl, (1 - weight) * temperature**2 * kl + weight * ce


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.0), (2.0, 0.0), (1.0, 0.3), (1.0, 1.0)])
def test_distillation_is_a_mean_per_token_with_its_gradients(chunking, temperature, weight):
    tensors = case()
    student, head, *_ = tensors
    labels = torch.randint(0, 19, (2, 7), generator=torch.Generator().manual_seed(2))
    kl, plain = plain_loss(*tensors, temperature, labels, weight)
    expected = torch.autograd.grad(plain, (student, head))
    options = dict(temperature=temperature, labels=labels if weight else None, label_weight=weight)
    out = losses.distillation(*tensors, torch.float32, **options)
    torch.testing.assert_close(out["kl"], kl)
    torch.testing.assert_close(out["loss"], plain)
    # three times the loss, so that a backward which ignores its incoming gradient fails
    for got, want in zip(torch.autograd.grad(3 * out["loss"], (student, head)), expected, strict=True):
        torch.testing.assert_close(got, 3 * want, rtol=1e-5, atol=1e-6)


def test_kl_of_equal_models_is_zero(chunking):
    student, head, _, _ = case()
    assert abs(losses.distillation(student, head, student, head, torch.float32)["kl"].item()) < 1e-6


def test_kl_does_not_grow_with_the_sequence():
    student, head, teacher, teacher_head = case()
    once = losses.distillation(student, head, teacher, teacher_head, torch.float32)["loss"]
    long = (torch.cat([student, student], 1), head, torch.cat([teacher, teacher], 1), teacher_head)
    torch.testing.assert_close(once, losses.distillation(*long, torch.float32)["loss"])


def test_cross_entropy_with_its_gradients(chunking):
    features, head, _, _ = case(1)
    targets = torch.randint(0, 19, (2, 7), generator=torch.Generator().manual_seed(2))
    plain = F.cross_entropy((features @ head.T).flatten(0, 1), targets.flatten())
    expected = torch.autograd.grad(plain, (features, head))
    loss = losses.cross_entropy(features, head, targets, torch.float32)
    torch.testing.assert_close(loss, plain)
    for got, want in zip(torch.autograd.grad(loss, (features, head)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_hidden_loss_is_relative_per_layer():
    t = [torch.full((1, 2, 3), 10.0), torch.full((1, 2, 3), 0.1)]
    s = [h * 1.5 for h in t]
    assert float(losses.hidden_loss(s, t)) == pytest.approx(0.25)
