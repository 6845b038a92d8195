"""Losses of distillation and pretraining. Run the tests: `pytest tests/training/test_losses.py`.

KL is averaged per token (the published DF-SSM code divides by the batch only, which multiplies it by the sequence
length). The [tokens, V] logits exist for one chunk of tokens at a time: `DistillKL` computes the gradients of the
features and of the head while it has them, so neither memory nor a recomputation grows with the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from slimba.training import distributed

__all__ = ["cross_entropy", "hidden_loss", "kl_divergence"]

CHUNK_ELEMENTS = 1 << 28  # logits of one chunk; 1 GiB in float32


class DistillKL(torch.autograd.Function):
    """mean over tokens of KL(teacher || student), both given by features [n, D] and head [V, D]."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, head: torch.Tensor, teacher: torch.Tensor, teacher_head: torch.Tensor
    ) -> torch.Tensor:
        n = student.shape[0]
        chunk = max(1, CHUNK_ELEMENTS // head.shape[0])
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        d_student, d_head = torch.empty_like(student), torch.zeros_like(head, dtype=torch.float32)
        for at in range(0, n, chunk):
            s, t = student[at : at + chunk], teacher[at : at + chunk]
            log_p = F.log_softmax((t @ teacher_head.T).float(), dim=-1)
            log_q = F.log_softmax((s @ head.T).float(), dim=-1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            d_logits = ((log_q.exp() - p) / n).to(head.dtype)
            d_student[at : at + chunk] = d_logits @ head
            d_head += d_logits.T @ s
        ctx.save_for_backward(d_student, d_head.to(head.dtype))
        return total / n

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        d_student, d_head = ctx.saved_tensors
        return d_student * grads[0].to(d_student.dtype), d_head * grads[0].to(d_head.dtype), None, None


class ChunkedCrossEntropy(torch.autograd.Function):
    """mean over tokens of -log softmax(features @ head.T)[target]."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        n = features.shape[0]
        chunk = max(1, CHUNK_ELEMENTS // head.shape[0])
        total = torch.zeros((), dtype=torch.float32, device=features.device)
        d_features, d_head = torch.empty_like(features), torch.zeros_like(head, dtype=torch.float32)
        for at in range(0, n, chunk):
            f, y = features[at : at + chunk], targets[at : at + chunk, None]
            log_q = F.log_softmax((f @ head.T).float(), dim=-1)
            total -= log_q.gather(1, y).sum()
            d_logits = log_q.exp_()
            d_logits.scatter_add_(1, y, torch.full_like(y, -1, dtype=torch.float32))
            d_logits = (d_logits / n).to(head.dtype)
            d_features[at : at + chunk] = d_logits @ head
            d_head += d_logits.T @ f
        ctx.save_for_backward(d_features, d_head.to(head.dtype))
        return total / n

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        d_features, d_head = ctx.saved_tensors
        return d_features * grads[0].to(d_features.dtype), d_head * grads[0].to(d_head.dtype), None


def kl_divergence(
    student: torch.Tensor, head: torch.Tensor, teacher: torch.Tensor, teacher_head: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """KL(teacher || student) in nats per token at temperature 1.

    student, teacher: features [..., D] after the final norm; head, teacher_head [V, D]. The products run in `dtype`,
    softmax and sums in float32. Gradients reach `student` and `head`.
    """
    loss = DistillKL.apply(
        student.flatten(0, -2).to(dtype),
        head.to(dtype),
        teacher.flatten(0, -2).detach().to(dtype),
        teacher_head.detach().to(dtype),
    )
    assert isinstance(loss, torch.Tensor)
    return loss


def cross_entropy(
    features: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Next-token loss in nats per token: features [B, L, D], head [V, D], targets [B, L]."""
    loss = ChunkedCrossEntropy.apply(features.flatten(0, -2).to(dtype), head.to(dtype), targets.flatten().long())
    assert isinstance(loss, torch.Tensor)
    return loss


def hidden_loss(student: list[torch.Tensor], teacher: list[torch.Tensor]) -> torch.Tensor:
    """Mean over layers of |h_s - h_t|^2 / |h_t|^2, both summed over the batch: [B, L, D] each.

    |h_t|^2 is the mean over all processes, so that the mean of their losses is that of one process with all windows.
    """
    sizes = distributed.mean(torch.stack([t.detach().float().square().sum() for t in teacher])).clamp_min(1e-12)
    terms = []
    for s, t, size in zip(student, teacher, sizes, strict=True):
        terms.append((s.float() - t.detach().float()).square().sum() / size)
    return torch.stack(terms).mean()
