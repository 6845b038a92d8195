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
MODULE_OF = {  # where a kernel is, by how its name begins; else in "main"
    "slimba_product": "generic", "slimba_recur": "generic", "slimba_mid": "mid", "slimba_prepare": "mid",
    "slimba_states": "mid", "slimba_scatter": "mid", "slimba_sample": "sample", "slimba_expand": "bulk",
    "slimba_norm": "bulk",
    "slimba_conv": "bulk", "slimba_push": "bulk", "slimba_scan": "bulk", "slimba_ssd": "bulk", "slimba_gate": "bulk",
    "slimba_turn": "bulk", "slimba_rejoin": "bulk", "slimba_mixer": "mixer",
}  # fmt: skip
WARPGROUPS = (9, 0)  # the only one with products of warpgroups as we use them
OVERLAPS = (9, 0)  # first with programmatic dependent launch


class Gpu:
    """One device with its kernels. `blocks`: multiprocessors; `shared`: bytes of shared memory for a block; `build`
    makes a module of kernels from its name and text behind it; `bakes`: whether a model gets kernels of its own;
    `warpgroups`: whether it has what kernels/cuda/warpgroup.cuh wants.
    """

    def __init__(
        self,
        device: torch.device,
        build: Callable[[str, str], Any],
        blocks: int,
        shared: int,
        *,
        overlap: bool = False,
        bakes: bool = False,
        warpgroups: bool = False,
    ) -> None:
        self.device, self.blocks, self.shared, self.bakes = device, blocks, shared, bakes
        self.warpgroups = warpgroups
        self._overlap = self.overlaps = overlap
        self.module_builder = build
        self._modules: dict[tuple[str, str], Any] = {}

    def module(self, name: str, extra: str = "") -> Any:
        """The module `name` with `extra` behind it, compiled at first use."""
        if (name, extra) not in self._modules:
            self._modules[name, extra] = self.module_builder(name, extra)
        return self._modules[name, extra]

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        fields: np.ndarray,
        shared: int = 0,
        *,
        threads: int = 256,
        overlap: bool = False,
        module: Any = None,
        spread: int = 0,
    ) -> None:
        """Puts a kernel into torch's current stream; `overlap` where the GPU can and the kernel knows how; `spread`:
        beside others that must find the multiprocessor's memory divided alike, this percentage shared by blocks."""
        module = module or self.module(next((m for start, m in MODULE_OF.items() if name.startswith(start)), "main"))
        module.launch(
            name, grid, threads, shared, fields, self._stream(), overlap=overlap and self._overlap, spread=spread
        )

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What `work` puts into the stream, to be repeated at will: one CUDA graph. `work` must have run before, and is
        not run here. A graph has memory of its own: torch frees a shared pool with the last graph in it and then
        refuses to record into it."""
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
        raise CudaUnavailable(f"this PyTorch {built}; --backend cpu needs none")
    device = torch.device("cuda", index)
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        name = torch.cuda.get_device_name(device)
        raise CudaUnavailable(
            f"{name} has compute capability {capability[0]}.{capability[1]}; 8.0 is the oldest that will do"
        )
    torch.zeros(1, device=device)  # makes torch's context the current one
    arch = architecture(device)
    about = torch.cuda.get_device_properties(device)
    shared = int(getattr(about, "shared_memory_per_block_optin", 99 * 1024))

    def build(module: str, extra: str) -> Module:
        return Module(compiled(arch, module, extra))

    gpu = Gpu(
        device, build, about.multi_processor_count, shared, overlap=capability >= OVERLAPS, bakes=True,
        warpgroups=capability == WARPGROUPS,
    )  # fmt: skip
    gpu.module("main")
    return gpu
