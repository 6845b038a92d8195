"""The task that distils a student from its teacher: what the loss of a step is, and what changes with the steps.

    task = DistilTask(student, teacher_network, recipe)
    train(task, batches, settings, workdir)

Block by block first, if the recipe says so: each block is fed the student's own stream and learns the teacher's stream
after it, no gradient passes from block to block. Then end to end: KL on the logits, and the streams' relative squared
error with a weight that decays. Tests: `pytest tests/methods/test_dfssm.py`.
"""

from __future__ import annotations

import torch
from torch import nn

from slimba.methods.dfssm.recipe import DfssmRecipe
from slimba.methods.dfssm.student import Student
from slimba.models.lm import SSMForCausalLM
from slimba.training.loop import Group, recomputes
from slimba.training.losses import distillation, hidden_loss
from slimba.training.schedule import fade

__all__ = ["DistilTask"]


class Features(nn.Module):
    """`SSMForCausalLM.features` as a forward, which is what functional_call can run."""

    def __init__(self, lm: SSMForCausalLM) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return self.lm.features(ids)


class DistilTask:
    """Loss and phases of a student; `groups` sorts its parameters by name."""

    def __init__(self, student: Student, teacher: SSMForCausalLM, recipe: DfssmRecipe) -> None:
        self.model, self.teacher, self.recipe = student, teacher.eval(), recipe
        for p in self.teacher.parameters():
            p.requires_grad_(False)
        self.device = next(student.parameters()).device
        # a network without storage: functional_call lends it the student's weights
        with torch.device("meta"):
            self.network = Features(SSMForCausalLM(student.spec))
        self.network.lm.set_recompute(recomputes(recipe.activation_checkpointing, student.spec))
        self.head = "backbone.embeddings.weight" if student.spec.tie_embeddings else "lm_head.weight"
        self.hidden_weight = torch.zeros((), device=self.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        student.phase.dtype = self.dtype
        student.phase.alpha = torch.zeros((), device=self.device)

    def groups(self) -> list[Group]:
        """latent, scale (names ending in _gain) and all others."""
        sorted_: dict[str, list[nn.Parameter]] = {"latent": [], "scale": [], "other": []}
        for name, p in self.model.named_parameters():
            last = name.rpartition(".")[2]
            sorted_["latent" if last == "latent" else "scale" if last.endswith("_gain") else "other"].append(p)
        r = self.recipe
        return [
            Group("latent", sorted_["latent"], r.lr_latent, optimizer=r.optimizer_latent),
            Group("scale", sorted_["scale"], r.lr_scale),
            Group("other", sorted_["other"], r.lr_other),
        ]

    def at_step(self, step: int, total: int) -> bool:
        r, phase = self.recipe, self.model.phase
        before = phase.rounding, phase.frozen, self.with_hidden, self.blockwise
        weight = r.hidden_weight * fade(step, total, r.hidden_until)
        self.blockwise = step < r.blockwise_until * total
        self.with_hidden = weight > 0 or self.blockwise
        self.hidden_weight.fill_(max(weight, 1.0) if self.blockwise else weight)
        phase.rounding = step >= r.round_from * total
        phase.frozen = step >= r.freeze_from * total
        phase.alpha.fill_(min(1.0, step / max(1.0, r.freeze_from * total)))
        return before != (phase.rounding, phase.frozen, self.with_hidden, self.blockwise)

    with_hidden = True
    blockwise = False

    def loss(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs, r = ids[:, :-1], self.recipe
        weights = self.model.effective()
        self.network.lm.backbone.isolated = self.blockwise
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            with torch.no_grad():
                t_features, t_hidden = self.teacher.features(inputs)
            state = {"lm." + k: v for k, v in weights.items()}
            s_features, s_hidden = torch.func.functional_call(self.network, state, (inputs,))
        out = distillation(
            s_features,
            weights[self.head],
            t_features,
            self.teacher.state_dict()[self.head],
            self.dtype,
            temperature=r.temperature,
            labels=ids[:, 1:] if r.label_weight else None,
            label_weight=r.label_weight,
        )
        if self.with_hidden:
            out["hidden"] = hidden_loss(s_hidden, t_hidden)
            out["loss"] = out["loss"] + self.hidden_weight * out["hidden"]
        return out
