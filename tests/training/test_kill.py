"""Kills at random moments: start, tokenising, steps, checkpoints. Resumed until done, the file is that of a calm run.

Slow. Run: `pytest -m slow tests/training/test_kill.py`; a failure prints the seed of its moments (SLIMBA_KILL_SEED).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.tiny import TEXT, tiny_directory

# a checkpoint every step, small chunks of text; argv is the command line of slimba
COMMAND = """
import functools, sys, torch
torch.set_num_threads(1)
import slimba.methods.dfssm.run as dfssm, slimba.training.pretrain as pretrain, slimba.data.tokens as tokens
tokens.BATCH_CHARACTERS = 2000
for module in (dfssm, pretrain):
    module.LoopSettings = functools.partial(module.LoopSettings, save_every_s=0.0, log_every=1)
from slimba.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
SHAPE = ["d_model=32", "n_layer=2", "headdim=16", "d_state=8", "window=16", "batch=4", "dtype=float32"]
PRETRAIN = ["pretrain", "{out}", "--data", "text.txt", "--tokenizer", "teacher/tokenizer.json"]
COMPRESS = ["compress", "teacher", "{out}", "--data", "text.txt"]
QUICK = ["window=16", "batch=4", "calibration_windows=4", "rank=2"]
KILLS = 6


def line_of(verb: str, out: str) -> list[str]:
    line, settings = (PRETRAIN, SHAPE) if verb == "pretrain" else (COMPRESS, QUICK)
    end = ["--tokens", str(150 * 64), "--device", "cpu"]
    return [a.format(out=out) for a in line] + [f"--set={s}" for s in settings] + end


def start(here: Path, line: list[str], cache: str) -> subprocess.Popen[bytes]:
    """The command, with a token cache of its own."""
    more = {"OMP_NUM_THREADS": "1", "SLIMBA_CACHE_DIR": str(here / cache)}
    return subprocess.Popen([sys.executable, "-c", COMMAND, *line], cwd=here, env=os.environ | more)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["pretrain", "compress"])
def test_kills_at_random_moments_change_nothing(tmp_path: Path, verb: str) -> None:
    seed = int(os.environ.get("SLIMBA_KILL_SEED", time.time_ns() % 10**6))
    print("SLIMBA_KILL_SEED", seed)
    moments = random.Random(seed)
    tiny_directory(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i} {TEXT}" for i in range(60)), "utf-8")
    begin = time.monotonic()
    assert start(tmp_path, line_of(verb, "calm"), "calm-cache").wait(timeout=300) == 0
    whole = time.monotonic() - begin
    killed = 0
    while not (tmp_path / "killed").exists():
        process = start(tmp_path, [*line_of(verb, "killed"), "--resume"], "cache")
        try:
            code = process.wait(timeout=moments.uniform(0.3, 0.9) * whole if killed < KILLS else 300)
            assert code == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    assert killed >= 1
    a, b = (tmp_path / name / "model.safetensors" for name in ("calm", "killed"))
    assert a.read_bytes() == b.read_bytes()
