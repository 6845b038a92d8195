"""dfssm: the fit, rung 3 of the ladder (trained module deployed = packed file), phases, kill and resume."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.packed import read_packed
from slimba.errors import UserError
from slimba.formats import MatrixLayout
from slimba.formats.presets import preset_layouts
from slimba.methods.dfssm.distil import DistilTask
from slimba.methods.dfssm.fit import fit_signs
from slimba.methods.dfssm.layers import SignMatrices
from slimba.methods.dfssm.recipe import DfssmRecipe, layouts
from slimba.methods.dfssm.run import run
from slimba.methods.dfssm.student import Student
from slimba.models.lm import SSMForCausalLM, init_weights, load_weights
from slimba.models.spec import ModelSpec
from slimba.training.recipes import load_recipe

# every part and every phase, so that each is tested: the default recipe has neither integers in B and C nor a rank
SMALL = dict(window=16, batch=4, calibration_windows=4, init_rounds=3, rank=3, lr_latent=2e-2, lr_other=2e-3)
SMALL |= dict(
    int8_rows=["B", "C", "dt"],
    plane=0,
    plane_rows=["z", "x", "out"],
    hidden_weight=10.0,
    round_from=0.75,
    freeze_from=0.9,
)


def recipe(**settings):
    return load_recipe(DfssmRecipe, "dfssm.yaml", None, {**SMALL, **settings})


def spec_of(architecture="mamba2", **changes):
    base = dict(n_layer=2, d_model=40, d_inner=64, d_state=16, vocab_size=48, n_groups=1, architecture=architecture)
    more = dict(headdim=16, norm_group_size=64) if architecture == "mamba2" else dict(dt_rank=3)
    return ModelSpec(**(base | more | changes))


def teacher_of(spec, seed=0):
    """A random float teacher whose outputs are not flat."""
    network = SSMForCausalLM(spec)
    init_weights(network, seed)
    with torch.no_grad():
        network.backbone.embeddings.weight.mul_(20)
    tensors = {n: p.detach().numpy().copy() for n, p in network.state_dict().items()}
    plain = {n: MatrixLayout.plain(r, c, "float32") for n, (r, c) in spec.matrices().items()}
    return network, Checkpoint(spec=spec, layouts=plain, tensors=tensors)


def ids_of(spec, n=3000, seed=1):
    return np.random.default_rng(seed).integers(0, spec.vocab_size, n).astype(np.int32)


def distil(checkpoint, out, **kw):
    settings = dict(data={"sources": []}, tokens=4 * 16 * 24, seed=0, device="cpu", resume=False, overwrite=False)
    return run(checkpoint, out, ids_of(checkpoint.spec), kw.pop("recipe", recipe()), **(settings | kw))


# ------------------------------------------------------------------ the fit


def test_fit_lowers_the_error_of_plain_signs_and_low_rank_lowers_it_further():
    g = torch.Generator().manual_seed(0)
    w = (
        torch.randn(60, 50, generator=g)
        * (0.2 + torch.rand(50, generator=g) * 3)
        * (0.2 + torch.rand(60, 1, generator=g))
    )
    m = torch.rand(50, generator=g) + 0.01
    plain = torch.where(w >= 0, 1.0, -1.0) * w.abs().mean(1, keepdim=True)
    weight = m / m.mean() + 1e-4
    naive = float(((w - plain).square() * weight).sum() / (w.square() * weight).sum())
    row_only, row_col, low = (
        fit_signs(w, m, rank, 5, 0.1, use_col).error for rank, use_col in ((0, False), (0, True), (4, True))
    )
    assert low < row_col < row_only <= naive + 1e-6


@pytest.mark.parametrize("plane", [None, (20, 0, 30), (8, 0, 30), (8, 10, 25)])
def test_fit_reports_the_error_of_what_it_returns(plane):
    w = torch.randn(30, 20, generator=torch.Generator().manual_seed(1))
    m = torch.rand(20, generator=torch.Generator().manual_seed(2)) + 0.1
    fit = fit_signs(w, m, 3, 4, 0.1, plane=plane)
    weight = m / m.mean() + 1e-4
    error = ((w - fit.scaffold() - fit.a @ fit.b).square() * weight).sum() / (w.square() * weight).sum()
    assert float(error) == pytest.approx(fit.error, rel=1e-4)
    assert float(fit.col.min()) >= 0.1 * float(fit.col.mean()) * 0.99


def test_a_second_plane_lowers_the_error_where_it_is_and_more_columns_lower_it_further():
    w = torch.randn(60, 48, generator=torch.Generator().manual_seed(1))
    m = torch.rand(48, generator=torch.Generator().manual_seed(2)) + 0.1
    errors = [fit_signs(w, m, 0, 6, 0.1, plane=(k, 0, 60) if k else None).error for k in (0, 8, 24, 48)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.4 * errors[0], "four levels against two"
    half = fit_signs(w, m, 0, 6, 0.1, plane=(48, 30, 60))
    assert not half.plane[:30].any() and (half.plane[30:] > 0).all()
    assert errors[-1] < half.error < errors[0]
    some = fit_signs(w, m, 0, 6, 0.1, plane=(8, 0, 60)).columns
    activity = m * w.square().sum(0)
    assert set(some.tolist()) == set(activity.topk(8).indices.tolist()), "the most active columns have it"


def test_fit_keeps_column_scales_away_from_zero():
    w = torch.randn(30, 20, generator=torch.Generator().manual_seed(1))
    w[:, 3] = 0
    fit = fit_signs(w, torch.ones(20), 0, 4, 0.1)
    assert float(fit.col[3]) >= 0.05
    assert torch.isfinite(fit.latent).all()


# ------------------------------------------------------------------ folding and phases

SPECS = {
    "mamba2": spec_of(),
    "groups": spec_of(n_groups=2, norm_group_size=32, tie_embeddings=False),
    "norm-first": spec_of(norm_before_gate=True),
    "no-last-norm": spec_of(gated_norm=False, norm_group_size=0),
    "mamba1": spec_of("mamba1"),
}


@pytest.mark.parametrize("name", SPECS)
def test_folding_changes_nothing_but_the_signs(name):
    """With the sign approximation replaced by the exact rows, the folded student is the teacher."""
    spec = SPECS[name]
    network, _ = teacher_of(spec)
    rows = ("B", "C", "dt") if spec.architecture == "mamba2" else ()
    r = recipe(int8_rows=rows, rank=0)
    student = Student(spec, layouts(spec, r), r)
    ids = torch.from_numpy(ids_of(spec, 64)).long().view(2, 32)
    student.initialise(network, ids)
    weights = student.effective()
    for key, names in student.names.items():
        module = student.stacks[key]
        if not isinstance(module, SignMatrices):
            continue
        # latent * row scale in place of sign(latent) * row scale undoes the sign approximation
        exact = module.latent * module.scales(False)[0][..., None]
        exact = exact if module.col is None else exact * module.col[:, None]
        for i, full in enumerate(names):
            weights[full + ".weight"] = weights[full + ".weight"].clone()
            weights[full + ".weight"][module.sign_mask()] = exact[i]
    ours = torch.func.functional_call(network, weights, (ids,))
    torch.testing.assert_close(ours, network(ids), rtol=1e-4, atol=1e-4)


def test_block_by_block_no_gradient_passes_between_blocks():
    """The embedding feeds only the first block: the loss on the others must not move it, nor the logits the head."""
    spec = SPECS["no-last-norm"]
    network, _ = teacher_of(spec)
    r = recipe(blockwise_until=0.5)
    student = Student(spec, layouts(spec, r), r)
    ids = torch.from_numpy(ids_of(spec, 68)).long().view(4, 17)
    student.initialise(network, ids[:, :-1])
    task = DistilTask(student, network, r)
    task.at_step(0, 10)
    out = task.loss(ids)
    gradient = torch.autograd.grad(out["loss"], student.stacks["in_proj"].latent)[0]
    assert (gradient.abs().sum((1, 2)) > 0).all(), "every block learns"
    weights = student.effective()
    first = weights["backbone.layers.0.mixer.in_proj.weight"]
    hidden = torch.func.functional_call(task.network, {"lm." + k: v for k, v in weights.items()}, (ids[:, :-1],))[1]
    assert torch.autograd.grad(hidden[1].sum(), first, allow_unused=True)[0] is None
    assert task.at_step(5, 10), "end to end from here"
    weights = student.effective()
    first = weights["backbone.layers.0.mixer.in_proj.weight"]
    task.network.lm.backbone.isolated = task.blockwise
    hidden = torch.func.functional_call(task.network, {"lm." + k: v for k, v in weights.items()}, (ids[:, :-1],))[1]
    assert torch.autograd.grad(hidden[1].sum(), first, allow_unused=True)[0] is not None


def test_frozen_signs_get_no_gradient_and_rounding_reaches_every_kind():
    spec = SPECS["mamba2"]
    network, _ = teacher_of(spec)
    r = recipe()
    student = Student(spec, layouts(spec, r), r)
    ids = torch.from_numpy(ids_of(spec, 68)).long().view(4, 17)
    student.initialise(network, ids[:, :-1])
    task = DistilTask(student, network, r)
    task.at_step(0, 10)
    task.loss(ids)["loss"].backward()
    missing = [n for n, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == [], "every master learns"
    student.zero_grad(set_to_none=True)
    assert task.at_step(9, 10), "the last phase is a change of graph"
    task.loss(ids)["loss"].backward()
    assert {n for n, p in student.named_parameters() if p.grad is None} == {
        n for n, _ in student.named_parameters() if n.endswith("latent")
    }


@pytest.mark.parametrize("settings", [dict(estimator="blend"), dict(estimator="tanh"), dict(optimizer_latent="muon")])
def test_every_way_to_train_ends_in_signs_nearer_to_the_teacher(settings, tmp_path):
    _, teacher = teacher_of(SPECS["mamba2"])
    untrained = distil(teacher, tmp_path / "u", tokens=4 * 16, recipe=recipe(plane=0.5))
    record = distil(teacher, tmp_path / "m", tokens=4 * 16 * 120, recipe=recipe(**settings, plane=0.5))
    assert record["final"]["kl"] < 0.8 * untrained["final"]["kl"]
    assert read_packed(tmp_path / "m").layouts["backbone.layers.0.mixer.out_proj"].plane


@pytest.mark.parametrize("name", SPECS)
def test_the_default_recipe_has_the_layouts_that_inspect_counts(name):
    spec = SPECS[name]
    default = load_recipe(DfssmRecipe, "dfssm.yaml", None, {})
    assert layouts(spec, default) == preset_layouts(spec, "dfssm", rank=default.rank)


# ------------------------------------------------------------------ rung 3


LAYOUTS = {
    "int4": dict(embedding="int4", int8_rows=("dt",)),
    "int8": dict(embedding="int8", int8_rows=("dt",), int4_rows=("B", "C")),
    "plane": dict(embedding="int8", int8_rows=("dt",), plane=0.5, plane_rows=("x", "out")),
    "plane-alone": dict(
        embedding="int8", int8_rows=(), plane=1.0, plane_rows=("z", "x", "B", "C", "dt", "out"), rank=0
    ),
    "between": dict(embedding="int8", int8_rows=("x",), plane=0.3, plane_rows=("z", "out")),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_deployed_student_is_the_packed_file(name, layout, tmp_path):
    """Bit for bit in every stored part, 1e-4 in the logits (rung 3)."""
    spec = SPECS[name]
    network, _ = teacher_of(spec)
    settings = dict(LAYOUTS[layout])
    if spec.architecture == "mamba1" and "plane_rows" in settings:
        settings["plane_rows"] = ("z", "out")
    r = recipe(**settings)
    student = Student(spec, layouts(spec, r), r)
    ids = torch.from_numpy(ids_of(spec, 66)).long().view(2, 33)
    student.initialise(network, ids)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    from slimba.checkpoints.packed import write_packed

    packed_dir = write_packed(Checkpoint(spec=spec, layouts=student.layouts, tensors=student.export()), tmp_path / "m")
    packed = read_packed(packed_dir)
    with student.deployed(), torch.no_grad():
        weights = student.effective()
        ours = torch.func.functional_call(network, weights, (ids,))
    for full in spec.matrices():
        stored = packed.matrix(full)
        w = weights[full + ".weight"].numpy()
        factors = stored.lowrank_factors()
        if factors is None:
            assert np.array_equal(w, stored.dequantize()), full
        else:
            key, i = next((k, names.index(full)) for k, names in student.names.items() if full in names)
            module = student.stacks[key]
            assert np.array_equal(student_factor(module.a[i]), factors[0]), full
            assert np.array_equal(student_factor(module.b[i]), factors[1]), full
            np.testing.assert_allclose(w, stored.dequantize(), rtol=1e-6, atol=1e-7, err_msg=full)
    for full in spec.vectors():
        assert np.array_equal(weights[full].detach().numpy(), packed.vector(full)), full
    reference = SSMForCausalLM(spec)
    load_weights(reference, packed)
    with torch.no_grad():
        torch.testing.assert_close(ours, reference(ids), rtol=0, atol=1e-4)


def student_factor(p):
    from slimba.methods.fake_quant import int8_rows

    return int8_rows(p).detach().numpy()


# ------------------------------------------------------------------ whole runs


def test_distilling_brings_the_packed_file_nearer_to_the_teacher(tmp_path):
    network, teacher = teacher_of(SPECS["mamba2"])
    ids = torch.from_numpy(ids_of(teacher.spec, 256, seed=9)).long().view(4, 64)

    def kl(path):
        student = SSMForCausalLM(teacher.spec)
        load_weights(student, read_packed(path))
        with torch.no_grad():
            p, q = network(ids).log_softmax(-1), student(ids).log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    distil(teacher, tmp_path / "short", tokens=4 * 16)
    distil(teacher, tmp_path / "long", tokens=4 * 16 * 120)
    assert kl(tmp_path / "long") < 0.7 * kl(tmp_path / "short")
    assert not (tmp_path / "long.work").exists()
    rows = [json.loads(line) for line in (tmp_path / "long" / "training.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 120
    assert rows[-1]["kl"] < rows[0]["kl"]


def run_child(out, *, resume, save_every):
    """The same run in a process of its own, which can be killed."""
    code = f"""
