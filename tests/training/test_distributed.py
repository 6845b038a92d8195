"""Several processes train as one: two on this CPU (gloo), started by torchrun as a user starts them.

Run: `pytest tests/training/test_distributed.py`. The processes compute with one thread each.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.tiny import TEXT, tiny_directory
from slimba.checkpoints.packed import read_packed
from slimba.cli.main import main
from slimba.errors import UserError
from slimba.methods.dfssm import run as dfssm_run
from slimba.training import distributed
from slimba.training import pretrain as pretrain_run

# Several `slimba` commands in turn, at the tests' own pace: a checkpoint and a log row every step.
COMMANDS = """
import functools, json, sys, torch
torch.set_num_threads(1)
import slimba.methods.dfssm.run as dfssm, slimba.training.pretrain as pretrain, slimba.training.sharding as sharding
sharding.SMALL = 0  # the tests' parameters are split too
for module in (dfssm, pretrain):
    module.LoopSettings = functools.partial(module.LoopSettings, save_every_s=0.0, log_every=1)
from slimba.cli.main import main
for line in json.loads(sys.argv[1]):
    if code := main(line):
        sys.exit(code)
"""
STEPS = 50  # of the run that is killed
QUICK = ["--set", "window=16", "--set", "batch=4", "--set", "calibration_windows=4", "--set", "rank=2"]
QUICK += ["--set", "hidden_weight=10"]
SIZES = ["--set", "d_model=32", "--set", "n_layer=2", "--set", "headdim=16", "--set", "d_state=8"]


def start(here: Path, lines: list[list[str]]) -> subprocess.Popen[str]:
    """The commands in two processes, under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [sys.executable, *torchrun, "commands.py", json.dumps(lines)],
        cwd=here,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def compress(out: str, steps: int, *more: str) -> list[str]:
    tokens = str(steps * 4 * 16)
    return ["compress", "teacher", out, "--data", "text.txt", "--tokens", tokens, "--device", "cpu", *QUICK, *more]


def pretrain(out: str) -> list[str]:
    line = ["pretrain", out, "--data", "text.txt", "--tokenizer", "teacher/tokenizer.json", *SIZES]
    line += ["--set", "window=16", "--set", "batch=4", "--set", "dtype=float32"]
    return [*line, "--tokens", str(12 * 64), "--device", "cpu"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one process and what two made of the same commands, and a run of two, one of them killed."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_directory(folder / "teacher")
    (folder / "text.txt").write_text(TEXT * 20, "utf-8")
    (folder / "commands.py").write_text(COMMANDS)
    with pytest.MonkeyPatch.context() as here:  # one process: this one
        here.chdir(folder)
        for module in (dfssm_run, pretrain_run):
            here.setattr(module, "LoopSettings", functools.partial(module.LoopSettings, log_every=1))
        assert main(compress("one", 12)) == 0
        assert main(pretrain("p1")) == 0
    two = [compress("two", 12, "--json", "two.json"), pretrain("p2"), compress("whole", STEPS)]
    with start(folder, [*two, compress("killed", STEPS)]) as torchrun:
        log = folder / "killed.work" / "log.jsonl"
        deadline = time.monotonic() + 100
        while not log.exists() or len(log.read_text().splitlines()) < 20:
            assert torchrun.poll() is None and time.monotonic() < deadline, torchrun.communicate(timeout=60)
            time.sleep(0.005)
        workers = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        out, err = torchrun.communicate(timeout=60)
    assert torchrun.returncode != 0
    (folder / "said.txt").write_text(out)
    (folder / "complained.txt").write_text(err)
    return folder


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(row) for row in (out / "training.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------ the functions, alone


def test_alone_every_function_does_nothing() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, 2.0, 3.0])
    distributed.mean_gradients([p])
    assert p.grad.tolist() == [1, 2, 3]
    assert distributed.first() and distributed.share(5) == 5
    assert distributed.from_first(lambda: "here") == "here"
    with distributed.group(torch.device("cpu")) as where:
        assert where == torch.device("cpu")


def test_buckets_hold_neighbours_of_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "BUCKET_ELEMENTS", 10)
    sizes = [4, 6, 1, 50, 2]
    gradients = [torch.zeros(n) for n in sizes] + [torch.zeros(3, dtype=torch.bfloat16)]
    assert [[g.numel() for g in b] for b in distributed.buckets(gradients)] == [[4, 6], [1], [50], [2], [3]]


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 3)
    with pytest.raises(UserError, match="set batch to a multiple of 3"):
        distributed.share(4)


# ------------------------------------------------------------------ two processes


def test_two_processes_compress_as_one(here: Path) -> None:
    """Float sums in another order, so close and not equal; the signs agree."""
    assert (here / "said.txt").read_text().count("slimba inspect two") == 1, "one process speaks"
    assert json.loads((here / "two.json").read_text())["device"] == "2 x cpu"
    assert not (here / "two.work").exists()
    one, two = log_of(here / "one"), log_of(here / "two")
    assert [row["step"] for row in two] == list(range(1, 13)), "one process logs"
    for key in ("loss", "kl", "hidden", "grad_norm"):
        pairs = [(r[key], q[key]) for r, q in zip(one, two, strict=True) if key in r]
        np.testing.assert_allclose(*np.transpose(pairs), rtol=1e-4, atol=2e-6, err_msg=key)
    a, b = read_packed(here / "one"), read_packed(here / "two")
    assert a.tensors.keys() == b.tensors.keys()
    for name, ours in a.tensors.items():
        x, y = np.asarray(ours), np.asarray(b.tensors[name])
        if x.dtype.kind == "f":  # 1e-3 is one step of float16
            np.testing.assert_allclose(x.astype(float), y.astype(float), rtol=1e-3, atol=1e-5, err_msg=name)
        elif name.endswith("packed") and "layers" in name:
            assert np.array_equal(x, y), name


def test_two_processes_pretrain_as_one(here: Path) -> None:
    a, b = read_packed(here / "p1"), read_packed(here / "p2")
    for name, ours in a.tensors.items():
        np.testing.assert_allclose(np.asarray(ours), np.asarray(b.tensors[name]), rtol=0, atol=1e-5, err_msg=name)


def test_two_processes_of_which_one_is_killed_resume_to_the_same_file(here: Path) -> None:
    err = (here / "complained.txt").read_text()
    assert "SIGKILL" in err, "torchrun has seen it and ended the other"
    assert "defect" not in err
    assert not (here / "killed").exists()
    assert list((here / "killed.work").glob("checkpoint-*/.metadata")), "a complete checkpoint"
    before = (here / "killed.work" / "log.jsonl").read_text().splitlines()
    assert 20 <= len(before) < STEPS

    odd = compress("odd", 4, "--set", "batch=3")
    with start(here, [compress("killed", STEPS, "--resume"), odd]) as torchrun:
        _, err = torchrun.communicate(timeout=100)
    assert log_of(here / "killed")[-1]["step"] == STEPS
    assert log_of(here / "killed")[0] == json.loads(before[0]), "continued, not begun anew"
    whole, killed = (here / n / "model.safetensors" for n in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()

    # and the second command, an error in both processes
    assert torchrun.returncode != 0
    assert "a batch of 3 windows cannot be shared by 2 processes; set batch to a multiple of 2" in err
    assert "error: process 1: " in err
    assert not (here / "odd").exists() and not (here / "odd.work").exists()
