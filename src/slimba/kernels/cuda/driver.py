"""The CUDA driver by ctypes: load a compiled module, launch its kernels on a stream of torch's.

    module = Module(cubin)
    module.launch("slimba_embed", (132,), 256, 0, fields, stream)     # fields: the kernel's parameters as int64

The context is the one that is current, which is torch's: memory, streams and CUDA graphs are torch's business.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from slimba.kernels.cuda.compiler import CudaUnavailable

__all__ = ["Module"]

MAX_DYNAMIC_SHARED, SHARED_CARVEOUT = 8, 9  # of CUfunction_attribute in cuda.h
PROGRAMMATIC_SERIALIZATION = 6  # of CUlaunchAttributeID
SHARED_BY_DEFAULT = 48 * 1024


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class Module:
    """A loaded cubin. CudaUnavailable when the driver is missing or refuses it (most often: it is too old)."""

    def __init__(self, cubin: bytes) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise CudaUnavailable("no NVIDIA driver is installed (libcuda.so.1 is missing)") from None
        self._module = ctypes.c_void_p()
        self._check(self._cuda.cuModuleLoadData(ctypes.byref(self._module), cubin), "loading the kernels")
        self._functions: dict[str, tuple[ctypes.c_void_p, int, int]] = {}  # with their memory and spread

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        threads: int,
        shared: int,
        fields: np.ndarray,
        stream: int,
        *,
        overlap: bool = False,
        spread: int = 0,
    ) -> None:
        """Puts one kernel into the stream. grid: up to three numbers of blocks; shared: bytes of dynamic shared memory;
        overlap: it may begin while the kernel before it ends (programmatic dependent launch), which it must expect;
        spread: percent of a multiprocessor's memory that its blocks and others' share, the rest is its L1 cache.
        """
        function = self._function(name, shared, spread)
        gx, gy, gz = (*grid, 1, 1)[:3]
        data = np.ascontiguousarray(fields, np.int64)
        arguments = (ctypes.c_void_p * 1)(data.ctypes.data)
        attribute = _Attribute(PROGRAMMATIC_SERIALIZATION, b"", 1, b"")
        attributes = ctypes.pointer(attribute) if overlap else None
        config = _Config(gx, gy, gz, threads, 1, 1, shared, stream, attributes, int(overlap))
        code = self._cuda.cuLaunchKernelEx(ctypes.byref(config), function, arguments, None)
        self._check(code, f"launching {name} with {tuple(grid)} blocks and {shared} bytes of shared memory")

    def _function(self, name: str, shared: int, spread: int) -> ctypes.c_void_p:
        found, allowed, before = self._functions.get(name, (None, SHARED_BY_DEFAULT, 0))
        if found is None:
            found = ctypes.c_void_p()
            self._check(self._cuda.cuModuleGetFunction(ctypes.byref(found), self._module, name.encode()), name)
        if spread != before:  # kernels that share a multiprocessor must agree on how its memory is divided
            self._cuda.cuFuncSetAttribute(found, ctypes.c_int(SHARED_CARVEOUT), ctypes.c_int(spread or -1))
        if shared > allowed:
            code = self._cuda.cuFuncSetAttribute(found, ctypes.c_int(MAX_DYNAMIC_SHARED), ctypes.c_int(shared))
            self._check(code, f"{shared} bytes of shared memory for {name}")
            allowed = shared
        self._functions[name] = found, allowed, spread
        return found

    def _check(self, code: int, what: str) -> None:
        if not code:
            return
        text = ctypes.c_char_p()
        self._cuda.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
        raise CudaUnavailable(f"CUDA: {what}: {(text.value or b'unknown error').decode()} (error {code})")
