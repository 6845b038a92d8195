"""KL(teacher || student) of two blocks of logits and its gradient in one pass each. Naive twin: `training/losses.py`.

    kl = kl_and_gradient(student, teacher, scale)   # float32 [n]; student [n, V] becomes scale * d kl / d student

A program does one token: logsumexp of both rows, then the sum and the gradient, so that logits are read twice and
nothing of their size is ever made beside them. Tests: `pytest tests/kernels/test_triton.py`.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl

__all__ = ["kl_and_gradient"]


@triton.jit
def _kl_kernel(student, teacher, kl, vocabulary, scale, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    s_row, t_row = student + token * vocabulary, teacher + token * vocabulary
    i = tl.arange(0, BLOCK)
    s_top = tl.full([BLOCK], float("-inf"), tl.float32)
    t_top = tl.full([BLOCK], float("-inf"), tl.float32)
    s_sum = tl.zeros([BLOCK], tl.float32)
    t_sum = tl.zeros([BLOCK], tl.float32)
    for at in range(0, vocabulary, BLOCK):
        ok = at + i < vocabulary
        s = tl.load(s_row + at + i, mask=ok, other=float("-inf")).to(tl.float32)
        t = tl.load(t_row + at + i, mask=ok, other=float("-inf")).to(tl.float32)
        s_new, t_new = tl.maximum(s_top, s), tl.maximum(t_top, t)
        # a lane that saw no number yet has -inf twice, whose difference is not a number
        s_sum = s_sum * tl.where(s_top == s_new, 1.0, tl.exp(s_top - s_new)) + tl.where(ok, tl.exp(s - s_new), 0.0)
        t_sum = t_sum * tl.where(t_top == t_new, 1.0, tl.exp(t_top - t_new)) + tl.where(ok, tl.exp(t - t_new), 0.0)
        s_top, t_top = s_new, t_new
    s_max, t_max = tl.max(s_top, 0), tl.max(t_top, 0)
    s_log = s_max + tl.log(tl.sum(s_sum * tl.exp(s_top - s_max), 0))
    t_log = t_max + tl.log(tl.sum(t_sum * tl.exp(t_top - t_max), 0))
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(0, vocabulary, BLOCK):
        ok = at + i < vocabulary
        log_q = tl.load(s_row + at + i, mask=ok, other=0.0).to(tl.float32) - s_log
        log_p = tl.load(t_row + at + i, mask=ok, other=0.0).to(tl.float32) - t_log
        p = tl.exp(log_p)
        total += tl.where(ok, p * (log_p - log_q), 0.0)
        tl.store(s_row + at + i, ((tl.exp(log_q) - p) * scale).to(student.dtype.element_ty), mask=ok)
    tl.store(kl + token, tl.sum(total, 0))


def kl_and_gradient(student: torch.Tensor, teacher: torch.Tensor, scale: float) -> torch.Tensor:
    """Both [n, V] contiguous. Returns KL per token, float32 [n]; `student` is overwritten by its gradient * scale."""
    n, vocabulary = student.shape
    kl = torch.empty(n, dtype=torch.float32, device=student.device)
    block = min(2048, triton.next_power_of_2(vocabulary))
    _kl_kernel[(n,)](student, teacher, kl, vocabulary, scale, BLOCK=block, num_warps=8 if block == 2048 else 4)
    return kl
