"""Post-training baselines on a tiny model: bytes as counted, inputs of the quantised prefix, rows that survive a kill.

Run: `pytest tests/benchmarks/test_ptq.py`.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ptq import ARMS, describe, inputs_of_matrices, measured, quantise
from rows import Rows, read_rows

from helpers.tiny import TEXT, tiny_checkpoint, tiny_directory
from slimba.errors import UserError
from slimba.evaluation.perplexity import TextIds
from slimba.models.lm import SSMForCausalLM, load_weights

CPU = torch.device("cpu")
WINDOWS = torch.from_numpy(np.random.default_rng(0).integers(0, 300, (10, 24)))
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "baselines" / "ptq.py"


@pytest.mark.parametrize("name", ARMS)
def test_arms(name: str, tmp_path: Path) -> None:
    teacher = tiny_checkpoint(preset="float32")
    made = quantise(teacher, ARMS[name], WINDOWS, CPU)
    row = describe(name, made, 10)
    ids = np.random.default_rng(1).integers(0, 300, 1100).astype(np.int32)
    text = TextIds(ids, np.ones(304, np.int64), "random")
    got = measured(made, name, {"t": text}, CPU, tmp_path, row["simulated"])
    assert got["t"]["perplexity"] > 1
    if not row["simulated"]:
        assert (tmp_path / name / "model.safetensors").stat().st_size == row["file_bytes"]
    bits = {"8": 8, "4": 4, "3": 3, "2": 2}[name.removesuffix("-half")[-1]]
    # a group of 128 is longer than these rows: 16 bits of scale for 32 or 64 weights
    assert bits + 16 / 64 <= row["bits_per_projection_weight"] <= bits + 16 / 32


def test_calibration_sees_the_quantised_prefix() -> None:
    teacher = tiny_checkpoint(preset="float32")
    network = SSMForCausalLM(teacher.spec)
    load_weights(network, teacher)
    network.requires_grad_(False)
    seen = {}
    for name, hessian in inputs_of_matrices(network, WINDOWS):
        seen[name] = hessian
        network.get_parameter(name + ".weight").mul_(0.5)  # what a very coarse quantiser might do
    expected: dict[str, torch.Tensor] = {}

    def keep(name: str):
        return lambda _m, x: expected.__setitem__(name, x[0].flatten(0, 1).T @ x[0].flatten(0, 1))

    for name, module in network.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(keep(name))
    network.features(WINDOWS)
    assert seen.keys() == expected.keys()
    for name in seen:
        torch.testing.assert_close(seen[name], expected[name], rtol=1e-3, atol=1e-3)


def test_more_bits_are_nearer() -> None:
    teacher = tiny_checkpoint(preset="float32")
    name = "backbone.layers.1.mixer.out_proj"
    w = teacher.matrix(name).dequantize()
    error = {}
    for arm in ("rtn-int8", "rtn-int4", "rtn-int3"):
        error[arm] = np.square(quantise(teacher, ARMS[arm], None, CPU).matrix(name).dequantize() - w).mean()
    assert error["rtn-int8"] < error["rtn-int4"] < error["rtn-int3"]


def test_rows_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Rows(path).add({"arm": "a", "lr": 0.1})
    with open(path, "a") as f:
        f.write('{"arm": "b", "lr"')
    rows = Rows(path)
    assert rows.find(arm="a", lr=0.1) and not rows.find(arm="b") and not rows.find(arm="a", lr=0.2)
    rows.add({"arm": "b"})
    assert [r["arm"] for r in read_rows(path)] == ["a", "b"]
    other = Rows(tmp_path / "other.jsonl", [path, tmp_path / "other.jsonl"])
    assert len(other.find(arm="a")) == 1
    rows.add({"arm": "c"})
    assert other.find(arm="c"), "what another process wrote since"
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(UserError, match="line 1"):
        read_rows(path)


def test_the_script_skips_what_is_there(tmp_path: Path) -> None:
    teacher = tiny_directory(tmp_path / "teacher", preset="float32")
    text, ids = tmp_path / "t.txt", tmp_path / "ids.npy"
    text.write_text(TEXT * 20)
    np.save(ids, np.random.default_rng(0).integers(0, 300, 3000).astype(np.uint16))
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(SCRIPT), "--teacher", str(teacher), "--ids", str(ids), "--valid", str(text)]
    command += ["--test", str(text), "--out", str(out), "--windows", "2", "--device", "cpu", "--arms"]
    for arms in ("rtn-int4", "rtn-int4,rtn-int8"):
        done = subprocess.run([*command, arms], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["arm"] for r in rows] == ["rtn-int4", "rtn-int8"]
    assert rows[0]["test"]["tokens"] % 1024 == 0 and rows[0]["test"]["bits_per_byte"] > 0
