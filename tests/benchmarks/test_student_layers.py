"""The baselines' layers: what is exported is what trained last, first values as published, gradients where they belong.

Run: `pytest tests/benchmarks/test_student_layers.py`.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from student_layers import Fbi, Levels, Ternary, published_sign_export

from slimba.formats import LowRank, MatrixLayout, Segment

ROWS, COLS, N = 10, 200, 2
SIGNS = MatrixLayout(COLS, (Segment(ROWS, "sign"),))
SIGNS_LORA = MatrixLayout(COLS, (Segment(ROWS, "sign"),), LowRank(3, 0, ROWS))
FLOATS = MatrixLayout.plain(ROWS, COLS, "float32")


@dataclass
class Phase:
    rounding: bool = False
    frozen: bool = False
    alpha: torch.Tensor = field(default_factory=lambda: torch.tensor(1.0))
    dtype: torch.dtype = torch.float32


DEPLOYED = Phase(rounding=True, frozen=True)
MAKERS = {
    "levels17": lambda: Levels(FLOATS, N, 17, anneal=True),
    "levels17-lora": lambda: Levels(FLOATS, N, 17, rank=3),
    "sign": lambda: Levels(SIGNS, N, 2, ste_clip=1.5),
    "sign-lora": lambda: Levels(SIGNS_LORA, N, 2, rank=3),
    "ternary": lambda: Ternary(FLOATS, N),
    "fbi": lambda: Fbi(FLOATS, N),
}


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(N, ROWS, COLS, generator=torch.Generator().manual_seed(seed)) * 0.05


def filled(name: str) -> Any:
    module = MAKERS[name]()
    for i, w in enumerate(weights()):
        assert module.initialise(i, w, torch.ones(COLS)) is None
    with torch.no_grad():
        for p in module.parameters():  # as after some training
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return module


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_exported_is_what_ran(name: str) -> None:
    module = filled(name)
    effective = module.effective(DEPLOYED).detach().numpy()
    for i in range(N):
        np.testing.assert_allclose(module.export(i).dequantize(), effective[i], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_reach_every_master_and_no_frozen_latent(name: str) -> None:
    for frozen in (False, True):
        module = filled(name)
        w = module.effective(Phase(rounding=True, frozen=frozen))
        if w.requires_grad:  # a frozen Ternary has nothing left to train
            (w * weights(2)).sum().backward()
        reached = {n: p.grad is not None and bool(p.grad.any()) for n, p in module.named_parameters()}
        assert reached.pop("latent") != frozen and all(reached.values())


def test_levels_begin_as_published() -> None:
    """s = mean |w|, w clipped to +-s: 23 % squared error of a Gaussian already before rounding; 17 values after it."""
    module = Levels(FLOATS, N, 17, anneal=True)
    w = weights()
    for i in range(N):
        module.initialise(i, w[i])
    soft, hard = (module.effective(Phase(alpha=torch.tensor(a))).detach() for a in (0.0, 1.0))
    torch.testing.assert_close(module.row_base, w.abs().mean(-1))
    for got in (soft, hard):
        assert float((got - w).square().sum() / w.square().sum()) == pytest.approx(0.233, abs=0.03)
    levels = (hard / module.row_base[..., None] * 8).round(decimals=3)
    assert torch.equal(levels, levels.round()) and levels.unique().numel() == 17
    half = module.effective(Phase(alpha=torch.tensor(0.25))).detach()
    torch.testing.assert_close(half, 0.75 * soft + 0.25 * hard)


def test_gradients_pass_clamp_and_rounding_unchanged_and_stop_beyond_the_clip() -> None:
    for module, limit in ((Levels(FLOATS, N, 17, anneal=True), None), (Levels(SIGNS, N, 2, ste_clip=1.5), 1.5)):
        for i, w in enumerate(weights()):
            module.initialise(i, w)
        with torch.no_grad():
            module.latent[0, 0, :3] = torch.tensor([3.0, -3.0, 0.2])
        module.effective(Phase(alpha=torch.tensor(0.5))).sum().backward()
        got = module.latent.grad / module.row_base[..., None]
        assert got[0, 0, 2] == pytest.approx(1)
        assert got[0, 0, 0] == got[0, 0, 1] == (pytest.approx(1) if limit is None else 0)


def test_lora_begins_at_nothing_and_has_the_published_factor() -> None:
    module = Levels(FLOATS, N, 17, rank=4)
    for i, w in enumerate(weights()):
        module.initialise(i, w)
    plain = Levels(FLOATS, N, 17)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if k not in ("a", "b")})
    torch.testing.assert_close(module.effective(Phase()), plain.effective(Phase()))
    assert {p.shape for p in module.lora()} == {(N, ROWS, 4), (N, 4, COLS)}
    with torch.no_grad():
        module.b.fill_(1)
    extra = module.effective(Phase()) - plain.effective(Phase())
    torch.testing.assert_close(extra[..., 0], module.a.sum(-1) / 4, rtol=1e-3, atol=1e-6)


def test_sign_export_is_the_published_one() -> None:
    module = Levels(FLOATS, N, 17, rank=3)
    for i, w in enumerate(weights()):
        module.initialise(i, w)
    with torch.no_grad():
        module.latent[0, 0, :2] = torch.tensor([0.01, -0.01])  # both at level 0
    values = module.nearest(module.latent[0]).detach().numpy()
    assert values[0, 0] == values[0, 1] == 0
    as_published = published_sign_export(module, 0, SIGNS_LORA).dequantize()
    kinder = published_sign_export(module, 0, SIGNS_LORA, keep_latent_sign=True).dequantize()
    assert as_published[0, 0] < 0 and as_published[0, 1] < 0
    assert kinder[0, 0] > 0 and kinder[0, 1] < 0
    scale = np.abs(values * module.row_base[0].numpy()[:, None]).mean(1)
    np.testing.assert_allclose(np.abs(as_published).mean(1), scale, rtol=2e-3)


def test_ternary_groups() -> None:
    """Three values a group of 128 columns, the scale its mean |w|; the short last group counts its own columns only."""
    module = Ternary(FLOATS, N)
    for i, w in enumerate(weights()):
        module.initialise(i, w)
    q = module.effective(Phase()).detach()
    for part, w in ((q[..., :128], weights()[..., :128]), (q[..., 128:], weights()[..., 128:])):
        scale = part.abs().amax(-1)
        torch.testing.assert_close(scale, w.abs().mean(-1), rtol=1e-3, atol=0)
        codes = part / scale[..., None]
        assert set(codes.unique().tolist()) == {-1.0, 0.0, 1.0}
    rate = float((q - weights()).square().sum() / weights().square().sum())
    assert rate == pytest.approx(0.263, abs=0.015)  # absmean of a Gaussian; its best scale would give 0.19


def test_fbi_has_one_scale_and_shift_a_column() -> None:
    module = Fbi(FLOATS, N)
    w = weights() + 0.02
    for i in range(N):
        module.initialise(i, w[i])
    got = module.effective(Phase()).detach()
    beta = w.mean(1)
    alpha = (w - beta[:, None]).abs().mean(1)
    torch.testing.assert_close(got, torch.where(w >= 0, 1.0, -1.0) * alpha[:, None] + beta[:, None])
