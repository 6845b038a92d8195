"""Compiling the CUDA kernels: every architecture, the cache, and what is said where it cannot be done.

Run: `pytest tests/kernels/test_cuda_compile.py`, and with `-m slow` for all architectures (needs NVRTC, no GPU).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from slimba.kernels.cuda import compiler
from slimba.kernels.cuda.compiler import MODULES, WARPGROUPS, CudaUnavailable, compiled, load_nvrtc
from slimba.kernels.cuda.driver import Module

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


@pytest.fixture
def nvrtc() -> ctypes.CDLL:
    try:
        return load_nvrtc()
    except CudaUnavailable as e:
        pytest.skip(str(e))


BAKED = {
    "decode": """
KERNEL(slimba_a, Product, 512, 2) { SHARED(smem); lean<8, 2, 1, 4, 1>(p, smem, InOrder()); }
KERNEL(slimba_b, Product, 512, 2) { SHARED(smem); lean<16, 1, 0, 0, 0>(p, smem, InOrder()); }
KERNEL(slimba_c, Product, THREADS, 2) { SHARED(smem); product<1>(p, smem, 0, blockIdx.x, gridDim.x, InOrder()); }
KERNEL(slimba_d, Recurrence, THREADS, 2) { SHARED(smem); recur<1, true>(p, smem, blockIdx.x, gridDim.x, InOrder()); }
""",
    "eight": """
KERNEL(slimba_a, Eight, 256, 1) { SHARED(smem); eight<8, 2, 4, 1, 4, 14, 1, 1, 1, 1>(p, smem); }
KERNEL(slimba_b, Eight, 512, 1) { SHARED(smem); eight<16, 2, 2, 0, 4, 3, 1, 2, 2, 2>(p, smem); }
KERNEL(slimba_c, EightEmbed, THREADS) { SHARED(smem); eight_embed(p, smem); }
""",
    "one": """
KERNEL(slimba_a, One, 256, 2) { SHARED(smem); one<8, 2, 4, 1, 4, 14, 132>(p, smem); }
KERNEL(slimba_b, One, 512, 2) { SHARED(smem); one<16, 1, 5, 0, 0, 0, 108>(p, smem); }
KERNEL(slimba_c, Leaving, 512, 2) { SHARED(smem); leaving<16, 2, 1, 0, 4, 1, 132>(p, smem); }
KERNEL(slimba_d, Recurrence, 384, 2) { SHARED(smem); one_recur(p, smem); }
""",
}  # what cuda_bake.py writes, without the constants


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "module"), [(a, m) for a in ARCHITECTURES for m in MODULES if a == "sm_90" or m not in WARPGROUPS]
)
def test_every_architecture(arch: str, module: str, nvrtc: ctypes.CDLL, tmp_path: Path) -> None:
    assert compiled(arch, module, BAKED.get(module, ""), cache=tmp_path).startswith(b"\x7fELF")


def test_a_refusal_names_the_error(nvrtc: ctypes.CDLL, tmp_path: Path) -> None:
    with pytest.raises(CudaUnavailable, match=r"cannot compile the kernels for sm_90: .*error.*nonsense"):
        compiled("sm_90", "decode", "nonsense here;", cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_cache_is_private_and_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def fake(nvrtc: object, text: str, arch: str) -> bytes:
        made.append((text, arch))
        return b"cubin of " + arch.encode()

    monkeypatch.setattr(compiler, "_compile", fake)
    monkeypatch.setattr(compiler, "load_nvrtc", lambda: None)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda nvrtc: "13.0")
    cache = tmp_path / "cuda"
    assert compiled("sm_90", cache=cache) == compiled("sm_90", cache=cache) == b"cubin of sm_90"
    assert len(made) == 1
    assert cache.stat().st_mode & 0o777 == 0o700
    (file,) = cache.iterdir()
    compiled("sm_80", cache=cache)
    compiled("sm_90", "main", "// more", cache=cache)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda nvrtc: "13.1")
    compiled("sm_90", cache=cache)
    assert len(made) == 4 and len(list(cache.iterdir())) == 4  # by architecture, source and compiler
    monkeypatch.setattr(compiler, "nvrtc_version", lambda nvrtc: "13.0")
    file.write_bytes(file.read_bytes()[:-1])
    assert compiled("sm_90", cache=cache) == b"cubin of sm_90" and len(made) == 5  # damaged, so made anew
    os.chmod(cache, 0o777)
    compiled("sm_86", cache=cache)
    assert len(list(cache.iterdir())) == 4  # nothing is put where others may write


def test_no_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_candidates", lambda: ["libnone.so"])
    with pytest.raises(CudaUnavailable, match=r"NVRTC.*missing; pip install nvidia-cuda-nvrtc"):
        load_nvrtc()


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(CudaUnavailable, match="no NVIDIA driver"):
        Module(b"")
