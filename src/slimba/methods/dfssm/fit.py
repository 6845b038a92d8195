"""The first fit of signs, scales and low rank to a teacher's matrix, before any training.

    W ~ r * S * c + A B,   error weighted by the input's second moment m:  sum_j m_j (W_ij - ...)^2

Alternating: signs of W - AB; closed-form row and column scales (SVID of OneBit, arXiv 2402.11295, refined in turn as
in ARB-LLM, arXiv 2410.03129); truncated SVD of the weighted residual. Each step lowers the weighted error, except the
floor on c, which keeps later divisions by c harmless.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["SignFit", "fit_signs"]


@dataclass(slots=True)
class SignFit:
    """latent [o, i] = (W - AB) / (r c), so that sign(latent) are the signs and mean |latent| is near 1."""

    latent: torch.Tensor
    row: torch.Tensor  # r [o]
    col: torch.Tensor  # c [i], mean 1
    a: torch.Tensor  # [o, R]
    b: torch.Tensor  # [R, i]
    error: float  # weighted squared error over weighted squared weight


def fit_signs(
    w: torch.Tensor, second_moment: torch.Tensor, rank: int, rounds: int, col_floor: float, use_col: bool = True
) -> SignFit:
    """w float32 [o, i], second_moment [i] >= 0. Deterministic (the randomised SVD has a fixed seed)."""
    o, i = w.shape
    m = (
        second_moment / second_moment.mean().clamp_min(1e-30) + 1e-4
    )  # a column that is never active still counts a little
    root = m.sqrt()
    a, b = w.new_zeros(o, rank), w.new_zeros(rank, i)
    c = w.new_ones(i)
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    for _ in range(rounds):
        target = w - a @ b
        size = target.abs()
        for _ in range(3):
            r = (size * (c * m)).sum(1) / (c * c * m).sum()
            if use_col:
                c = (size * r[:, None]).sum(0) / (r * r).sum().clamp_min(1e-30)
                c = c.clamp_min(col_floor * float(c.mean()) + 1e-12)
                c = c / c.mean()
        r = (size * (c * m)).sum(1) / (c * c * m).sum()
        if rank:
            scaffold = torch.where(target >= 0, 1.0, -1.0) * r[:, None] * c
            q = min(rank + 8, o, i)
            u, s, v = torch.svd_lowrank((w - scaffold) * root, q=q, niter=4)
            half = s[:rank].sqrt()
            a, b = u[:, :rank] * half, (v[:, :rank] * half).T / root
    torch.random.set_rng_state(generator_state)
    rest = w - a @ b
    scaffold = torch.where(target >= 0, 1.0, -1.0) * r[:, None] * c
    error = float(((rest - scaffold).square() * m).sum() / (w.square() * m).sum().clamp_min(1e-30))
    # the signs that were scored are those of `target`; near-ties that the last SVD moved keep them
    latent = torch.where((rest >= 0) == (target >= 0), rest, torch.where(target >= 0, 1e-6, -1e-6) * r[:, None])
    return SignFit(latent / (r.clamp_min(1e-12)[:, None] * c), r, c, a, b, error)
