"""KL(teacher || student) of two blocks of logits, with cross-entropy mixed in, and the gradient, in one pass each.

    kl, ce = kl_and_gradient(student, teacher, scale)   # float32 [n]; student [n, V] becomes scale * d loss / d student

Naive twin: `training/losses.py`. A program does one token: logsumexp of both rows, then the sums and the gradient, so
that logits are read twice and nothing of their size is made beside them. Tests: `pytest tests/kernels/test_triton.py`.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl

__all__ = ["kl_and_gradient"]


@triton.jit
def _kl_kernel(
    student, teacher, labels, kl, ce, vocabulary, scale, label_weight, LABELS: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    label = -1
    if LABELS:
        label = tl.load(labels + token).to(tl.int32)
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
    hit = tl.zeros([BLOCK], tl.float32)
    for at in range(0, vocabulary, BLOCK):
        ok = at + i < vocabulary
        log_q = tl.load(s_row + at + i, mask=ok, other=0.0).to(tl.float32) - s_log
        log_p = tl.load(t_row + at + i, mask=ok, other=0.0).to(tl.float32) - t_log
        p = tl.exp(log_p)
        total += tl.where(ok, p * (log_p - log_q), 0.0)
        wanted = p
        if LABELS:
            here = (at + i == label).to(tl.float32)
            hit -= here * log_q
            wanted = p + label_weight * (here - p)
        tl.store(s_row + at + i, ((tl.exp(log_q) - wanted) * scale).to(student.dtype.element_ty), mask=ok)
    tl.store(kl + token, tl.sum(total, 0))
    if LABELS:
        tl.store(ce + token, tl.sum(hit, 0))


def kl_and_gradient(
    student: torch.Tensor,
    teacher: torch.Tensor,
    scale: float,
    labels: torch.Tensor | None = None,
    label_weight: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """student, teacher [n, V] contiguous, labels int64 [n]. Returns KL and cross-entropy per token, float32 [n] each.

    `student` is overwritten by the gradient of scale * ((1 - label_weight) KL + label_weight CE). Without labels the
    cross-entropy is 0.
    """
    n, vocabulary = student.shape
    kl = torch.empty(n, dtype=torch.float32, device=student.device)
    ce = torch.zeros_like(kl)
    block = min(2048, triton.next_power_of_2(vocabulary))
    _kl_kernel[(n,)](
        student, teacher, labels if labels is not None else kl, kl, ce, vocabulary, scale, label_weight,
        LABELS=labels is not None, BLOCK=block, num_warps=8 if block == 2048 else 4,
    )  # fmt: skip
    return kl, ce
