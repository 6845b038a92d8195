"""The wheel, built and installed into a clean environment without torch: it must generate text there.

Slow (a whole build and an environment): `pytest -m slow tests/test_wheel.py`. Needs what `pip install` needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def run(*command: str | Path) -> str:
    """Run a command outside the source tree; its output, or a failure that shows both streams."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd="/", env=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, ROOT)
    (path,) = out.glob("slimba-*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel and its base dependencies only."""
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", home)
    run(home / "bin" / "python", "-m", "pip", "install", "--quiet", wheel)
    return home / "bin" / "python"


def test_wheel_holds_the_core_the_assets_and_no_sources(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert sum(n.startswith("slimba/_core") and n.endswith(".so") for n in names) == 1
    for wanted in ("slimba/py.typed", "slimba/recipes/dfssm.yaml", "slimba/assets/demo-teacher/model.safetensors"):
        assert wanted in names
    assert [n for n in names if n.endswith((".cpp", ".h", ".hpp", ".o", ".pyc"))] == []
    assert any(n.endswith("licenses/NOTICE") for n in names)
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert wheel.stat().st_size < 20_000_000


def test_installed_wheel_generates_without_torch(python: Path) -> None:
    command = python.parent / "slimba"
    assert "0.1.0" in run(command, "--version")
    arguments = ["--prompt", "The President", "--max-new-tokens", "16", "--temperature", "0", "--threads", "1"]
    text = run(command, "generate", "demo-teacher", *arguments)
    assert len(text.split()) > 4
    assert text == run(command, "generate", "demo-teacher", *arguments)
    installed = run(python, "-m", "pip", "list", "--format=freeze").lower()
    assert "slimba==0.1.0" in installed
    assert "torch" not in installed


def test_training_verbs_name_the_extra_when_torch_is_missing(python: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some words to train on.\n")
    command = [python.parent / "slimba", "compress", "demo-teacher", tmp_path / "out", "--data", text]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd="/")
    assert done.returncode == 2
    assert "slimba[train]" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
