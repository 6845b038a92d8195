"""Student: every master of the model, and the canonical state dict they make.

student = Student(spec, layouts, recipe)
student.initialise(teacher_network, windows)       # activation-weighted fit, on the device of the teacher
weights = student.effective()                      # for torch.func.functional_call, with gradients to the masters
tensors = student.export()                         # the packed model's

A method with other weights overrides `make`. Tests: `pytest tests/methods/test_dfssm.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import nn

from slimba.errors import UserError
from slimba.formats import Matrix, MatrixLayout
from slimba.methods import fake_quant
from slimba.methods.dfssm.layers import Phase, PlainMatrices, SignMatrices, array
from slimba.methods.dfssm.recipe import DfssmRecipe
from slimba.models.lm import SSMForCausalLM
from slimba.models.spec import ModelSpec

__all__ = ["Stack", "Student"]


class Stack(Protocol):
    """n matrices of one layout, as the student needs them."""

    def initialise(self, i: int, w: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor | None: ...

    def effective(self, phase: Phase) -> torch.Tensor: ...

    def export(self, i: int) -> Matrix: ...


class Student(nn.Module):
    """Masters in float32; `phase` says what of deployment is simulated.

    `stacks` holds a module for all matrices of one short name and layout (`names`: the matrices' names in its order),
    `vectors` a parameter [n_layer, ...] for each other tensor of a layer, and those outside the layers.
    """

    def __init__(self, spec: ModelSpec, layouts: dict[str, MatrixLayout], recipe: DfssmRecipe) -> None:
        super().__init__()
        self.spec, self.layouts, self.recipe = spec, layouts, recipe
        self.phase = Phase()
        grouped: dict[tuple[str, MatrixLayout], list[str]] = {}
        for name, layout in layouts.items():
            grouped.setdefault((name.rpartition(".")[2], layout), []).append(name)
        self.stacks, self.names = nn.ModuleDict(), {}
        for (short, layout), names in grouped.items():
            key = short if short not in self.stacks else f"{short}_{len(self.stacks)}"
            self.stacks[key], self.names[key] = self.make(short, layout, len(names)), names
        self.vectors, self.vector_names = nn.ParameterDict(), {}
        for key, names in vector_groups(spec).items():
            shape, self.vector_names[key] = spec.vectors()[names[0]][0], names
            self.vectors[key] = nn.Parameter(torch.zeros(len(names), *shape))

    def make(self, short: str, layout: MatrixLayout, n: int) -> nn.Module:
        """The module of n matrices, a `Stack`; its parameters' names choose their rate: `DistilTask.groups`."""
        if any(s.format == "sign" for s in layout.segments):
            return SignMatrices(n, layout, self.recipe)
        return PlainMatrices(n, layout)

    @torch.no_grad()
    def initialise(self, teacher: SSMForCausalLM, windows: torch.Tensor) -> None:
        """Fit every matrix to the teacher's, weighted by the inputs it sees in `windows` int64 [n, L]."""
        weights = teacher.state_dict()
        for key, names in self.vector_names.items():
            self.vectors[key].copy_(torch.stack([weights[name] for name in names]))
        moments = input_moments(teacher, windows)
        place = {name: (key, i) for key, names in self.vector_names.items() for i, name in enumerate(names)}
        for key, names in self.names.items():
            for i, name in enumerate(names):
                w = weights[name + ".weight"].float()
                col = self.stack(key).initialise(i, w, moments.get(name))
                layer, _, short = name.rpartition(".mixer.")
                norm = self.spec.norm_before(short)
                if norm and col is not None:  # the norm's weight takes the column scale
                    vector, at = place[f"{layer}.{norm}"]
                    self.vectors[vector][at].mul_(col)

    def stack(self, key: str) -> Stack:
        """For the type checker: a ModuleDict forgets what it holds."""
        module: Stack = self.stacks[key]  # type: ignore[assignment]
        return module

    def effective(self) -> dict[str, torch.Tensor]:
        """The canonical state dict with gradients to the masters: matrices in the phase's dtype, vectors float32."""
        out: dict[str, torch.Tensor] = {}
        for key, names in self.names.items():
            for name, w in zip(names, self.stack(key).effective(self.phase).unbind(), strict=True):
                out[name + ".weight"] = w
        kinds = self.spec.vectors()
        for key, names in self.vector_names.items():
            p: torch.Tensor = self.vectors[key]
            if self.phase.rounding and kinds[names[0]][1] != "ssm":
                p = fake_quant.float16(p)
            out |= zip(names, p.unbind(), strict=True)
        return out

    @contextmanager
    def deployed(self, dtype: torch.dtype = torch.float32) -> Iterator[Student]:
        """Both phases on: the weights that `export` writes."""
        before, self.phase = self.phase, copy.copy(self.phase)
        self.phase.rounding = self.phase.frozen = True
        self.phase.dtype = dtype
        try:
            yield self
        finally:
            self.phase = before

    def export(self) -> dict[str, np.ndarray]:
        """Every tensor of the packed model by its full name."""
        tensors: dict[str, np.ndarray] = {}
        for key, names in self.names.items():
            for i, name in enumerate(names):
                tensors |= {f"{name}.{part}": a for part, a in self.stack(key).export(i).arrays.items()}
        for key, names in self.vector_names.items():
            for name, a in zip(names, array(self.vectors[key]), strict=True):
                tensors[name] = a.astype(np.float32 if self.spec.vectors()[name][1] == "ssm" else np.float16)
        for full, a in tensors.items():
            if a.dtype.itemsize > 1 and not np.isfinite(a).all():
                raise UserError(f"training left {full} with values that float16 cannot hold; lower the learning rates")
        return tensors


def vector_groups(spec: ModelSpec) -> dict[str, list[str]]:
    """Names of the vectors that share a parameter, by a key without dots: those of one kind in all layers."""
    out: dict[str, list[str]] = {}
    for name in spec.vectors():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = "*"
        out.setdefault("/".join(parts), []).append(name)
    return out


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
