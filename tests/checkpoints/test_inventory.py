"""Bytes by component, exact file sizes, and the verb. Run: pytest tests/checkpoints/test_inventory.py"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.inventory import inventory_of, inventory_of_shape, layer_groups
from slimba.checkpoints.mamba_ssm import write_mamba_ssm
from slimba.checkpoints.packed import write_packed
from slimba.checkpoints.reader import open_checkpoint
from slimba.cli.inspect import inspect
from slimba.errors import UserError
from slimba.formats import MatrixLayout
from slimba.formats.presets import PRESETS
from slimba.models.configs import named_spec
from slimba.models.spec import ModelSpec

Make = Callable[..., Checkpoint]


def test_the_published_layout_at_1_3b() -> None:
    """Each item of the honest count of the published design, and the file under the target."""
    inventory = inventory_of_shape(named_spec("mamba2-1.3b"), "dfssm-published")
    scaffold, row_scales, lora, lora_scales = 154_927_104, 1_013_760, 12_828_672, 1_016_832
    assert inventory.bytes["in_proj"] + inventory.bytes["out_proj"] == scaffold
    assert inventory.bytes["scales"] == row_scales
    assert inventory.bytes["low-rank"] == lora + lora_scales
    assert inventory.bytes["conv"] == 2_088_960
    assert inventory.bytes["ssm"] == 36_864
    assert inventory.bytes["norms"] == 593_920
    assert inventory.bytes["embedding"] == 102_989_824 + 100_576
    assert inventory.file_bytes - inventory.bytes["header"] == 275_596_512
    assert inventory.file_bytes <= 276_000_000
    assert inventory.projection_bytes == scaffold + row_scales + lora + lora_scales


def test_the_default_recipe_at_1_3b() -> None:
    inventory = inventory_of_shape(named_spec("mamba2-1.3b"), "dfssm")
    assert 253_500_000 < inventory.file_bytes < 254_500_000
    assert inventory.bits_per_projection_weight < 1.28


@pytest.mark.parametrize("preset", PRESETS)
def test_a_shape_predicts_the_file(tmp_path: Path, make: Make, spec: ModelSpec, preset: str) -> None:
    out = write_packed(make(spec, preset, rank=2), tmp_path / "model")
    predicted = inventory_of_shape(spec, preset, rank=2)
    assert predicted.file_bytes == (out / "model.safetensors").stat().st_size
    assert inventory_of(open_checkpoint(out)) == predicted == inventory_of(make(spec, preset, rank=2))


def test_bits_per_projection_weight_counts_everything(make: Make, mamba2: ModelSpec) -> None:
    model = make(mamba2, "dfssm", rank=2)
    size = weights = 0
    for name, (rows, cols) in mamba2.matrices().items():
        if "layers" in name:
            size += sum(a.nbytes for n, a in model.tensors.items() if n.startswith(name + "."))
            weights += rows * cols
    assert inventory_of(model).bits_per_projection_weight == 8 * size / weights


def test_column_scales_and_biases_are_counted(make: Make, mamba2: ModelSpec) -> None:
    spec = dataclasses.replace(mamba2, proj_bias=True, tie_embeddings=False)
    model = make(spec, "dfssm")
    before, name = inventory_of(model), "backbone.layers.0.mixer.out_proj"
    layouts = dict(model.layouts) | {name: dataclasses.replace(model.layouts[name], col_scale=True)}
    tensors = dict(model.tensors) | {f"{name}.col_scale": np.ones(48, np.float16)}
    after = inventory_of(dataclasses.replace(model, layouts=layouts, tensors=tensors))
    assert after.bytes["scales"] - before.bytes["scales"] == after.projection_bytes - before.projection_bytes == 96
    assert after.bytes["biases"] == 2 * 2 * (spec.layer_matrices()["in_proj"][0] + 24)
    assert after.bytes["head"] == after.bytes["embedding"]


def test_layer_groups(make: Make, mamba2: ModelSpec) -> None:
    spec = dataclasses.replace(mamba2, n_layer=4)
    layouts = make(spec, "dfssm").layouts
    formats = {"in_proj": "sign:112 int8:3 +r2 +plane:64x8", "out_proj": "sign +r2 +plane:24x16"}
    assert layer_groups(spec, layouts) == [{"first": 0, "last": 3, "formats": formats}]
    layouts["backbone.layers.2.mixer.out_proj"] = MatrixLayout.plain(24, 48, "int8")
    other = {"in_proj": formats["in_proj"], "out_proj": "int8"}
    assert [(g["first"], g["last"], g["formats"]) for g in layer_groups(spec, layouts)] == [
        (0, 1, formats),
        (2, 2, other),
        (3, 3, formats),
    ]


# ---------------------------------------------------------------------------------------------------------- the verb


def test_inspect_model(
    tmp_path: Path, make: Make, mamba2: ModelSpec, tokenizer_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = dataclasses.replace(make(mamba2), tokenizer_file=tokenizer_file)
    out = write_packed(model, tmp_path / "model")
    inspect(str(out), json_file=tmp_path / "record.json")
    printed = capsys.readouterr().out
    assert f"checksums: {len(model.tensors)} of {len(model.tensors)} agree" in printed
    assert "layers 0-1: in_proj sign:112 int8:3 +r2 +plane:64x8, out_proj sign +r2 +plane:24x16" in printed
    assert "method: dfssm" in printed
    assert "does not start with id 0" in printed
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["file_bytes"] == (out / "model.safetensors").stat().st_size == sum(record["bytes"].values())
    assert record["checksums_agree"] == len(model.tensors)
    inspect(str(out), no_verify=True)
    assert "checksums: not checked" in capsys.readouterr().out
    path = out / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00" if path.read_bytes()[-1] else path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="does not agree with its checksum"):
        inspect(str(out))


def test_inspect_other_layouts(
    tmp_path: Path, make: Make, mamba1: ModelSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    out = write_mamba_ssm(make(mamba1, "bfloat16"), tmp_path / "model")
    inspect(str(out))
    printed = capsys.readouterr().out
    assert "checksums: this layout has none" in printed
    assert "tokenizer: none (--tokenizer PATH gives one)" in printed
    assert "bits per projection weight, all parts counted: 16.0000" in printed
    assert f"{(out / 'model.safetensors').stat().st_size:,} bytes" in printed


def test_inspect_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(shape="mamba2-1.3b", format="dfssm-published", json_file=tmp_path / "record.json")
    assert "layers 0-47: in_proj sign +r16, out_proj sign +r16" in capsys.readouterr().out
    assert json.loads((tmp_path / "record.json").read_text())["file_bytes"] <= 276_000_000


def test_inspect_shape_in_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(shape="mamba2-1.3b", json_file=tmp_path / "record.json")
    formats = json.loads((tmp_path / "record.json").read_text())["formats"]
    assert formats["dfssm"]["file_bytes"] < formats["dfssm-published"]["file_bytes"] <= 276_000_000
    assert f"{formats['dfssm']['file_bytes']:,}" in capsys.readouterr().out


def test_inspect_bad_arguments() -> None:
    for arguments, message in (
        ({}, "either a MODEL or --shape"),
        ({"model": "x", "shape": "mamba2-1.3b"}, "either a MODEL or --shape"),
        ({"model": "x", "format": "int8"}, "go with --shape"),
        ({"shape": "mamba9", "format": "int8"}, "mamba9"),
        ({"shape": "mamba2-1.3b", "format": "q4"}, "unknown format 'q4'"),
        ({"shape": "mamba2-1.3b", "format": "dfssm", "rank": -1}, "rank is -1"),
    ):
        with pytest.raises(UserError, match=message):
            inspect(**arguments)  # type: ignore[arg-type]
