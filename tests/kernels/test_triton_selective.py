"""The Triton kernels of the Mamba-1 mixer against the plain PyTorch functions, values and every gradient.

Run: `pytest tests/kernels/test_triton_selective.py`. Without a GPU in Triton's interpreter, see test_triton.py.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
if not CUDA and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton was imported before its interpreter could be chosen", allow_module_level=True)

from helpers.tiny import tiny_spec
from slimba.kernels.triton.mixer1 import conv_silu, scan, usable
from slimba.models.mamba1 import Mamba1Mixer
from slimba.models.scan import causal_conv1d, selective_recurrence

DEVICE = "cuda" if CUDA else "cpu"
NAMES = ("x", "raw", "B", "C", "z", "dt_bias", "A_log", "D")


def inputs(batch: int, length: int, channels: int, n_state: int) -> list[torch.Tensor]:
    """Random arguments of `scan`: B, C and z are slices, as the mixer has them."""
    torch.manual_seed(length)
    x, raw = torch.randn(2, batch, length, channels)
    b, c = torch.randn(batch, length, 2 * n_state + 3).split([n_state, n_state + 3], dim=-1)
    z = torch.randn(batch, length, 2 * channels)[..., channels:]
    bias, d = torch.randn(2, channels)
    a_log = torch.log(torch.arange(1.0, n_state + 1)).repeat(channels, 1) + torch.randn(channels, n_state) * 0.3
    return [t.to(DEVICE).requires_grad_() for t in (x, raw, b, c[..., 3:], z, bias - 2.0, a_log, d)]


def naive_scan(x, raw, B, C, z, dt_bias, A_log, D) -> torch.Tensor:
    """The definition, a token at a time."""
    y, _ = selective_recurrence(x, F.softplus(raw + dt_bias), -A_log.exp(), B, C)
    return (y + D * x) * F.silu(z)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-6))


@pytest.mark.parametrize(
    ("batch", "length", "channels", "n_state"),
    [(1, 1, 5, 3), (2, 63, 40, 16), (1, 64, 32, 16), (2, 129, 33, 4), (1, 70, 20, 33), (1, 65, 7, 1)],
)
def test_scan_and_every_gradient(batch: int, length: int, channels: int, n_state: int) -> None:
    args = inputs(batch, length, channels, n_state)
    seen = torch.randn(batch, length, channels, device=DEVICE)
    expected = naive_scan(*args)
    wanted = torch.autograd.grad((expected * seen).sum(), args)
    out = scan(*args)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    got = torch.autograd.grad((out * seen).sum(), args)
    for name, g, w in zip(NAMES, got, wanted, strict=True):
        assert g.shape == w.shape
        assert relative(g, w) < 1e-4, f"gradient of {name}"


@pytest.mark.parametrize(("length", "channels", "taps"), [(1, 5, 4), (70, 65, 4), (33, 64, 2)])
def test_convolution_of_a_slice(length: int, channels: int, taps: int) -> None:
    torch.manual_seed(0)
    both = torch.randn(2, length, 2 * channels, device=DEVICE, requires_grad=True)
    weight = torch.randn(channels, 1, taps, device=DEVICE, requires_grad=True)
    bias = torch.randn(channels, device=DEVICE, requires_grad=True)
    seen = torch.randn(2, length, channels, device=DEVICE)
    expected = F.silu(causal_conv1d(both[..., :channels], weight, bias)[0])
    wanted = torch.autograd.grad((expected * seen).sum(), (both, weight, bias))
    out = conv_silu(both[..., :channels], weight, bias)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for g, w in zip(torch.autograd.grad((out * seen).sum(), (both, weight, bias)), wanted, strict=True):
        torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-4)


def test_a_token_does_not_see_later_ones() -> None:
    args = [t.detach() for t in inputs(1, 100, 9, 4)]
    before = scan(*args)
    for t in args[:5]:
        t[:, 70:] += 1.0
    after = scan(*args)
    assert torch.equal(before[:, :70], after[:, :70])
    assert not torch.equal(before[:, 70:], after[:, 70:])


def test_strong_decays_and_large_steps_stay_finite() -> None:
    args = inputs(1, 66, 6, 4)
    with torch.no_grad():
        args[1] += 40.0  # dt around 40: the state is forgotten at every token
        args[6] += 3.0
    out = scan(*args)
    torch.testing.assert_close(out, naive_scan(*args), atol=1e-3, rtol=1e-4)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), args))


@pytest.mark.parametrize("norms", [False, True])
def test_mixer_with_the_kernels_is_the_plain_mixer(norms: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixer's own wiring: `fused` is asked for directly, since on a CPU the forward pass does not take it."""
    torch.manual_seed(0)
    mixer = Mamba1Mixer(tiny_spec("mamba1", bcdt_norm_eps=1e-5 if norms else None)).to(DEVICE)
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    u = torch.randn(2, 70, mixer.spec.d_model, device=DEVICE, requires_grad=True)
    everything = (u, *mixer.parameters())
    expected = mixer(u)  # float32: plain PyTorch everywhere
    wanted = torch.autograd.grad(expected.square().sum(), everything)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: True)
    out = mixer(u)
    monkeypatch.undo()
    assert not torch.equal(out, expected)  # other kernels, other roundings
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    for g, w in zip(torch.autograd.grad(out.square().sum(), everything), wanted, strict=True):
        assert relative(g, w) < 1e-3


def test_what_the_kernels_do_not_compute_is_left_to_pytorch() -> None:
    assert usable(tiny_spec("mamba1"))
    assert not usable(tiny_spec("mamba1", conv_bias=False))
    assert not usable(tiny_spec("mamba1", d_state=128))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="minutes in the interpreter")
@pytest.mark.parametrize(("length", "channels"), [(1000, 1024), (513, 100)])
def test_bfloat16_on_the_gpu(length: int, channels: int) -> None:
    """16-bit inputs, as in training: the error is that of their rounding."""
    args = [t.detach() for t in inputs(2, length, channels, 16)]
    args[:5] = [t.bfloat16() for t in args[:5]]
    leaves = [t.requires_grad_() for t in args]
    exact = [t.detach().float().requires_grad_() for t in leaves]
    seen = torch.randn(2, length, channels, device=DEVICE)
    wanted = torch.autograd.grad((naive_scan(*exact) * seen).sum(), exact)
    got = torch.autograd.grad((scan(*leaves) * seen).sum(), leaves)
    for name, g, w in zip(NAMES, got, wanted, strict=True):
        assert relative(g, w) < 2e-2, f"gradient of {name}"
