"""The published binary field and its rivals on small states.

Run: `pytest tests/benchmarks/test_state_field.py`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from state_field import CASES, CELLS, Feedback, Field, Stochastic, run_case

from helpers.tiny import TEXT, tiny_checkpoint, tiny_directory
from slimba.models.lm import SSMForCausalLM, load_weights
from slimba.runtime.backends.reference import round_int8

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "baselines" / "state_field.py"


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(field: Field | Feedback, s: torch.Tensor) -> float:
    return float((field(s) - s).norm() / s.norm())


def test_a_field_counts_thresholds_by_hand() -> None:
    field = Field()
    s = states(2, 3, 16)
    mean, sigma = s.mean(-1, keepdim=True), s.std(-1, keepdim=True)
    x = ((s - mean + 3 * sigma) / (6 * sigma)).clamp(0, 1)
    count = (field.banks[0] < x[..., None]).sum(-1)
    torch.testing.assert_close(field(s), count / CELLS * 6 * sigma + mean - 3 * sigma)
    assert field.chunk == 1 and not torch.equal(field(s), field(s)), "another chunk, another bank"


def test_random_thresholds_are_the_error() -> None:
    """Some 7 % of a Gaussian's norm at 529 random cells; even ones have the clip at 3 sigma and little else."""
    s = states(200, 128)
    assert 0.04 < error(Field(), s) < 0.12
    assert error(Field(spread="even"), s) < 0.02


def test_sigma_delta_carries_the_remainder_over() -> None:
    """On a constant state the mean of what is stored comes near it: the loop is a first-order sigma-delta."""
    s = states(4, 128)
    field = Field(sigma_delta=True)
    stored = torch.stack([field(s) for _ in range(200)]).mean(0)
    plain = Field()
    without = torch.stack([plain(s) for _ in range(200)]).mean(0)
    inside = ((s - s.mean(-1, keepdim=True)).abs() < 2.5 * s.std(-1, keepdim=True)).float()
    near = ((stored - s) * inside).norm()
    assert near < 0.05 * ((field(s) - s) * inside).norm() + 0.02 * s.norm()
    assert near < ((without - s) * inside).norm()


def test_feedback_loses_nothing_over_time() -> None:
    s = states(4, 128)
    feedback = Feedback()
    stored = torch.stack([feedback(s) for _ in range(100)]).mean(0)
    once = (Feedback()(s) - s).norm()
    assert (stored - s).norm() < 0.05 * once


def test_small_updates_survive_feedback_and_chance_but_not_rounding_to_nearest() -> None:
    """A state that grows by a twentieth of a step a token: nearest stands still, the others follow."""
    ends = {}
    for name, rounding in (("nearest", round_int8), ("feedback", Feedback()), ("stochastic", Stochastic())):
        s = torch.zeros(1000, 2)
        s[:, 0] = 127.0  # holds the step at 1
        for _ in range(100):
            s[:, 1] += 0.05
            s = rounding(s)
        ends[name] = s[:, 1].mean().item()
    assert ends["nearest"] == 0
    assert ends["feedback"] == pytest.approx(5, abs=0.6) and ends["stochastic"] == pytest.approx(5, abs=0.3)


@pytest.mark.parametrize("name", CASES)
def test_cases_run_and_the_exact_one_is_the_network(name: str) -> None:
    checkpoint = tiny_checkpoint(preset="float32")
    network = SSMForCausalLM(checkpoint.spec).requires_grad_(False)
    load_weights(network, checkpoint)
    ids = torch.arange(150).remainder(300).view(1, -1)
    piece, make, bits = CASES[name]
    features, state_error = run_case(network, ids, piece, make)
    whole = network.features(ids[:, :-1])[0]
    relative = float((features - whole).norm() / whole.norm())
    assert features.shape == whole.shape and bits(128) > 0
    if name == "float32":
        assert relative < 1e-5 and state_error == 0
    else:
        assert 1e-6 < relative < 0.5 and 0 < state_error < 0.5
    torch.testing.assert_close(features[:, :1], whole[:, :1])


def test_the_script_writes_every_case(tmp_path: Path) -> None:
    teacher = tiny_directory(tmp_path / "teacher", preset="float32")
    text, out = tmp_path / "t.txt", tmp_path / "out.json"
    text.write_text(TEXT * 5)
    command = [sys.executable, str(SCRIPT), "--teacher", str(teacher), "--text", str(text), "--length", "130"]
    command += ["--sequences", "2", "--cases", "int8,field", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert [r["case"] for r in record["rows"]] == ["float32", "int8", "field"]
    done = subprocess.run(
        [*command[:-4], "--cases", "int8,bfloat16", "--out", str(out)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    again = json.loads(out.read_text())["rows"]
    assert again[:3] == record["rows"] and again[3]["case"] == "bfloat16" and len(again) == 4
    assert record["rows"][1]["feature_error"] < record["rows"][2]["feature_error"]
