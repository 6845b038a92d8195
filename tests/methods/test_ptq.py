"""ptq: chosen rows are rounded, all others keep their bits, and GPTQ is worth its name.

Run: `pytest tests/methods/test_ptq.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from helpers.tiny import tiny_checkpoint
from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.packed import read_packed, write_packed
from slimba.errors import UserError
from slimba.formats import Matrix, MatrixLayout, Segment
from slimba.formats.presets import sign_layouts
from slimba.methods.ptq.recipe import PtqRecipe, layouts
from slimba.methods.ptq.run import quantised
from slimba.models.lm import SSMForCausalLM, load_weights
from slimba.runtime.backends.cpu import CpuEngine
from slimba.runtime.backends.reference import ReferenceEngine
from slimba.training.recipes import load_recipe

WINDOWS = torch.from_numpy(np.random.default_rng(0).integers(0, 304, (8, 40)))
LAYER = "backbone.layers.1.mixer."


def recipe(**changes: Any) -> PtqRecipe:
    return load_recipe(PtqRecipe, "ptq.yaml", None, {"window": 40, "windows": 8, "micro_batch": 3} | changes)


def logits_of(model: Checkpoint) -> torch.Tensor:
    network = SSMForCausalLM(model.spec)
    load_weights(network, model)
    with torch.no_grad():
        out = network(WINDOWS[:2])
    assert isinstance(out, torch.Tensor)
    return out


def test_only_the_chosen_rows_change() -> None:
    teacher = tiny_checkpoint("mamba2", preset="float16")
    packed, error = quantised(teacher, recipe(int4_rows=["B", "C"], int8_rows=["dt", "out"]), WINDOWS)
    spec = teacher.spec
    assert [(s.format, s.rows) for s in packed.layouts[LAYER + "in_proj"].segments] == [
        ("float16", 2 * spec.d_inner),
        ("int4", 2 * spec.d_state),
        ("int8", spec.n_heads),
    ]
    before, after = (c.matrix(LAYER + "in_proj").dequantize() for c in (teacher, packed))
    kept = 2 * spec.d_inner
    assert np.array_equal(before[:kept], after[:kept])
    for rows, bound in ((slice(kept, -spec.n_heads), 0.3), (slice(-spec.n_heads, None), 0.02)):
        change = np.abs(before[rows] - after[rows]).max() / np.abs(before[rows]).max()
        assert 0 < change < bound
    assert 0 < error < 0.05
    for name in ("backbone.embeddings.weight", LAYER + "D", "backbone.norm_f.weight"):
        assert packed.tensors[name] is teacher.tensors[name]


@pytest.mark.parametrize("architecture", ["mamba1", "mamba2"])
def test_the_file_and_both_engines(architecture: str, tmp_path: Any) -> None:
    teacher = tiny_checkpoint(architecture, tie_embeddings=False)
    rows = ["z", "x", "out", "embedding"] if architecture == "mamba2" else ["z", "x", "out", "x_proj", "embedding"]
    packed, _ = quantised(teacher, recipe(int4_rows=rows, int8_rows=["dt", "dt_proj", "head"]), WINDOWS)
    write_packed(packed, tmp_path / "m")
    ids = WINDOWS[0].numpy().astype(np.int32)
    results = []
    for engine in (CpuEngine, ReferenceEngine):
        e = engine(read_packed(tmp_path / "m"))
        results.append(e.forward(ids[None], e.new_state(1)))
    np.testing.assert_allclose(results[0], results[1], atol=1e-4)
    np.testing.assert_allclose(results[1][0], logits_of(packed)[0].numpy(), atol=1e-4)


def test_gptq_is_better_than_the_nearest_level() -> None:
    """On what the model's own projections put out, which is what it minimises."""
    teacher = tiny_checkpoint("mamba2", d_model=64, d_inner=128, headdim=32)
    rows = ["z", "x", "B", "C", "dt", "out"]
    errors = {r: quantised(teacher, recipe(int4_rows=rows, rounding=r), WINDOWS)[1] for r in ("gptq", "nearest")}
    assert errors["gptq"] < 0.8 * errors["nearest"]


