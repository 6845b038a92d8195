"""Parallel scans against their naive recurrences: values, gradients, causality, extreme steps, convolution windows.

Run: `pytest tests/models/test_scan.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from slimba.models.scan import causal_conv1d, selective_recurrence, selective_scan, ssd_chunked, ssd_recurrence

Scan = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def ssd_inputs(length: int, heads: int = 4, headdim: int = 8, groups: int = 1, d_state: int = 16, dt: float = -2.0):
    g = torch.Generator().manual_seed(length + groups)
    rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    inputs = [
        rand(2, length, heads, headdim),
        F.softplus(rand(2, length, heads) + dt),
        -torch.rand(heads, generator=g) * 15 - 1,
        rand(2, length, groups, d_state),
        rand(2, length, groups, d_state),
    ]
    return [t.requires_grad_() for t in inputs], rand(2, heads, headdim, d_state).requires_grad_()


def selective_inputs(length: int, channels: int = 12, d_state: int = 5, dt: float = -2.0):
    g = torch.Generator().manual_seed(length)
    rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    inputs = [
        rand(2, length, channels),
        F.softplus(rand(2, length, channels) + dt),
        -torch.rand(channels, d_state, generator=g) * 15 - 1,
        rand(2, length, d_state),
        rand(2, length, d_state),
    ]
    return [t.requires_grad_() for t in inputs], rand(2, channels, d_state).requires_grad_()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float, floor: float = 1e-6) -> None:
    """Within `tolerance` of the largest value, or of `floor` where all are smaller."""
    error = ((a - b).abs().max() / b.abs().max().clamp_min(floor)).item()
    assert error <= tolerance, f"{error} > {tolerance}"


def agree(
    parallel: Scan, naive: Scan, inputs: list[torch.Tensor], start: torch.Tensor | None, chunk: int, floor: float = 1e-6
) -> None:
    """Outputs within 1e-5 of the largest, gradients of every input within 1e-4 (see `close` for `floor`)."""
    leaves = inputs + ([] if start is None else [start])
    results = []
    for scan, args in ((parallel, (*inputs, chunk, start)), (naive, (*inputs, start))):
        y, state = scan(*args)
        weight = torch.linspace(0.5, 1.5, y.numel()).reshape(y.shape)
        grads = torch.autograd.grad((y.square() * weight).sum() + (state * state).sum(), leaves)
        results.append((y, state, *grads))
    (y, state, *grads), (y_naive, state_naive, *grads_naive) = results
    close(y, y_naive, 1e-5)
    close(state, state_naive, 1e-5)
    for a, b in zip(grads, grads_naive, strict=True):
        assert torch.isfinite(a).all()
        close(a, b, 1e-4, floor)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    ("length", "groups", "headdim", "d_state", "chunk"),
    [
        (1, 1, 8, 16, 64),
        (37, 1, 16, 16, 8),
        (64, 2, 32, 64, 16),
        (65, 4, 8, 128, 16),
        (30, 4, 64, 16, 256),
        (5, 1, 8, 16, 1),
    ],
)
def test_ssd_chunked_is_the_recurrence(
    length: int, groups: int, headdim: int, d_state: int, chunk: int, with_state: bool
) -> None:
    inputs, start = ssd_inputs(length, headdim=headdim, groups=groups, d_state=d_state)
    agree(ssd_chunked, ssd_recurrence, inputs, start if with_state else None, chunk)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (37, 16), (64, 64), (70, 64), (50, 7), (3, 1)])
def test_selective_scan_is_the_recurrence(length: int, chunk: int, with_state: bool) -> None:
    inputs, start = selective_inputs(length)
    agree(selective_scan, selective_recurrence, inputs, start if with_state else None, chunk)


@pytest.mark.parametrize("dt", [-12.0, 6.0])
def test_extreme_steps_stay_finite(dt: float) -> None:
    """dt near 1e-5 (nothing decays) and near 6 (exp(-60) a token): no overflow, no NaN in any gradient.

    At 6 the gradient of A is nearly zero, the others reach 1e5, so it is held to a floor of 100.
    """
    inputs, start = ssd_inputs(100, dt=dt)
    agree(ssd_chunked, ssd_recurrence, inputs, start, 64, floor=100.0)
    inputs, start = selective_inputs(100, dt=dt)
    agree(selective_scan, selective_recurrence, inputs, start, 64, floor=100.0)


@pytest.mark.parametrize("at", [0, 7, 8, 15, 20])
def test_a_token_changes_no_earlier_output(at: int) -> None:
    """The published DF-SSM scan fails this: it took the state at the END of a chunk for Y_off."""
    for parallel, (inputs, _) in ((ssd_chunked, ssd_inputs(24)), (selective_scan, selective_inputs(24))):
        before, _ = parallel(*inputs, 8)
        changed = [t.detach().clone() for t in inputs]
        for i in (0, 1, 3, 4):
            changed[i][:, at] += 1.0
        after, _ = parallel(*changed, 8)
        assert torch.equal(after[:, :at], before[:, :at])
        assert not torch.equal(after[:, at], before[:, at])
        assert (after[:, at + 1 :] - before[:, at + 1 :]).abs().max() > 1e-4


def test_state_at_the_start_of_a_chunk_matters() -> None:
    """y of the first token of the second chunk, by hand: with B = C = 1 and no decay it is the sum of dt x so far."""
    x = torch.arange(1.0, 7.0).reshape(1, 6, 1, 1)
    one = torch.ones(1, 6, 1, 1)
    y, state = ssd_chunked(x, torch.ones(1, 6, 1), torch.zeros(1), one, one, 2)
    assert y.flatten().tolist() == [1, 3, 6, 10, 15, 21]
    assert state.item() == 21


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_causal_conv1d(taps: int) -> None:
    x, w, b = torch.randn(2, 11, 6), torch.randn(6, 1, taps), torch.randn(6)
    y, window = causal_conv1d(x, w, b)
    expected = F.conv1d(F.pad(x.transpose(1, 2), (taps - 1, 0)), w, b, groups=6).transpose(1, 2)
    close(y, expected, 1e-6)
    assert torch.equal(window, x[:, 11 - (taps - 1) :])
    state, pieces = torch.zeros(2, taps - 1, 6), []
    for piece in x.split([1, 2, 5, 3], dim=1):  # pieces shorter and longer than the window
        part, state = causal_conv1d(piece, w, b, state)
        pieces.append(part)
    close(torch.cat(pieces, dim=1), expected, 1e-6)
    assert torch.equal(state, window)


def test_bfloat16_products_keep_float32_decays() -> None:
    inputs, start = ssd_inputs(96, dt=-3.0)
    x, dt, A, B, C = (t.detach() for t in inputs)
    y32, state32 = ssd_chunked(x, dt, A, B, C, 32, start.detach())
    y16, state16 = ssd_chunked(x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16(), 32, start.detach())
    assert y16.dtype == torch.bfloat16 and state16.dtype == torch.float32
    close(y16.float(), y32, 0.03)
    close(state16, state32, 0.03)
