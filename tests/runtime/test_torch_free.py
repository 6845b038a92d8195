"""A person who only runs a model needs no torch: everything for that imports and works with torch blocked.

`pytest tests/runtime/test_torch_free.py`
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.tiny import TEXT, tiny_directory

pytest.importorskip("slimba._core", reason="the C++ core is not built")

BLOCKED = """
import importlib, pkgutil, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "huggingface_hub", "lm_eval", "yaml", "pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

sys.meta_path.insert(0, NoTorch())
"""


def run(code: str, *args: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + code, *map(str, args)],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_of_the_running_rooms_imports() -> None:
    """All of formats, checkpoints, data, evaluation, runtime and cli, except the backends that are made of torch."""
    out = run(
        """
import slimba.cli.main
for room in ("formats", "checkpoints", "data", "evaluation", "runtime", "cli", "models.spec", "models.configs"):
    module = importlib.import_module("slimba." + room)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), module.__name__ + "."):
        if not found.name.startswith(("slimba.runtime.backends.reference", "slimba.runtime.backends.cuda")):
            importlib.import_module(found.name)
            print(found.name)
assert "torch" not in sys.modules
"""
    )
    assert {"slimba.runtime.backends.cpu", "slimba.cli.eval", "slimba.checkpoints.packed"} <= set(out.split())


@pytest.mark.parametrize("architecture", ["mamba1", "mamba2"])
def test_generate_and_eval_run(tmp_path: Path, architecture: str) -> None:
    model = tiny_directory(tmp_path / "tiny", architecture, preset="dfssm")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    out = run(
        """
from slimba.cli.main import main
model, text = sys.argv[1:]
assert main(["generate", model, "--prompt", "the sea", "--max-new-tokens", "8", "--seed", "1"]) == 0
assert main(["eval", model, "--text", text, "--window", "32"]) == 0
assert main(["inspect", model]) == 0
assert "torch" not in sys.modules
""",
        model,
        tmp_path / "text.txt",
    )
    assert "perplexity" in out


def test_what_needs_torch_says_so(tmp_path: Path) -> None:
    model = tiny_directory(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    out = run(
        """
import contextlib, io
from slimba.cli.main import main
model, text, out = sys.argv[1:]
for line in (
    ["generate", model, "--prompt", "a", "--backend", "reference"],
    ["compress", model, out, "--data", text],
    ["pretrain", out, "--data", text, "--tokenizer", model + "/tokenizer.json"],
    ["eval", model, "--text", text, "--window", "8", "--tasks", "x"],
):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = main(line)
    print(code, err.getvalue().strip(), sep="|")
""",
        model,
        tmp_path / "text.txt",
        tmp_path / "out",
    )
    lines = [line for line in out.splitlines() if line.startswith("2|")]
    assert len(lines) == 4, out
    assert all('pip install "slimba[train]"' in line for line in lines[:3])
    assert 'pip install "slimba[eval]"' in lines[3]
