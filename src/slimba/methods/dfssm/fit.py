"""The first fit of signs, scales and low rank to a teacher's matrix, before any training.

    W ~ (r S1 + p S2) c + A B,   error weighted by the input's second moment m:  sum_j m_j (W_ij - ...)^2

S2, the second sign plane, is there in some columns only: those where m_j mean_i W_ij^2 is largest, because a second
sign takes the same share off the error of any column (from 0.363 to 0.118 of a Gaussian's variance).

Alternating: signs of W - AB, in units of r c (1 is the border between the levels r - p and r + p); closed-form row and
column scales (SVID of OneBit, arXiv 2402.11295, refined in turn as in ARB-LLM, arXiv 2410.03129); best low rank of the
weighted residual by subspace iteration. Tests: `pytest tests/methods/test_dfssm.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["SignFit", "fit_signs"]

GAUSSIAN_ROW, GAUSSIAN_PLANE = 0.9816, 0.5288  # the four levels of Lloyd and Max, of a variance of 1
SCALE_ROUNDS, SUBSPACE_ROUNDS = 3, 2


@dataclass(slots=True)
class SignFit:
    """latent [o, i] = (W - AB) / (r c), so that sign(latent) are the signs and mean |latent| is near 1."""

    latent: torch.Tensor
    row: torch.Tensor  # r [o]
    plane: torch.Tensor  # p [o], 0 where there is no second plane
    columns: torch.Tensor  # int64 [k] ascending: those of the second plane
    col: torch.Tensor  # c [i], mean 1
    a: torch.Tensor  # [o, R]
    b: torch.Tensor  # [R, i]
    error: float  # weighted squared error over weighted squared weight

    def scaffold(self) -> torch.Tensor:
        """(r S1 + p S2) c [o, i]."""
        on = torch.zeros_like(self.col)
        on[self.columns] = 1
        first, second = _two_signs(self.latent, on)
        return (first * self.row[:, None] + second * self.plane[:, None]) * self.col


def fit_signs(
    w: torch.Tensor,
    second_moment: torch.Tensor,
    rank: int,
    rounds: int,
    col_floor: float,
    use_col: bool = True,
    plane: tuple[int, int, int] | None = None,
) -> SignFit:
    """w float32 [o, i], second_moment [i] >= 0, plane (columns, first row, end). Deterministic."""
    o, i = w.shape
    # a column that is never active still counts a little
    m = second_moment / second_moment.mean().clamp_min(1e-30) + 1e-4
    count, start, stop = plane or (0, 0, 0)
    columns = (m * w[start:stop].square().sum(0)).topk(count).indices.sort().values
    on, rows_on = w.new_zeros(i), w.new_zeros(o)
    on[columns], rows_on[start:stop] = 1, 1
    low = _LowRank(w, rank, m.sqrt())
    c = w.new_ones(i)
    sigma = (w.square() * m).sum(1).div(m.sum()).sqrt()
    r, p = sigma * GAUSSIAN_ROW, sigma * GAUSSIAN_PLANE * rows_on
    for n in range(rounds):
        target = w - low.product()
        for _ in range(SCALE_ROUNDS):
            latent = target / (r.clamp_min(1e-12)[:, None] * c)
            first, second = _two_signs(latent, on * rows_on[:, None])
            r, p = _row_scales(target, first, second, c, m)
            if use_col:
                c = _column_scale(target, first * r[:, None] + second * p[:, None], col_floor)
        latent = target / (r.clamp_min(1e-12)[:, None] * c)
        first, second = _two_signs(latent, on * rows_on[:, None])
        scaffold = (first * r[:, None] + second * p[:, None]) * c
        low.fit(w - scaffold, start=n == 0)
    rest = w - low.product()
    error = float(((rest - scaffold).square() * m).sum() / (w.square() * m).sum().clamp_min(1e-30))
    fit = SignFit(rest / (r.clamp_min(1e-12)[:, None] * c), r, p, columns, c, low.a, low.b, error)
    fit.latent = _keep_signs(fit.latent, first, second)
    return fit


def _two_signs(latent: torch.Tensor, on: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """S1, and S2 where `on` is 1 (else 0)."""
    first = torch.where(latent >= 0, 1.0, -1.0)
    return first, torch.where(latent.abs() >= 1, first, -first) * on


def _keep_signs(latent: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The signs that were scored stay, also where the last low rank moved a latent over a border."""
    latent = torch.where((latent >= 0) == (first > 0), latent, first * 1e-6)
    beyond, above = second == first, latent.abs() >= 1
    latent = torch.where((second != 0) & beyond & ~above, first, latent)
    return torch.where((second != 0) & ~beyond & above, first * 0.999999, latent)


def _row_scales(
    target: torch.Tensor, first: torch.Tensor, second: torch.Tensor, c: torch.Tensor, m: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares for r and p of every row: two equations with two unknowns."""
    m1, m2 = c * m, c * c * m
    s11, s12, s22 = m2.sum(), (first * second * m2).sum(1), (second.square() * m2).sum(1)
    t1, t2 = (target * first * m1).sum(1), (target * second * m1).sum(1)
    det = s11 * s22 - s12.square()
    both = det > 1e-6 * s11 * s22.clamp_min(1e-30)
    safe = torch.where(both, det, torch.ones_like(det))
    p = torch.where(both, (s11 * t2 - s12 * t1) / safe, torch.zeros_like(det)).clamp_min(0)
    return (t1 - s12 * p) / s11, p


def _column_scale(target: torch.Tensor, levels: torch.Tensor, floor: float) -> torch.Tensor:
    """Least squares for c, floored (later divisions by it stay harmless), mean 1."""
    c = (target * levels).sum(0) / levels.square().sum(0).clamp_min(1e-30)
    c = c.clamp_min(floor * float(c.mean()) + 1e-12)
    return c / c.mean()


class _LowRank:
    """A B nearest to a matrix in the weighted norm; every fit starts from the subspace of the one before."""

    def __init__(self, w: torch.Tensor, rank: int, root: torch.Tensor) -> None:
        self.rank, self.root = rank, root
        self.a, self.b = w.new_zeros(w.shape[0], rank), w.new_zeros(rank, w.shape[1])
        self.width = min(rank + 8, *w.shape)
        random = torch.Generator().manual_seed(0)
        self.basis = torch.randn(w.shape[1], self.width, generator=random).to(w)

    def product(self) -> torch.Tensor:
        return self.a @ self.b

    def fit(self, residual: torch.Tensor, start: bool) -> None:
        if not self.rank:
            return
        e = residual * self.root
        for _ in range(3 * SUBSPACE_ROUNDS if start else SUBSPACE_ROUNDS):
            self.basis = torch.linalg.qr(e.T @ (e @ self.basis)).Q
        u, s, v = torch.linalg.svd(e @ self.basis, full_matrices=False)
        half = s[: self.rank].sqrt()
        self.a = u[:, : self.rank] * half
        self.b = half[:, None] * (v[: self.rank] @ self.basis.T) / self.root