import importlib.util, torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("case", {__file__!r})
case = importlib.util.module_from_spec(spec); spec.loader.exec_module(case)
import functools
import slimba.methods.dfssm.run as method
method.LoopSettings = functools.partial(method.LoopSettings, save_every_s={save_every}, log_every=1)
_, teacher = case.teacher_of(case.SPECS["mamba2"])
from pathlib import Path
case.distil(teacher, Path({str(out)!r}), tokens=4 * 16 * 80, resume={resume})
"""
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_a_killed_run_resumes_to_the_same_file(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_child(whole, resume=False, save_every=1e9).wait(timeout=120) == 0
    child = run_child(killed, resume=False, save_every=0.0)
    log = tmp_path / "killed.work" / "log.jsonl"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and (not log.exists() or len(log.read_text().splitlines()) < 30):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=10)
    assert not killed.exists(), "nothing half-written is taken for a model"
    steps_before = len(log.read_text().splitlines())
    assert 30 <= steps_before < 80
    assert run_child(killed, resume=True, save_every=1e9).wait(timeout=120) == 0
    a, b = (p / "model.safetensors" for p in (whole, killed))
    assert a.read_bytes() == b.read_bytes()
    steps = [json.loads(row)["step"] for row in (killed / "training.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 81)), "every step is logged once"


def test_resume_with_other_settings_is_refused(tmp_path):
    _, teacher = teacher_of(SPECS["mamba2"])
    work = tmp_path / "m.work"
    (work / "checkpoint-7").mkdir(parents=True)
    (work / "checkpoint-7" / ".metadata").write_bytes(b"x")
    (work / "settings.json").write_text(json.dumps({"method": "dfssm", "seed": 5}))
    with pytest.raises(UserError, match="differs from the interrupted run"):
        distil(teacher, tmp_path / "m", resume=True)


def test_nan_in_the_teacher_is_named(tmp_path):
    _, teacher = teacher_of(SPECS["mamba2"])
    teacher.tensors["backbone.layers.1.mixer.D"][0] = np.nan
    with pytest.raises(UserError, match=r"backbone\.layers\.1\.mixer\.D holds NaN"):
        distil(teacher, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_packed_model_is_no_teacher(tmp_path):
    _, teacher = teacher_of(SPECS["mamba2"])
    distil(teacher, tmp_path / "m", tokens=64)
    with pytest.raises(UserError, match="needs float weights"):
        distil(read_packed(tmp_path / "m"), tmp_path / "n")
