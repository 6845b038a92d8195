"""Sources to machine code by NVRTC, kept in the user's cache directory: no nvcc, no headers, no link against torch.

    cubin = compiled("sm_90")          # bytes; compiled at most once per source, architecture and compiler version

NVRTC comes with every CUDA build of torch (package nvidia-cuda-nvrtc) or with a CUDA toolkit. The cache is
`$XDG_CACHE_HOME/slimba/cuda`, mode 0700, written atomically; a cache that cannot be written is done without.
Run the tests: `pytest tests/kernels/test_cuda_compile.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path

from slimba.errors import UserError

__all__ = ["MODULES", "CudaUnavailable", "compiled", "load_nvrtc", "source"]

BASE = ("common.cuh", "turn.cuh", "matrix.cuh")
PRODUCTS = (*BASE, "tiles.cuh", "product.cuh", "step.cuh", "decode.cu")
ONE_VECTOR = ("rows.cuh", "lean.cuh", "dot.cuh", "codes.cuh", "ring.cuh", "stream.cuh")
MODULES = {  # apart, because a process needs few; cuda_bake.py adds the kernels of a model to "decode" and "many"
    "main": (*BASE, "decode.cu"),
    "decode": (*BASE, "tiles.cuh", "product.cuh", "step.cuh", "quick.cuh", "decode.cu", "choice.cuh", *ONE_VECTOR),
    "generic": (*PRODUCTS, "generic.cu"),
    "bulk": (*BASE, "step.cuh", "span.cuh", "bulk.cu", "turn.cu", "expand.cu", "scan.cu", "scan1.cu", "ssd.cu"),
    "mid": (*BASE, "step.cuh", "mid_norm.cu", "mid.cu", "batch.cu", "many.cu"),
    "many": (*BASE, "rows.cuh", "step.cuh", "mid_norm.cu", "mid.cu", "still.cu", "ring.cuh", "few.cu", "batch.cu"),
    "broad": (
        *(*BASE, "rows.cuh", "step.cuh", "mid_norm.cu", "mid.cu", "still.cu", "batch.cu"),
        *("warpgroup.cuh", "image.cuh", "broad.cu", "broad_norm.cu", "store.cuh", "steps.cu", "flow.cu"),
    ),
    "eight": (
        *(*BASE, "decode.cu", "rows.cuh", "step.cuh", "mid_norm.cu", "mid.cu", "batch.cu"),
        *("image.cuh", "store.cuh", "steps.cu", "flow.cu", "eight.cuh"),
    ),
    "one": (*BASE, "tiles.cuh", "decode.cu", "step.cuh", "quick.cuh", "rows.cuh", "dot.cuh", "one.cuh"),
    "mixer": (*BASE, "step.cuh", "span.cuh", "warpgroup.cuh", "mixer.cu"),
    "sample": (*BASE, "decode.cu", "sample.cu"),
}
WARPGROUPS = ("broad", "mixer")  # modules for sm_90 alone, with what that has and later ones have not
OPTIONS = ("--std=c++17", "--device-as-default-execution-space")


class CudaUnavailable(UserError):
    """This machine cannot run the CUDA engine; the message says why. `auto` falls back to the CPU engine."""


def source(module: str = "main", extra: str = "") -> str:
    """A module as one translation unit, its files in an order in which everything is declared before its use; `extra`
    is put behind them."""
    here = Path(__file__).parent
    return "\n".join([*((here / name).read_text(encoding="utf-8") for name in MODULES[module]), extra])


def compiled(arch: str, module: str = "main", extra: str = "", cache: Path | None = None) -> bytes:
    """The kernels of a module as a cubin for `arch`, such as sm_90. CudaUnavailable where that cannot be had."""
    nvrtc = load_nvrtc()
    text = source(module, extra)
    arch = "sm_90a" if arch == "sm_90" and module in WARPGROUPS else arch
    key = hashlib.sha256("\0".join((text, arch, nvrtc_version(nvrtc), *OPTIONS)).encode()).hexdigest()
    folder = cache or cache_directory()
    file = folder / f"{arch}-{key[:40]}.cubin"
    with contextlib.suppress(OSError):
        return _checked(file.read_bytes())
    cubin = _compile(nvrtc, text, arch)
    with contextlib.suppress(OSError):
        _keep(file, cubin)
    return cubin


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "slimba" / "cuda"


def _keep(file: Path, cubin: bytes) -> None:
    """Whole or not at all, readable by this user alone; a hash in front tells a damaged file."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    owned = file.parent.stat()
    if hasattr(os, "getuid") and (owned.st_uid != os.getuid() or owned.st_mode & 0o022):
        raise OSError(f"{file.parent} can be written by others")
    handle, name = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(hashlib.sha256(cubin).digest() + cubin)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def _checked(data: bytes) -> bytes:
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        raise OSError("damaged")
    return data[32:]


def load_nvrtc() -> ctypes.CDLL:
    """The NVRTC library of torch's packages, else of a CUDA toolkit. CudaUnavailable where there is none."""
    for candidate in _candidates():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(candidate)
    raise CudaUnavailable("NVRTC, which compiles the CUDA kernels, is missing; pip install nvidia-cuda-nvrtc")


def _candidates() -> list[str]:
    found: list[str] = []
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        found += sorted(map(str, Path(place).glob("*/lib/libnvrtc.so.*")), reverse=True)
    torch = importlib.util.find_spec("torch")
    for place in (torch.submodule_search_locations or []) if torch else []:
        found += sorted(map(str, Path(place).glob("lib/libnvrtc*.so*")))
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        found += sorted(map(str, Path(root).glob("lib64/libnvrtc.so.*")), reverse=True) if root else []
    found = [f for f in found if "builtins" not in f and "static" not in f]
    system = ctypes.util.find_library("nvrtc")
    return [*found, *([system] if system else []), "libnvrtc.so"]


def nvrtc_version(nvrtc: ctypes.CDLL) -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(nvrtc, nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def _compile(nvrtc: ctypes.CDLL, text: str, arch: str) -> bytes:
    program = ctypes.c_void_p()
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), b"slimba.cu", ctypes.c_int(0), None, None
    )  # fmt: skip
    _check(nvrtc, created)
    try:
        options = [o.encode() for o in (f"--gpu-architecture={arch}", *OPTIONS)]
        array = (ctypes.c_char_p * len(options))(*options)
        if nvrtc.nvrtcCompileProgram(program, ctypes.c_int(len(options)), array):
            log = _read(nvrtc, program, "ProgramLog").decode(errors="replace").strip("\0\n ")
            first = next((line for line in log.splitlines() if "error" in line), log[:300] or "no message")
            raise CudaUnavailable(f"NVRTC {nvrtc_version(nvrtc)} cannot compile the kernels for {arch}: {first}")
        return _read(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    data = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, data))
    return data.raw


def _check(nvrtc: ctypes.CDLL, code: int) -> None:
    if code:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CudaUnavailable(f"NVRTC: {nvrtc.nvrtcGetErrorString(code).decode()}")
