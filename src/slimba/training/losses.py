"""Losses of distillation and pretraining. Run the tests: `pytest tests/training/test_losses.py`.

KL is averaged per token (the published DF-SSM code divides by the batch only, which multiplies it by the sequence
length). The [tokens, V] logits exist for one chunk of tokens at a time: `Distillation` computes the gradients of the
features and of the head while it has them, so neither memory nor a recomputation grows with the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from slimba.kernels import triton
from slimba.training import distributed

__all__ = ["cross_entropy", "distillation", "hidden_loss"]

CHUNK_ELEMENTS = 1 << 28  # logits of one chunk; 1 GiB in float32


class Distillation(torch.autograd.Function):
    """mean over tokens of (1 - w) KL(teacher || student) + w CE(label), and of the KL; from features and heads."""

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        head: torch.Tensor,
        teacher: torch.Tensor,
        teacher_head: torch.Tensor,
        labels: torch.Tensor | None,
        weight: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n = student.shape[0]
        chunk = max(1, CHUNK_ELEMENTS // head.shape[0])
        kernel = fused(student)
        kl, ce = (torch.zeros((), dtype=torch.float32, device=student.device) for _ in range(2))
        d_student, d_head = torch.empty_like(student), torch.zeros_like(head, dtype=torch.float32)
        for at in range(0, n, chunk):
            s, t = student[at : at + chunk], teacher[at : at + chunk]
            y = labels[at : at + chunk] if labels is not None else None
            d_logits = s @ head.T
            if kernel is not None:
                parts = kernel.kl_and_gradient(d_logits, t @ teacher_head.T, 1 / n, y, weight)
            else:
                *parts, d_logits = plain_kl(d_logits, t @ teacher_head.T, y, weight)
                d_logits = (d_logits / n).to(head.dtype)
            kl += parts[0].sum()
            ce += parts[1].sum()
            d_student[at : at + chunk] = d_logits @ head
            d_head += d_logits.T @ s
        ctx.save_for_backward(d_student, d_head.to(head.dtype))
        kl, ce = kl / n, ce / n
        ctx.mark_non_differentiable(kl)
        return kl + weight * (ce - kl), kl

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_student, d_head = ctx.saved_tensors
        return d_student * grads[0].to(d_student.dtype), d_head * grads[0].to(d_head.dtype), None, None, None, None


def plain_kl(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None, weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [n, V] -> KL [n], cross-entropy [n] (0 without labels), gradient of each token's loss [n, V]."""
    log_p, log_q = F.log_softmax(teacher.float(), dim=-1), F.log_softmax(student.float(), dim=-1)
    p = log_p.exp()
    kl = (p * (log_p - log_q)).sum(-1)
    ce, grad = torch.zeros_like(kl), log_q.exp() - p
    if labels is not None:
        ce = -log_q.gather(1, labels[:, None])[:, 0]
        grad = grad + weight * (p - F.one_hot(labels, p.shape[1]))
    return kl, ce, grad


def fused(logits_like: torch.Tensor) -> Any:
    """The module with the Triton kernel where it can run: 16-bit logits on a GPU."""
    if logits_like.is_cuda and logits_like.dtype in (torch.bfloat16, torch.float16):
        return triton.optional("kl")
    return None


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


def distillation(
    student: torch.Tensor,
    head: torch.Tensor,
    teacher: torch.Tensor,
    teacher_head: torch.Tensor,
    dtype: torch.dtype,
    *,
    temperature: float = 1.0,
    labels: torch.Tensor | None = None,
    label_weight: float = 0.0,
) -> dict[str, torch.Tensor]:
    """The loss against the teacher, in nats per token: {"kl": to log, "loss": with gradients to `student` and `head`}.

    loss = (1 - label_weight) T^2 KL(teacher || student) + label_weight CE(labels), both softmaxes at temperature T
    (arXiv 1503.02531; T^2 keeps the gradient's size). student, teacher: features [..., D] after the final norm; head,
    teacher_head [V, D]; labels int64 [...]. The products run in `dtype`, softmax and sums in float32.
    """
    cooler = 1.0 / temperature
    loss, kl = Distillation.apply(
        student.flatten(0, -2).to(dtype) * cooler,
        head.to(dtype),
        teacher.flatten(0, -2).detach().to(dtype) * cooler,
        teacher_head.detach().to(dtype),
        labels.flatten() if labels is not None else None,
        label_weight,
    )
    return {"kl": kl, "loss": loss * temperature**2}


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
