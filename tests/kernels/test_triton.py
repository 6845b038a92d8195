"""The Triton kernels of the training path against the plain PyTorch functions, values and every gradient.

Run: `pytest tests/kernels/test_triton.py`. Without a GPU the kernels run in Triton's interpreter, which must be chosen
before Triton is imported; that is why this file sets the variable itself and skips where somebody imported it already.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton was imported before its interpreter could be chosen", allow_module_level=True)

from helpers.tiny import tiny_spec
from slimba.kernels.triton.kl import kl_and_gradient
from slimba.kernels.triton.mixer import inner, usable
from slimba.kernels.triton.signs import signs_backward, signs_forward
from slimba.methods import signs
from slimba.models.mamba2 import Mamba2Mixer
from slimba.training.losses import plain_kl

DEVICE = "cuda" if CUDA else "cpu"


def mixer_of(**changes) -> Mamba2Mixer:
    torch.manual_seed(0)
    mixer = Mamba2Mixer(tiny_spec(**changes))
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.4 + (1.0 if name in ("norm.weight", "D") else 0.0))
    return mixer.to(DEVICE)


def parameters(m: Mamba2Mixer) -> tuple[torch.Tensor, ...]:
    assert m.norm is not None and m.conv1d.bias is not None
    return m.conv1d.weight, m.conv1d.bias, m.dt_bias, m.A_log, m.D, m.norm.weight


def plain(m: Mamba2Mixer, zxbcdt: torch.Tensor) -> torch.Tensor:
    """The mixer's own lines between its projections, in float32."""
    m.in_proj, m.out_proj = torch.nn.Identity(), torch.nn.Identity()
    return m(zxbcdt)


@pytest.mark.parametrize(
    ("length", "changes"),
    [
        (1, {}),
        (63, {}),
        (64, {"n_groups": 2}),
        (130, {}),
        (150, {"n_groups": 2, "headdim": 32, "norm_group_size": 32}),
        (70, {"d_inner": 96, "n_groups": 3, "norm_group_size": 32, "d_state": 32}),
    ],
)
def test_inner_is_the_mixer_between_its_projections(length: int, changes: dict) -> None:
    m = mixer_of(**changes)
    assert usable(m.spec)
    width = sum(m.spec.in_proj_rows.values())
    zxbcdt = torch.randn(2, length, width, device=DEVICE, requires_grad=True)
    seen = torch.randn(2, length, m.spec.d_inner, device=DEVICE)
    everything = (zxbcdt, *parameters(m))
    expected = plain(m, zxbcdt)
    wanted = torch.autograd.grad((expected * seen).sum(), everything)
    out = inner(zxbcdt, *parameters(m), m.spec)
    torch.testing.assert_close(out, expected, atol=2e-4, rtol=2e-4)
    got = torch.autograd.grad((out * seen).sum(), everything)
    names = ("zxbcdt", "conv weight", "conv bias", "dt_bias", "A_log", "D", "norm")
    for name, g, w in zip(names, got, wanted, strict=True):
        error = float((g - w).norm() / w.norm().clamp_min(1e-6))
        assert error < 1e-3, f"gradient of {name}: relative error {error}"


def test_a_token_does_not_see_later_ones() -> None:
    m = mixer_of()
    zxbcdt = torch.randn(1, 100, sum(m.spec.in_proj_rows.values()), device=DEVICE)
    before = inner(zxbcdt, *parameters(m), m.spec)
    zxbcdt[:, 70:] += 1.0
    after = inner(zxbcdt, *parameters(m), m.spec)
    assert torch.equal(before[:, :70], after[:, :70])
    assert not torch.equal(before[:, 70:], after[:, 70:])


@pytest.mark.parametrize(
    "changes",
    [{"headdim": 8}, {"d_state": 24}, {"norm_before_gate": True}, {"dt_limit": (0.0, 0.1)}, {"gated_norm": False}],
)
def test_what_the_kernels_do_not_compute_is_left_to_pytorch(changes: dict) -> None:
    assert not usable(tiny_spec(**changes))


@pytest.mark.parametrize("vocabulary", [5, 300, 2048, 5000])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_kl_and_its_gradient(vocabulary: int, weight: float) -> None:
    torch.manual_seed(1)
    student, teacher = (torch.randn(7, vocabulary, device=DEVICE) * 3 for _ in range(2))
    labels = torch.randint(0, vocabulary, (7,), device=DEVICE)
    kl, ce, grad = plain_kl(student, teacher, labels if weight else None, weight)
    logits = student.clone()
    ours = kl_and_gradient(logits, teacher, 0.25, labels if weight else None, weight)
    torch.testing.assert_close(ours, (kl, ce), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, grad * 0.25, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("plane", [False, True])
@pytest.mark.parametrize("cols", [7, 1100])
def test_sign_weights_and_their_gradients(plane: bool, cols: int) -> None:
    torch.manual_seed(2)
    latent, row, d_w = (torch.randn(s, device=DEVICE) for s in ((2, 5, cols), (2, 5), (2, 5, cols)))
    scale, on = (torch.rand(2, 5, device=DEVICE), (torch.rand(2, 1, cols, device=DEVICE) < 0.5).float())
    leaves = [t.requires_grad_() for t in ((latent, row, scale) if plane else (latent, row))]
    estimator = signs.Estimator("tanh", 1.2, torch.tensor(1.0))  # a kind without kernel: the plain forward
    plain = signs.sign_weights(latent, row, signs.PlaneScale(scale, on) if plane else None, estimator)
    parts = (scale.detach(), on) if plane else (None, None)
    ours = signs_forward(latent.detach(), row.detach(), *parts, torch.float32)
    assert torch.equal(ours, plain)
    clipped = signs.Estimator("clip", 1.2, torch.tensor(1.0))
    ctx = SimpleNamespace(saved_tensors=(latent, row, *parts), estimator=clipped, kernel=None, needs_input_grad=[True])
    wanted = signs.SignWeights.backward(ctx, d_w)[: len(leaves)]
    d_latent = torch.full_like(latent, float("nan"))
    d_row, d_plane = signs_backward(d_w, latent.detach(), row.detach(), *parts, 1.2, d_latent)
    for got, want in zip((d_latent, d_row, d_plane), wanted, strict=False):
        torch.testing.assert_close(got, want)
