"""The C++ tests of tests/cpp, built with a compiler alone: under sanitizers, with AVX-512 and AMX in plain C++, and for
ARM under qemu.

They take minutes, so they are slow tests: `pytest -m slow tests/kernels/test_cpp_engine.py`. What a machine lacks
(sanitizer runtimes, libsimde-dev, a cross compiler, qemu-aarch64) is skipped with its name.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def build(out: Path, *flags: str, compiler: str = "g++", simde: bool = False) -> Path:
    if not shutil.which(compiler):
        pytest.skip(f"there is no {compiler}")
    probe = subprocess.run(
        [compiler, "-x", "c++", "-", "-o", str(out / "probe"), *flags],
        input="int main(){}",
        text=True,
        capture_output=True,
    )
    if probe.returncode:
        pytest.skip(f"{compiler} cannot build with {' '.join(flags)}: {probe.stderr.splitlines()[-1]}")
    program = out / "engine_test"
    command = [
        "bash",
        str(ROOT / "scripts" / "build_cpp.sh"),
        str(program),
        str(ROOT / "tests/cpp/engine_test.cpp"),
        *flags,
    ]
    done = subprocess.run(
        command, env=os.environ | {"CXX": compiler, "SIMDE": "1" if simde else ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return program


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_are_silent(tmp_path: Path, sanitizer: str) -> None:
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]
    assert " 0 failed" in run(str(build(tmp_path, *flags)))


def test_amx_with_emulated_tiles(tmp_path: Path) -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("AMX is of x86-64")
    shown = run(str(build(tmp_path, "-DSLIMBA_EMULATE_AMX")))
    if "avx512vnni not" in " ".join(shown.split()):
        pytest.skip("everything but the tiles needs AVX-512 VNNI, which this processor lacks")
    assert any(line.startswith("amx") and line.endswith(" 0 failed") for line in shown.splitlines())


def test_avx512_and_amx_in_plain_cpp(tmp_path: Path) -> None:
    """Every instruction set that a machine with AVX2 lacks, its intrinsics as simde writes them out."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("AVX-512 is of x86-64")
    probe = ["g++", "-x", "c++", "-fsyntax-only", "-"]
    if subprocess.run(probe, input="#include <simde/x86/avx512.h>", text=True, capture_output=True).returncode:
        pytest.skip("there is no simde/x86/avx512.h (Debian's libsimde-dev)")
    shown = run(str(build(tmp_path, simde=True)))
    if "avx2 not" in " ".join(shown.split()):
        pytest.skip("the AVX-512 tables have AVX2 kernels too, which this processor cannot run")
    for isa in ("avx512", "avx512vnni", "avx512lookup", "amx"):
        assert any(line.split()[0] == isa and line.endswith(" 0 failed") for line in shown.splitlines()), shown


def test_neon_under_qemu(tmp_path: Path) -> None:
    if not shutil.which("qemu-aarch64"):
        pytest.skip("there is no qemu-aarch64 (Debian's qemu-user)")
    program = build(tmp_path, "-static", compiler="aarch64-linux-gnu-g++")
    shown = run("qemu-aarch64", str(program))
    assert any(line.startswith("neon") and line.endswith(" 0 failed") for line in shown.splitlines()), shown
