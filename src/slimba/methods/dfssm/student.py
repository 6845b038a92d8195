"""Student: every master of the model, the canonical state dict they make, and the task that distils them.

student = Student(spec, layouts, recipe)
student.initialise(teacher_network, windows)       # activation-weighted fit, on the device of the teacher
task = DistilTask(student, teacher_network, recipe)
train(task, ...); tensors, layouts = student.export()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from slimba.errors import UserError
from slimba.formats import MatrixLayout
from slimba.methods import fake_quant
from slimba.methods.dfssm.fit import fit_signs
from slimba.methods.dfssm.layers import PlainMatrix, SignMatrix, array
from slimba.methods.dfssm.recipe import DfssmRecipe
from slimba.models.lm import SSMForCausalLM
from slimba.models.spec import ModelSpec
from slimba.training.loop import Group, recomputes
from slimba.training.losses import hidden_loss, kl_divergence
from slimba.training.schedule import fade

__all__ = ["DistilTask", "Student"]


class Features(nn.Module):
    """`SSMForCausalLM.features` as a forward, which is what functional_call can run."""

    def __init__(self, lm: SSMForCausalLM) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return self.lm.features(ids)


def key(name: str) -> str:
    """Module and parameter names may not hold dots."""
    return name.replace(".", "/")


def as_matrix(module: nn.Module) -> PlainMatrix | SignMatrix:
    """For the type checker: a ModuleDict forgets what it holds."""
    assert isinstance(module, PlainMatrix | SignMatrix)
    return module


class Student(nn.Module):
    """Masters in float32. `rounding` and `frozen` are the phases, both on in deployed mode."""

    def __init__(self, spec: ModelSpec, layouts: dict[str, MatrixLayout], recipe: DfssmRecipe) -> None:
        super().__init__()
        self.spec, self.layouts, self.recipe = spec, layouts, recipe
        self.rounding = self.frozen = False
        self.matrices = nn.ModuleDict()
        for name, layout in layouts.items():
            is_sign = any(s.format == "sign" for s in layout.segments)
            self.matrices[key(name)] = (
                SignMatrix(layout, recipe.ste_clip)
                if is_sign
                else PlainMatrix(torch.zeros(layout.rows, layout.cols), layout)
            )
        self.vectors = nn.ParameterDict(
            {key(name): nn.Parameter(torch.zeros(shape)) for name, (shape, _) in spec.vectors().items()}
        )

    @torch.no_grad()
    def initialise(self, teacher: SSMForCausalLM, windows: torch.Tensor) -> dict[str, float]:
        """Fit every matrix to the teacher's, weighted by the inputs it sees in `windows` int64 [n, L].

        Returns the weighted relative squared error of every sign matrix.
        """
        weights = teacher.state_dict()
        for name, p in self.vectors.items():
            p.copy_(weights[name.replace("/", ".")])
        moments = input_moments(teacher, windows)
        errors = {}
        for name, layout in self.layouts.items():
            module, w = self.matrices[key(name)], weights[name + ".weight"].float()
            if isinstance(module, PlainMatrix):
                module.weight.copy_(w)
                continue
            assert isinstance(module, SignMatrix)
            mask = module.sign_mask(w.device)
            rank = layout.lowrank.rank if layout.lowrank else 0
            fit = fit_signs(w[mask], moments[name], rank, self.recipe.init_rounds, self.recipe.col_floor)
            module.initialise(w, fit)
            errors[name] = fit.error
            layer, _, short = name.rpartition(".mixer.")
            norm = self.spec.norm_before(short)
            if norm:  # the norm's weight takes the column scale
                self.vectors[key(f"{layer}.{norm}")].mul_(fit.col)
        return errors

    def effective(self) -> dict[str, torch.Tensor]:
        """The canonical state dict, float32, with gradients to the masters."""
        out = {}
        for name, module in self.matrices.items():
            out[name.replace("/", ".") + ".weight"] = as_matrix(module).effective(self.rounding, self.frozen)
        kinds = self.spec.vectors()
        for name, p in self.vectors.items():
            full = name.replace("/", ".")
            out[full] = fake_quant.float16(p) if self.rounding and kinds[full][1] != "ssm" else p
        return out

    @contextmanager
    def deployed(self) -> Iterator[Student]:
        """Both phases on: the weights that `export` writes."""
        before = self.rounding, self.frozen
        self.rounding = self.frozen = True
        try:
            yield self
        finally:
            self.rounding, self.frozen = before

    def export(self) -> dict[str, np.ndarray]:
        """Every tensor of the packed model by its full name."""
        tensors: dict[str, np.ndarray] = {}
        for name, module in self.matrices.items():
            full = name.replace("/", ".")
            tensors |= {f"{full}.{part}": a for part, a in as_matrix(module).export().arrays.items()}
        for name, p in self.vectors.items():
            full = name.replace("/", ".")
            dtype = np.float32 if self.spec.vectors()[full][1] == "ssm" else np.float16
            tensors[full] = array(p).astype(dtype)
        for full, a in tensors.items():
            if a.dtype.itemsize > 1 and not np.isfinite(a).all():
                raise UserError(f"training left {full} with values that float16 cannot hold; lower the learning rates")
        return tensors


@torch.no_grad()
def input_moments(teacher: SSMForCausalLM, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """E[x^2] of every projection's input by matrix name: [cols] each."""
    sums: dict[str, torch.Tensor] = {}
    count = 0
    hooks = []
    for name, module in teacher.named_modules():
        if name.rpartition(".")[2] in ("in_proj", "out_proj"):

            def add(_m: nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
                x = inputs[0].detach().float().flatten(0, -2)
                sums[name] = sums.get(name, 0) + x.square().sum(0)

            hooks.append(module.register_forward_pre_hook(add))
    try:
        for piece in windows.split(8):
            teacher.features(piece)
            count += piece.numel()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: s / count for name, s in sums.items()}


class DistilTask:
    """KL on the logits per token plus a decaying hidden-state loss; phases by the step."""

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

    def groups(self) -> list[Group]:
        latents: list[nn.Parameter] = []
        scales: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, p in self.model.named_parameters():
            last = name.rpartition(".")[2]
            (latents if last == "latent" else scales if last == "row_gain" else others).append(p)
        r = self.recipe
        return [
            Group("latent", latents, r.lr_latent),
            Group("scale", scales, r.lr_scale),
            Group("other", others, r.lr_other),
        ]

    def at_step(self, step: int, total: int) -> bool:
        r = self.recipe
        before = self.model.rounding, self.model.frozen, self.with_hidden
        weight = r.hidden_weight * fade(step, total, r.hidden_until)
        self.hidden_weight.fill_(weight)
        self.with_hidden = weight > 0
        self.model.rounding = step >= r.round_from * total
        self.model.frozen = step >= r.freeze_from * total
        return before != (self.model.rounding, self.model.frozen, self.with_hidden)

    with_hidden = True

    def loss(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs = ids[:, :-1]
        weights = self.model.effective()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            with torch.no_grad():
                t_features, t_hidden = self.teacher.features(inputs)
            state = {"lm." + k: v for k, v in weights.items()}
            s_features, s_hidden = torch.func.functional_call(self.network, state, (inputs,))
        teacher_head = self.teacher.state_dict()[self.head]
        out = {"kl": kl_divergence(s_features, weights[self.head], t_features, teacher_head, self.dtype)}
        out["loss"] = out["kl"]
        if self.with_hidden:
            out["hidden"] = hidden_loss(s_hidden, t_hidden)
            out["loss"] = out["kl"] + self.hidden_weight * out["hidden"]
        return out
