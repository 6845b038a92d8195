"""The CUDA kernels compiled for this processor: every thread a fibre (host_cuda.h). `host_gpu()` is a Gpu for tests.

Slow, but the very sources that run on a GPU, so that indexing, barriers and arithmetic are tested without one. Skips
where there is no x86-64 g++.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimba.kernels.cuda.compiler import source

HERE = Path(__file__).parent


class HostModule:
    """Stands in for `kernels.cuda.driver.Module`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def launch(
        self,
        name: str,
        grid: Any,
        threads: int,
        shared: int,
        fields: np.ndarray,
        stream: int,
        *,
        overlap: bool = False,
        spread: int = 0,
    ) -> None:
        data = np.ascontiguousarray(fields, np.int64)
        gx, gy, gz = (*grid, 1, 1)[:3]
        getattr(self._library, name)(
            gx, gy, gz, ctypes.c_longlong(shared), ctypes.c_void_p(data.ctypes.data), ctypes.c_longlong(data.nbytes),
            threads,
        )  # fmt: skip


@cache
def host_module(module: str = "main", extra: str = "") -> HostModule:
    compiler = shutil.which("g++")
    if not compiler or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")
    text = '#define SLIMBA_HOST\n#include "host_cuda.h"\n' + source(module, extra)
    headers = "".join(h.read_text() for h in sorted(HERE.glob("host_*.h")))
    key = hashlib.sha256((text + headers).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"slimba-host-cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{module}-{key}.so"
    if not library.exists():
        unit = folder / f"{module}-{key}-{os.getpid()}.cpp"
        unit.write_text(text)
        built = unit.with_suffix(".so")
        flags = ["-std=c++20", "-O2", "-shared", "-fPIC", "-w", "-Wno-unknown-pragmas", "-I", str(HERE)]
        subprocess.run([compiler, *flags, str(unit), "-o", str(built)], check=True)
        built.replace(library)
        unit.unlink()
    return HostModule(ctypes.CDLL(str(library)))


@cache
def host_gpu(blocks: int = 3, shared: int = 227 * 1024, bakes: bool = False, warpgroups: bool = False) -> Any:
    torch = pytest.importorskip("torch")
    from slimba.runtime.backends.cuda_device import Gpu

    return Gpu(torch.device("cpu"), host_module, blocks, shared, bakes=bakes, warpgroups=warpgroups)
