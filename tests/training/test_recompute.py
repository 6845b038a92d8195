"""Activation checkpointing: the same numbers bit for bit, with less kept; in a plain network and in a student's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.tiny import tiny_checkpoint, tiny_spec
from slimba.methods.dfssm.distil import DistilTask
from slimba.methods.dfssm.recipe import DfssmRecipe, layouts
from slimba.methods.dfssm.student import Student
from slimba.models.configs import named_spec
from slimba.models.lm import SSMForCausalLM, init_weights, load_weights
from slimba.training.loop import recomputes
from slimba.training.pretrain import PretrainRecipe, PretrainTask
from slimba.training.recipes import load_recipe

ARCHITECTURES = ("mamba2", "mamba1")
IDS = torch.from_numpy(np.random.default_rng(0).integers(0, 300, (2, 25)))


def kept_bytes(task: DistilTask | PretrainTask) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of one step, and the bytes of the distinct storages that autograd kept for them."""
    storages: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # so that no address is used twice

    def note(t: torch.Tensor) -> torch.Tensor:
        alive.append(t)
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    task.at_step(0, 10)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = task.loss(IDS)["loss"]
    kept = sum(storages.values())
    loss.backward()
    return {n: p.grad for n, p in task.model.named_parameters() if p.grad is not None}, kept


def pretraining(architecture: str, setting: str) -> PretrainTask:
    recipe = load_recipe(PretrainRecipe, "pretrain.yaml", None, {"activation_checkpointing": setting})
    model = SSMForCausalLM(tiny_spec(architecture, n_layer=4))
    init_weights(model, 0)
    return PretrainTask(model, recipe)


def distilling(architecture: str, setting: str) -> DistilTask:
    rows = ["dt"] if architecture == "mamba2" else []
    changes = {"activation_checkpointing": setting, "rank": 2, "init_rounds": 2, "int8_rows": rows}
    recipe = load_recipe(DfssmRecipe, "dfssm.yaml", None, changes)
    teacher = tiny_checkpoint(architecture, n_layer=4)
    network = SSMForCausalLM(teacher.spec)
    load_weights(network, teacher)
    student = Student(teacher.spec, layouts(teacher.spec, recipe), recipe)
    student.initialise(network, IDS[:, :-1])
    return DistilTask(student, network, recipe)


@pytest.mark.parametrize("make", [pretraining, distilling])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_equal_bit_for_bit_and_less_is_kept(make, architecture: str) -> None:
    plain, kept = kept_bytes(make(architecture, "off"))
    again, kept_less = kept_bytes(make(architecture, "on"))
    assert plain.keys() == again.keys() and len(plain) > 10
    for name, gradient in plain.items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(gradient, again[name]), name
    assert kept_less < 0.75 * kept  # a student's masters, kept in both, are a large part of so small a model


def test_auto_goes_by_the_size() -> None:
    small, large = named_spec("mamba2-130m"), named_spec("mamba2-370m")
    assert [recomputes(s, small) for s in ("auto", "on", "off")] == [False, True, False]
    assert [recomputes(s, large) for s in ("auto", "on", "off")] == [True, True, False]
