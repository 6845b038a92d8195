"""The packed directory: round trips, strictness, every kind of damage. Run: pytest tests/checkpoints/test_packed.py"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.packed import read_packed, spec_of, write_packed
from slimba.checkpoints.safetensors_io import dtype_name, read_json, read_tensors, write_tensors
from slimba.errors import UserError
from slimba.formats import MatrixLayout
from slimba.formats.presets import PRESETS
from slimba.models.spec import ModelSpec

Make = Callable[..., Checkpoint]
Facts = Callable[..., Any]
CONV = "backbone.layers.0.mixer.conv1d.weight"
SIGNS = "backbone.layers.1.mixer.in_proj.0.packed"


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip(tmp_path: Path, make: Make, facts: Facts, spec: ModelSpec, preset: str) -> None:
    model = make(spec, preset)
    out = write_packed(model, tmp_path / "model", card="# Made by a test")
    back = read_packed(out)
    assert back.spec == spec
    assert back.layouts == model.layouts
    assert list(back.layouts) == list(spec.matrices())
    assert facts(back.tensors) == facts(model.tensors)
    assert (back.provenance, back.numerics, back.kind, back.path) == (model.provenance, model.numerics, "slimba", out)
    assert back.tokenizer_file is None
    np.testing.assert_array_equal(
        back.matrix("backbone.layers.0.mixer.in_proj").dequantize(),
        model.matrix("backbone.layers.0.mixer.in_proj").dequantize(),
    )


def test_files_that_a_hugging_face_user_knows(
    tmp_path: Path, make: Make, mamba2: ModelSpec, tokenizer_file: Path
) -> None:
    generation = {"temperature": 0.7, "eos_token_id": [0, 3]}
    model = dataclasses.replace(make(mamba2), tokenizer_file=tokenizer_file, generation=generation)
    out = write_packed(model, tmp_path / "model", card="# Made by a test")
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    config = read_json(out / "config.json")
    assert (config["model_type"], config["hidden_size"], config["num_hidden_layers"]) == ("mamba2", 24, 2)
    assert config["quantization_config"]["quant_method"] == "slimba"
    assert config["quantization_config"]["format_version"] == 1
    assert config["quantization_config"]["vectors"] == {"norm": "float16", "conv": "float16", "ssm": "float32"}
    assert read_json(out / "generation_config.json") == {"temperature": 0.7, "bos_token_id": 0, "eos_token_id": [0, 3]}
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: slimba\n")
    assert "- 1-bit\n" in card
    assert card.endswith("# Made by a test\n")
    back = read_packed(out)
    assert back.tokenizer_file == out / "tokenizer.json"
    assert back.generation["temperature"] == 0.7


def test_same_model_same_bytes(tmp_path: Path, make: Make, mamba2: ModelSpec) -> None:
    one, two = (write_packed(make(mamba2), tmp_path / "parent" / n / "model") for n in ("one", "two"))
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name


def test_shards(tmp_path: Path, make: Make, facts: Facts, mamba2: ModelSpec) -> None:
    model = make(mamba2)
    out = write_packed(model, tmp_path / "model", shard_bytes=2000)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert facts(read_packed(out).tensors) == facts(model.tensors)
    shard = sorted(out.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        read_packed(out)


def test_one_tensor_of_another_type(tmp_path: Path, make: Make, facts: Facts, mamba2: ModelSpec) -> None:
    model = make(mamba2)
    tensors = dict(model.tensors)
    tensors[CONV] = tensors[CONV].astype(np.float32)
    out = write_packed(dataclasses.replace(model, tensors=tensors), tmp_path / "model")
    assert read_json(out / "config.json")["quantization_config"]["vectors"][CONV] == "float32"
    assert facts(read_packed(out).tensors) == facts(tensors)


def test_a_model_that_transformers_cannot_express(tmp_path: Path, make: Make, mamba2: ModelSpec) -> None:
    spec = dataclasses.replace(mamba2, norm_before_gate=True, dt_limit=(0.001, 0.1))
    out = write_packed(make(spec), tmp_path / "model")
    assert read_json(out / "config.json")["hidden_size"] == 24
    assert read_packed(out).spec == spec


def test_overwrite(tmp_path: Path, make: Make, mamba2: ModelSpec) -> None:
    out = write_packed(make(mamba2), tmp_path / "model")
    with pytest.raises(UserError, match="exists already"):
        write_packed(make(mamba2, seed=1), out)
    write_packed(read_packed(out), out, overwrite=True)  # reading from what is replaced
    write_packed(make(mamba2, seed=1), out, overwrite=True)
    assert read_packed(out).provenance["seed"] == 1


def test_writer_refuses_a_model_that_is_not_whole(tmp_path: Path, make: Make, mamba2: ModelSpec) -> None:
    model = make(mamba2)

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=match):
            write_packed(dataclasses.replace(model, **changes), tmp_path / "model")
        assert list(tmp_path.iterdir()) == []

    refused(f"{CONV} is missing", tensors={k: v for k, v in model.tensors.items() if k != CONV})
    refused("unknown tensor more", tensors=dict(model.tensors) | {"more": np.zeros(1, np.float32)})
    refused(f"{CONV} is float16", tensors=dict(model.tensors) | {CONV: np.zeros((1, 2), np.float16)})
    refused("type float64", tensors=dict(model.tensors) | {CONV: np.zeros((64, 1, 4))})
    refused("no format is given", layouts={k: v for k, v in model.layouts.items() if "in_proj" not in k})
    wrong = MatrixLayout.plain(3, 24, "float16")
    refused("is for a matrix of", layouts=dict(model.layouts) | {"backbone.embeddings": wrong})
    refused("which the model does not have", layouts=dict(model.layouts) | {"lm_head": wrong})
    two = MatrixLayout.from_json({"cols": 24, "segments": [{"rows": 20, "format": "int8"}] * 2})
    refused("an embedding is one segment", layouts=dict(model.layouts) | {"backbone.embeddings": two})


# ---------------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def packed(tmp_path: Path, make: Make, mamba2: ModelSpec, tokenizer_file: Path) -> Path:
    return write_packed(dataclasses.replace(make(mamba2), tokenizer_file=tokenizer_file), tmp_path / "model")


def edit(packed: Path, change: Callable[[dict[str, Any]], None], *, reseal: bool = True) -> None:
    """Change config.json; `reseal` makes the checksum agree again, to reach the checks behind it."""
    config = json.loads((packed / "config.json").read_text())
    change(config)
    quantization = config.get("quantization_config")
    if reseal and isinstance(quantization, dict) and isinstance(quantization.get("checksums"), dict):
        rest = {k: v for k, v in quantization.items() if k != "checksums"}
        text = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
        quantization["checksums"]["quantization_config"] = f"{zlib.crc32(text):08x}"
    (packed / "config.json").write_text(json.dumps(config))


def edit_tensors(
    packed: Path, change: Callable[[dict[str, np.ndarray]], None], metadata: dict[str, str] | None = None
) -> None:
    """Rewrite the tensors with right checksums."""
    tensors = {n: a.copy() for n, a in read_tensors(packed).tensors.items()}
    change(tensors)
    (packed / "model.safetensors").unlink()
    entries = {n: (dtype_name(a), a.shape) for n, a in tensors.items()}
    write_tensors(packed, entries, tensors.__getitem__, metadata=metadata or {"format": "slimba"}, checksums=True)


CONFIG_EDITS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda c: c.update(hidden_size=25), "hidden_size in config.json is 25"),
    (lambda c: c.update(layer_norm_epsilon=1e-6), "layer_norm_epsilon"),
    (lambda c: c.pop("quantization_config"), "lacks quantization_config"),
    (lambda c: c["quantization_config"].update(quant_method="gptq"), "gptq"),
    (lambda c: c["quantization_config"].update(format_version=2), "format_version is 2"),
    (lambda c: c["quantization_config"].update(more=1), "unknown key 'more'"),
    (lambda c: c["quantization_config"].pop("layers"), "no key 'layers'"),
    (lambda c: c["quantization_config"].update(vectors=[]), "vectors in quantization_config is not"),
    (lambda c: c["quantization_config"]["spec"].update(n_layer=1), "num_hidden_layers"),
    (lambda c: c["quantization_config"]["spec"].update(n_layer="2"), "n_layer .* not of type int"),
    (lambda c: c["quantization_config"]["spec"].update(n_layer=True), "n_layer .* not of type int"),
    (lambda c: c["quantization_config"]["spec"].update(dt_limit=5), "dt_limit"),
    (lambda c: c["quantization_config"]["spec"].update(d_more=5), "unknown key 'd_more'"),
    (lambda c: c["quantization_config"]["spec"].update(headdim=7), "headdim 7"),
    (lambda c: c["quantization_config"]["numerics"].update(activations=8), "numerics"),
    (lambda c: c["quantization_config"]["layers"].update(lm_head={"cols": 1, "segments": []}), "lm_head"),
    (lambda c: c["quantization_config"]["layers"].update({"backbone.embeddings": []}), "not a JSON object"),
    (lambda c: c["quantization_config"]["layers"]["backbone.embeddings"].update(more=1), "unknown key 'more'"),
    (lambda c: c["quantization_config"]["layers"]["backbone.embeddings"].update(cols=float("inf")), "infinity"),
    (lambda c: c["quantization_config"]["layers"].pop("backbone.layers.1.mixer.in_proj"), "no format is given"),
    (lambda c: c["quantization_config"]["vectors"].update(ssm="float16"), "A_log has type float32"),
    (lambda c: c["quantization_config"]["vectors"].update(ssm="int8"), "vectors"),
    (lambda c: c["quantization_config"]["vectors"].update(other="float16"), "names 'other'"),
    (lambda c: c["quantization_config"]["vectors"].pop("ssm"), "gives no type"),
]


@pytest.mark.parametrize(("change", "message"), CONFIG_EDITS)
def test_config_that_disagrees(packed: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    from slimba.checkpoints.reader import open_checkpoint

    edit(packed, change)
    with pytest.raises(UserError, match=message):
        open_checkpoint(packed)


def test_config_with_more_layers_than_tensors(packed: Path) -> None:
    def change(c: dict[str, Any]) -> None:
        c["quantization_config"]["spec"]["n_layer"] = c["num_hidden_layers"] = 10**12

    edit(packed, change)
    with pytest.raises(UserError, match="1000000000000 layers"):
        read_packed(packed)


def test_edited_config_needs_no_verify(packed: Path) -> None:
    def change(c: dict[str, Any]) -> None:
        c["quantization_config"]["provenance"]["seed"] = 7

    edit(packed, change, reseal=False)
    with pytest.raises(UserError, match="does not agree with its checksum"):
        read_packed(packed)
    assert read_packed(packed, verify=False).provenance["seed"] == 7


TENSOR_EDITS: list[tuple[Callable[[dict[str, np.ndarray]], Any], str]] = [
    (lambda t: t.pop(SIGNS), f"{SIGNS} is missing"),
    (lambda t: t.update(extra=np.zeros(1, np.float32)), "unknown tensor extra"),
    (lambda t: t.update({SIGNS: t[SIGNS][1:]}), rf"{SIGNS} has shape \[111, 8\]"),
    (lambda t: t.update({SIGNS: t[SIGNS].view(np.int8)}), f"{SIGNS} has type int8"),
    (lambda t: t[CONV].fill(np.nan), f"{CONV} holds NaN"),
    (lambda t: t["backbone.embeddings.0.scale"].fill(np.inf), "embeddings.0.scale holds NaN"),
    (lambda t: t["backbone.layers.0.mixer.in_proj.lowrank_a_scale"].fill(np.nan), "lowrank_a_scale holds NaN"),
]


@pytest.mark.parametrize(("change", "message"), TENSOR_EDITS)
@pytest.mark.parametrize("verify", [True, False])
def test_tensors_that_disagree(
    packed: Path, change: Callable[[dict[str, np.ndarray]], Any], message: str, verify: bool
) -> None:
    edit_tensors(packed, change)
    with pytest.raises(UserError, match=message):
        read_packed(packed, verify=verify)


def test_tensors_of_somebody_else(packed: Path) -> None:
    edit_tensors(packed, lambda t: None, metadata={"format": "pt"})
    with pytest.raises(UserError, match="is not Slimba's"):
        read_packed(packed)


def test_truncated(packed: Path) -> None:
    path = packed / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"model\.safetensors"):
            read_packed(packed)


def test_bit_flip_in_data_names_the_tensor(packed: Path) -> None:
    path = packed / "model.safetensors"
    whole = path.read_bytes()
    at = whole.index(read_tensors(packed).tensors[SIGNS].tobytes()) + 5
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
    with pytest.raises(UserError, match=f"{SIGNS} does not agree with its checksum"):
        read_packed(packed)
    assert read_packed(packed, verify=False).spec.n_layer == 2


def test_tokenizer(packed: Path, tokenizer_file: Path) -> None:
    own = packed / "tokenizer.json"
    own.write_text(own.read_text().replace('"a"', '"A"'))
    with pytest.raises(UserError, match=r"tokenizer\.json does not agree"):
        read_packed(packed)
    assert read_packed(packed, tokenizer=tokenizer_file).tokenizer_file == tokenizer_file
    own.unlink()
    assert read_packed(packed).tokenizer_file is None


def test_spec_of_refuses_other_configs() -> None:
    with pytest.raises(UserError, match="no quantization_config of Slimba"):
        spec_of({"model_type": "mamba2"})
