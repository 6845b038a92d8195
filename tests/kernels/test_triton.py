"""The Triton kernels of the training path against the plain PyTorch functions, values and every gradient.

Run: `pytest tests/kernels/test_triton.py`. Without a GPU the kernels run in Triton's interpreter, which must be chosen
before Triton is imported; that is why this file sets the variable itself and skips where somebody imported it already.
"""

from __future__ import annotations

import os
import sys

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
from slimba.models.mamba2 import Mamba2Mixer

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
def test_kl_and_its_gradient(vocabulary: int) -> None:
    torch.manual_seed(1)
    student = (torch.randn(7, vocabulary, device=DEVICE) * 3).requires_grad_()
    teacher = torch.randn(7, vocabulary, device=DEVICE) * 3
    log_p = teacher.log_softmax(-1)
    expected = (log_p.exp() * (log_p - student.log_softmax(-1))).sum(-1)
    (wanted,) = torch.autograd.grad(expected.sum() * 0.25, student)
    logits = student.detach().clone()
    kl = kl_and_gradient(logits, teacher, 0.25)
    torch.testing.assert_close(kl, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, wanted, atol=1e-6, rtol=1e-5)
