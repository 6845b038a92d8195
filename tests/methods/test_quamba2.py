"""quamba2: what must leave the logits alone, the files it writes on every engine, and that its parts help.

Run: `pytest tests/methods/test_quamba2.py`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.tiny import TEXT, tiny_checkpoint, tiny_directory
from slimba import compress
from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.packed import read_packed, write_packed
from slimba.cli.inspect import inspect
from slimba.errors import UserError
from slimba.formats import Matrix, MatrixLayout
from slimba.formats.hadamard import hadamard
from slimba.methods.quamba2.fold import Source, reordered, rotate
from slimba.methods.quamba2.layers import Layer, Rounding, quantise, weights_of
from slimba.methods.quamba2.model import features
from slimba.methods.quamba2.recipe import QuambaRecipe, layer_layouts
from slimba.methods.quamba2.run import quantised, sample
from slimba.models.lm import SSMForCausalLM, load_weights
from slimba.runtime.backends.cpu import CpuEngine
from slimba.runtime.backends.reference import ReferenceEngine
from slimba.training.recipes import load_recipe

CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "mamba2": dict(architecture="mamba2"),
    "two-groups": dict(architecture="mamba2", n_groups=2, d_inner=96, norm_group_size=48, headdim=12),
    "odd": dict(architecture="mamba2", n_groups=2, d_model=44, d_inner=60, headdim=10, d_state=5, proj_bias=True),
    "untied": dict(architecture="mamba2", tie_embeddings=False, d_has_hdim=True, conv_bias=False),
    "mamba1": dict(architecture="mamba1", d_model=48),
    "mamba1-odd": dict(architecture="mamba1", d_model=37, d_inner=50, d_state=3, tie_embeddings=False),
}
IDS = np.random.default_rng(0).integers(0, 304, (3, 33)).astype(np.int32)


def model(name: str, seed: int = 0) -> Checkpoint:
    return tiny_checkpoint(**MODELS[name], seed=seed)


def recipe(**changes: Any) -> QuambaRecipe:
    small = {"window": 32, "windows": 6, "check_windows": 2, "micro_batch": 4}
    return load_recipe(QuambaRecipe, "quamba2.yaml", None, small | changes)


def windows_of(name: str, n: int = 8) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 304, (n, 33)).astype(np.int64))


def float_logits(teacher: Checkpoint) -> np.ndarray:
    network = SSMForCausalLM(teacher.spec)
    load_weights(network, teacher)
    with torch.inference_mode():
        return network(torch.from_numpy(IDS).long()).numpy()  # type: ignore[union-attr]


@torch.inference_mode()
def logits_of(source: Source, change: Any = lambda layer, i: layer) -> np.ndarray:
    """The float model that a Source holds, each of its layers changed."""
    table, head = source.embedding(), source.head()
    layers = (Layer(source.spec, change(source.layer(i), i), CPU, int8=False) for i in range(source.spec.n_layer))
    x = features(layers, [table[torch.from_numpy(IDS).long()]], source.final_norm(), source.spec.norm_eps)[0]
    out: np.ndarray = (x @ (table if head is None else head).T).numpy()
    return out


# ------------------------------------------------------------------------------------------------ invariance


@pytest.mark.parametrize("name", MODELS)
def test_folding_and_rotating_the_residual_stream_leave_the_logits(name: str) -> None:
    teacher = model(name)
    want = float_logits(teacher)
    np.testing.assert_allclose(logits_of(Source(teacher, fold=False)), want, atol=1e-5)
    turned = Source(teacher, fold=True)
    assert not turned.spec.tie_embeddings
    np.testing.assert_allclose(logits_of(turned), want, atol=1e-5)
    assert not np.allclose(
        turned.layer(0)["mixer.in_proj.weight"], Source(teacher, fold=False).layer(0)["mixer.in_proj.weight"]
    )
    assert (turned.layer(1)["norm.weight"] == 1).all() and (turned.final_norm() == 1).all()


def random_order(spec: Any, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads shuffled within their group, channels within their head."""
    rng = np.random.default_rng(seed)
    per_group = spec.n_heads // spec.n_groups
    heads = np.concatenate([g * per_group + rng.permutation(per_group) for g in range(spec.n_groups)])
    channels = np.concatenate([h * spec.headdim + rng.permutation(spec.headdim) for h in heads])
    return torch.from_numpy(channels), torch.from_numpy(heads)