def one_bit(formats: dict[str, str]) -> Checkpoint:
    """A Mamba-1 of signs with a low-rank correction, but for the rows in `formats`."""
    source = tiny_checkpoint("mamba1")
    signs = sign_layouts(source.spec, rank=2, embedding="float16", formats=formats)
    tensors = {name: source.tensors[name] for name in source.spec.vectors()}
    for full, layout in signs.items():
        lr = layout.lowrank
        factors = (np.ones((lr.stop - lr.start, 2)), np.ones((2, layout.cols))) if lr else None
        made = Matrix.quantize(source.matrix(full).dequantize(), layout, factors)
        tensors |= {f"{full}.{part}": a for part, a in made.arrays.items()}
    return dataclasses.replace(source, layouts=signs, tensors=tensors)


def test_rows_left_by_another_method_keep_their_bits() -> None:
    """x beside one-bit z in in_proj, and a whole float out_proj, which a column scale has no place in."""
    half = one_bit({"x": "float16", "out": "float16"})
    assert half.layouts[LAYER + "out_proj"].is_plain_float
    packed, _ = quantised(half, recipe(int8_rows=["x", "out"]), WINDOWS)
    at = LAYER + "in_proj"
    assert [s.format for s in packed.layouts[at].segments] == ["int8", "sign"]
    for part in ("1.packed", "1.scale", "lowrank_a", "lowrank_b"):
        assert np.array_equal(packed.tensors[f"{at}.{part}"], half.tensors[f"{at}.{part}"]), part
    for full in (at, LAYER + "out_proj"):
        was, now = half.matrix(full).dequantize(), packed.matrix(full).dequantize()
        assert 0 < np.abs(was - now).max() < 0.02 * np.abs(was).max(), full
    with pytest.raises(UserError, match=r"the z rows of .*in_proj are sign already"):
        quantised(half, recipe(int8_rows=["z"]), WINDOWS)


def test_a_column_scale_is_part_of_the_input() -> None:
    """GPTQ must weigh the stored columns by what meets them, x c: measured on the outputs of the first out_proj."""
    teacher = tiny_checkpoint("mamba1", d_model=64, d_inner=128)
    name = "backbone.layers.0.mixer.out_proj"
    w = teacher.matrix(name).dequantize()
    column = np.exp2(np.arange(w.shape[1]) % 7 - 3).astype(np.float16)
    teacher.layouts[name] = MatrixLayout(w.shape[1], (Segment(w.shape[0], "float32"),), col_scale=True)
    tensors = {n: a for n, a in teacher.tensors.items() if n != name + ".weight"}
    teacher.tensors = tensors | {f"{name}.0.weight": w / column.astype(np.float32), f"{name}.col_scale": column}
    network, seen = SSMForCausalLM(teacher.spec), []
    load_weights(network, teacher)
    network.get_submodule(name).register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(WINDOWS)
    x = seen[0].flatten(0, 1).numpy()
    errors = {}
    for rounding in ("gptq", "nearest"):
        packed, _ = quantised(teacher, recipe(int4_rows=["out"], rounding=rounding), WINDOWS)
        assert packed.layouts[name].describe() == "int4 *col"
        errors[rounding] = float(np.square(x @ (packed.matrix(name).dequantize() - w).T).mean())
    assert 0 < errors["gptq"] < 0.95 * errors["nearest"]  # 1.6 times as much without c


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "nothing is to be rounded; name rows"),
        ({"int4_rows": ["q"]}, "unknown rows"),
        ({"int4_rows": ["out"], "int8_rows": ["out"]}, "named twice"),
        ({"int4_rows": ["x_proj", "head"]}, "the model has none of the rows x_proj, head"),
        ({"int4_rows": ["out"], "damping": 0}, "damping must be above 0"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    teacher = tiny_checkpoint("mamba2")
    with pytest.raises(UserError, match=message):
        layouts(teacher.spec, teacher.layouts, recipe(**changes))
