"""The description of packed files in the words of compressed-tensors, and their tensors under its names.

Run: `pytest tests/checkpoints/test_compressed_tensors.py`. The last tests ask the library, where it is
installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from runtime.numpy_reference import mamba1_spec, mamba2_spec, random_matrix
from slimba.checkpoints.compressed_tensors import covers, metadata, standard_tensors
from slimba.checkpoints.packed import read_packed, write_packed
from slimba.errors import UserError
from slimba.formats import LowRank, MatrixLayout, Segment
from slimba.formats.hadamard import hadamard
from slimba.formats.presets import preset_layouts, preset_numerics
from slimba.runtime.measure import random_model


@pytest.mark.parametrize(("preset", "bits", "inputs"), [("w8a8", 8, "token"), ("w4a8", 4, "token"), ("w4a16", 4, None)])
def test_modes_of_quamba2_are_groups_of_the_standard(preset: str, bits: int, inputs: str | None) -> None:
    spec = mamba2_spec(d_model=128, d_inner=256, headdim=64, d_state=64)
    said = metadata(preset_layouts(spec, preset), preset_numerics(preset))
    assert said is not None and said["ignore"] == ["backbone.embeddings"]
    (group,) = said["config_groups"].values()
    assert len(group["targets"]) == 2 * spec.n_layer
    assert group["weights"]["num_bits"] == bits and group["weights"]["strategy"] == (
        "group" if bits == 4 else "channel"
    )
    given = group["input_activations"]
    assert (given and given["strategy"]) == inputs and (not given or given["dynamic"])
    turns = said["transform_config"]["config_groups"]
    assert {v["head_dim"] for v in turns.values()} == {128, 256}


def test_what_the_standard_has_no_words_for_is_ignored() -> None:
    layouts = preset_layouts(mamba2_spec(), "dfssm")
    assert metadata(layouts, {}) is None
    mixed = {
        "a": MatrixLayout(64, (Segment(4, "int8"),), input_scale=True),
        "b": MatrixLayout(64, (Segment(4, "int8"), Segment(4, "sign"))),
        "c": MatrixLayout(64, (Segment(4, "int4"),), LowRank(2, 0, 4)),
        "d": MatrixLayout(63, (Segment(4, "int4"),)),
        "e": MatrixLayout(64, (Segment(4, "int4"),), activations="float32"),
    }
    said = metadata(mixed, {"activations": "int8"})
    assert said is not None and said["ignore"] == ["b", "c", "d"] and said["format"] == "mixed-precision"
    static, floating = (g["input_activations"] for g in said["config_groups"].values())
    assert static == {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    assert floating is None


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_tensors_of_the_standard_are_the_same_matrix(format: str) -> None:
    """Unpacked as the standard lays down, by hand."""
    layout = MatrixLayout(256, (Segment(9, format),), hadamard=256, input_scale=True)
    matrix = random_matrix(np.random.default_rng(0), layout)
    assert covers("m", layout)
    out = standard_tensors(matrix, "m")
    scale = out["m.weight_scale"].astype(np.float32)
    if format == "int4":
        words = out["m.weight_packed"]
        assert words.dtype == np.int32 and words.shape == (9, 32) and out["m.weight_shape"].tolist() == [9, 256]
        codes = np.stack([(words >> 4 * i) & 15 for i in range(8)], axis=2).reshape(9, 256) - 8
        w = codes * scale.repeat(128, axis=1)
    else:
        w = out["m.weight"] * scale
    np.testing.assert_allclose(hadamard(w.astype(np.float32), 256), matrix.dequantize(), rtol=0, atol=1e-6)
    assert out["m.input_scale"].shape == (1,)
    with pytest.raises(UserError, match="no words for"):
        standard_tensors(random_matrix(np.random.default_rng(0), MatrixLayout(8, (Segment(2, "sign"),))), "s")


def test_the_description_is_in_the_file_and_must_agree_with_it(tmp_path: Path) -> None:
    checkpoint = random_model(mamba1_spec(d_model=64, d_inner=128), "w4a8")
    write_packed(checkpoint, tmp_path / "m")
    read_packed(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    said = config["quantization_config"]["compressed_tensors"]
    assert said["format"] == "mixed-precision"  # a Mamba-1's x_proj and dt_proj are int8
    said["config_groups"]["group_0"]["weights"]["num_bits"] = 3
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="compressed_tensors in quantization_config does not describe"):
        read_packed(tmp_path / "m", verify=False)
    del config["quantization_config"]["compressed_tensors"]  # as files written before have none
    file.write_text(json.dumps(config))
    read_packed(tmp_path / "m", verify=False)


@pytest.fixture
def library() -> ModuleType:
    return pytest.importorskip(
        "compressed_tensors", reason="the library compressed-tensors is not installed: pip install compressed-tensors"
    )


@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w4a16"])
def test_the_library_reads_the_description(preset: str, library: ModuleType) -> None:
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.transform import TransformConfig

    spec = mamba2_spec(d_model=128, d_inner=256, headdim=64, d_state=64)
    said = metadata(preset_layouts(spec, preset), preset_numerics(preset))
    assert said is not None
    turns = TransformConfig.model_validate(said.pop("transform_config"))
    assert sorted(t.head_dim or 0 for t in turns.config_groups.values()) == [128, 256]
    assert [str(a.location) for t in turns.config_groups.values() for a in t.apply] == ["input", "weight_input"] * 2
    config = QuantizationConfig.model_validate(said)
    (group,) = config.config_groups.values()
    assert config.format == ("int-quantized" if preset == "w8a8" else "pack-quantized")
    assert group.weights.num_bits == (8 if preset == "w8a8" else 4) and len(group.targets) == 2 * spec.n_layer
    entering = group.input_activations
    assert (entering is None) == (preset == "w4a16")
    assert entering is None or (entering.dynamic is True and str(entering.strategy) == "token")
    wrong = json.loads(json.dumps(said).replace('"symmetric"', '"symetric"'))
    with pytest.raises(ValueError, match="symetric"):  # it does look at the words
        QuantizationConfig.model_validate(wrong)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_the_library_unpacks_the_same_matrix(format: str, library: ModuleType) -> None:
    """Codes, scales and transform of a matrix by the library's functions."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix

    layout = MatrixLayout(256, (Segment(9, format),), hadamard=128)
    matrix = random_matrix(np.random.default_rng(0), layout)
    said = metadata({"m": layout}, {"activations": "int8"})
    assert said is not None
    turn = said.pop("transform_config")["config_groups"]["hadamard_128"]
    weights = QuantizationConfig.model_validate(said).config_groups["group_0"].weights
    given = {k: torch.from_numpy(v.copy()) for k, v in standard_tensors(matrix, "m").items()}
    if format == "int4":
        codes = unpack_from_int32(given["m.weight_packed"], 4, torch.Size(given["m.weight_shape"].tolist()))
    else:
        codes = given["m.weight"]
    stored = dequantize(codes, given["m.weight_scale"].float(), args=weights).numpy()
    turned = deterministic_hadamard_matrix(turn["head_dim"]).float().numpy() / np.sqrt(np.float32(turn["head_dim"]))
    whole = (stored.reshape(9, 2, 128) @ turned).reshape(9, 256)
    np.testing.assert_allclose(whole, matrix.dequantize(), rtol=0, atol=1e-5)
