"""The GPU as the engine sees it: is there one that will do, how are kernels launched, how is a sequence of them kept.

gpu = open_gpu()                       # CudaUnavailable with the reason where there is none
gpu.launch("slimba_embed", (132,), fields)
run = gpu.record(step); run()          # a CUDA graph of everything that step() launched
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from slimba.kernels.cuda.compiler import CudaUnavailable, compiled
from slimba.kernels.cuda.driver import Module

__all__ = ["Gpu", "open_gpu"]

OLDEST = (8, 0)
OVERLAPS = (9, 0)  # first with programmatic dependent launch


class Gpu:
    """One device with the loaded kernels. `blocks`: multiprocessors; `shared`: bytes of shared memory for a block."""

    def __init__(self, device: torch.device, modules: dict[str, Any], blocks: int, shared: int, overlap: bool) -> None:
        self.device = device
        self.blocks = blocks
        self.shared = shared
        self.overlap = overlap
        self._modules = modules

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        fields: np.ndarray,
        shared: int = 0,
        *,
        threads: int = 256,
        overlap: bool = False,
        module: str = "main",
    ) -> None:
        """Puts a kernel into torch's current stream; `overlap` where the GPU can and the kernel knows how."""
        if module not in self._modules:
            self._modules[module] = Module(compiled(architecture(self.device), module))
        self._modules[module].launch(
            name, grid, threads, shared, fields, self._stream(), overlap=overlap and self.overlap
        )

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What `work` puts into the stream, to be repeated at will: one CUDA graph. `work` must have run before, and is
        not run here."""
        if self.device.type != "cuda":
            return work
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int | None:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0


def architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def open_gpu(index: int = 0) -> Gpu:
    """GPU number `index` with its kernels compiled and loaded."""
    if not torch.cuda.is_available():
        built = "finds no usable NVIDIA GPU" if torch.version.cuda else "was built without CUDA"
        raise CudaUnavailable(f"this PyTorch {built}")
    device = torch.device("cuda", index)
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        name = torch.cuda.get_device_name(device)
        raise CudaUnavailable(
            f"{name} has compute capability {capability[0]}.{capability[1]}; 8.0 is the oldest that will do"
        )
    torch.zeros(1, device=device)  # makes torch's context the current one
    main = Module(compiled(architecture(device)))
    about = torch.cuda.get_device_properties(device)
    shared = int(getattr(about, "shared_memory_per_block_optin", 99 * 1024))
    return Gpu(device, {"main": main}, about.multi_processor_count, shared, capability >= OVERLAPS)