@pytest.mark.parametrize("name", [n for n in MODELS if not n.startswith("mamba1")])
@pytest.mark.parametrize("fold", [False, True])
def test_reordering_heads_and_channels_leaves_the_logits(name: str, fold: bool) -> None:
    teacher = model(name)

    def shuffle(layer: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
        out = reordered(layer, teacher.spec, *random_order(teacher.spec, i))
        assert not torch.equal(out["mixer.in_proj.weight"], layer["mixer.in_proj.weight"])
        return out

    np.testing.assert_allclose(logits_of(Source(teacher, fold=fold), shuffle), float_logits(teacher), atol=1e-5)


def test_a_gated_norm_of_small_groups_is_not_reordered() -> None:
    teacher = tiny_checkpoint("mamba2", norm_group_size=32)
    with pytest.raises(UserError, match="gated norm"):
        reordered(Source(teacher, fold=False).layer(0), teacher.spec, *random_order(teacher.spec, 0))


@pytest.mark.parametrize(("cols", "block"), [(24, 8), (96, 32), (64, 64), (256, 128), (1024, 1024), (7, 1)])
def test_rotate_is_the_transform(cols: int, block: int) -> None:
    x = torch.randn(3, 5, cols, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate(x, block), hadamard(x, block), atol=2e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize("mode", ["w8a8", "w4a8", "w4a16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_engines_compute_what_was_calibrated(name: str, mode: str, tmp_path: Path) -> None:
    """The layers of the method, the reference and the CPU engine on the file. A code may flip where sums differ in the
    last bit and moves the logits by a step of the activations, so int8 ones are compared by how many agree.
    """
    teacher = model(name)
    chosen = recipe(mode=mode, residual="fold" if name == "odd" else "auto")
    made, figures = quantised(teacher, chosen, windows_of(name), CPU)
    packed = read_packed(write_packed(made, tmp_path / "packed"))
    assert packed.numerics["activations"] == ("float32" if mode == "w4a16" else "int8")
    out = packed.layouts["backbone.layers.0.mixer.out_proj"]
    assert out.hadamard == out.cols & -out.cols and out.segments[0].format == ("int8" if mode == "w8a8" else "int4")
    want = float_logits(teacher)
    engines = [ReferenceEngine(packed), CpuEngine(packed, threads=1)]
    got = [e.forward(IDS, e.new_state(3)) for e in engines]  # type: ignore[arg-type]
    close = np.isclose(got[0], got[1], rtol=0, atol=2e-5).all(-1)
    assert close.mean() > (0.99 if mode == "w4a16" else 0.3)
    np.testing.assert_allclose(got[0], got[1], atol=0.1 * np.abs(want).max())
    assert 1e-6 < np.square(got[0] - want).mean() / np.square(want).mean() < (0.001 if mode == "w8a8" else 0.1)
    ids = windows_of(name)[-2:].numpy().astype(np.int32)
    reference = ReferenceEngine(packed)
    loss = reference.nll(ids[:, :-1], ids[:, 1:], reference.new_state(2)).mean()
    assert figures["perplexity"] == pytest.approx(np.exp(loss), rel=2e-3 if mode != "w4a16" else 1e-4)


@pytest.mark.parametrize("name", ["two-groups", "mamba1"])
def test_static_input_scales_are_in_the_file(name: str, tmp_path: Path) -> None:
    made, _ = quantised(
        model(name), recipe(mode="w8a8", input_scale="static", int8_scale="tensor"), windows_of(name), CPU
    )
    packed = read_packed(write_packed(made, tmp_path / "packed"))
    for layer in range(2):
        for short in packed.spec.layer_matrices():
            matrix = packed.matrix(f"backbone.layers.{layer}.mixer.{short}")
            assert matrix.arrays["input_scale"] > 0 and len(np.unique(matrix.arrays["0.scale"])) == 1
    engines = [ReferenceEngine(packed), CpuEngine(packed, threads=1)]
    got = [e.forward(IDS, e.new_state(3)) for e in engines]  # type: ignore[arg-type]
    np.testing.assert_allclose(got[0], got[1], atol=0.1 * np.abs(got[0]).max())


# ------------------------------------------------------------------------------------------------ what it is for


def spiked(teacher: Checkpoint) -> Checkpoint:
    """Some channels of the gated norm 40 times as large, which out_proj divides out again: the same float model."""
    tensors = {k: np.array(v) for k, v in teacher.tensors.items()}
    for i in range(teacher.spec.n_layer):
        at = f"backbone.layers.{i}.mixer."
        tensors[at + "norm.weight"][[3, 40]] *= 40
        tensors[at + "out_proj.weight"][:, [3, 40]] /= 40
    return dataclasses.replace(teacher, tensors=tensors)


def kl(teacher: Checkpoint, **changes: Any) -> float:
    return float(quantised(teacher, recipe(**changes), windows_of("", 12), CPU)[1]["kl"])


def test_the_transform_before_out_proj_removes_what_outliers_cost() -> None:
    teacher = spiked(model("mamba2"))
    np.testing.assert_allclose(float_logits(teacher), float_logits(model("mamba2")), atol=1e-4)
    without = kl(teacher, mode="w8a8", hadamard=[])
    assert kl(teacher, mode="w8a8") < 0.5 * without


@pytest.mark.parametrize("mode", ["w8a8", "w4a16"])
def test_gptq_lowers_the_error_of_what_it_is_calibrated_on(mode: str) -> None:
    """Of out_proj's output in the first layer, on held-out windows; its inputs are correlated by nature."""
    teacher = model("mamba2")
    source = Source(teacher, fold=False)
    table = source.embedding()
    streams, held_out = table[windows_of("", 24)[:16, :-1]], table[windows_of("", 24)[16:, :-1]]
    error = {}
    for gptq in (True, False):
        layer = Layer(source.spec, source.layer(0), CPU, int8=False)
        layout = layer_layouts(source.spec, recipe(mode=mode), mode)["out_proj"]
        want = held_out.clone()
        layer.advance([want])
        inputs = layer.inputs("out_proj", layout, [streams])
        layer.use("out_proj", quantise(layer, "out_proj", layout, inputs, Rounding(gptq, 0.01, False, 1.0)))
        got = held_out.clone()
        layer.advance([got])
        error[gptq] = float((got - want).square().mean())
    assert 0 < error[True] < 0.9 * error[False]


# ------------------------------------------------------------------------------------------------ the verb


def test_compress_writes_a_model_that_says_where_it_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tiny_directory(tmp_path / "teacher")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 4)
    record = compress(
        teacher, tmp_path / "out", method="quamba2", data=[text], mode="w8a8", window=32, windows=4, device="cpu"
    )
    packed = read_packed(tmp_path / "out")
    assert packed.provenance == json.loads(json.dumps(record)) and record["tokens"] == 128
    assert record["final"]["perplexity"] == pytest.approx(record["final"]["teacher_perplexity"], rel=0.05)
    assert "quamba2, w8a8" in (tmp_path / "out" / "README.md").read_text()
    inspect(str(tmp_path / "out"))
    shown = capsys.readouterr().out
    assert "layers 0-1: in_proj int8 hadamard:32, out_proj int8 hadamard:64" in shown
    assert "numerics: activations int8, state float32" in shown
    fewer = compress(teacher, tmp_path / "b", method="quamba2", data=[text], tokens=64, window=32, device="cpu")
    assert fewer["tokens"] == 64


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    teacher = tiny_directory(tmp_path / "teacher")
    text = tmp_path / "text.txt"
    text.write_text("Too short.")
    with pytest.raises(UserError, match="window of 1024"):
        compress(teacher, tmp_path / "out", method="quamba2", data=[text], device="cpu")
    with pytest.raises(UserError, match="--resume"):
        compress(teacher, tmp_path / "out", method="quamba2", data=[text], resume=True)
    packed = tiny_directory(tmp_path / "packed", preset="int8")
    with pytest.raises(UserError, match="float weights"):
        compress(packed, tmp_path / "out", method="quamba2", data=[text], window=4)
    for setting, value in {"mode": "w2a2", "hadamard": ["dt_proj"], "choices": ["w3a8"], "percentile": 2.0}.items():
        with pytest.raises(UserError, match=setting):
            recipe(**{setting: value})
    assert not (tmp_path / "out").exists()


def test_the_windows_depend_on_the_seed_alone() -> None:
    from slimba.data.tokens import ArrayTokens

    ids = np.arange(5000, dtype=np.int32)
    one, again, other = (sample(ArrayTokens(ids), recipe(), seed) for seed in (0, 0, 1))
    assert one.shape == (8, 33) and torch.equal(one, again) and not torch.equal(one, other)
    assert len({int(row[0]) for row in one}) == 8 and (one[:, 1:] - one[:, :-1] == 1).all()


@pytest.mark.parametrize("format", ["int8", "int4", "float16"])
def test_weights_on_a_device_are_those_of_the_file(format: str) -> None:
    weight = np.random.default_rng(0).standard_normal((5, 264)).astype(np.float32)
    matrix = Matrix.quantize(weight, MatrixLayout.plain(5, 264, format))
    np.testing.assert_array_equal(weights_of(matrix).numpy(), matrix.dequantize())
