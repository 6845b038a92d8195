"""Recurrent states in GPU memory. A state is a set of slots; the sequences of a batch name theirs.

Layout: ssm [layer][slot][I][N] in the state's type, scale float32 [layer][slot][I] (int8 only), conv float32
[layer][slot][K][channels], a ring in which token t of a sequence lies at t % K, and pos int32 [slot], tokens seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slimba.models.spec import ModelSpec

__all__ = ["STATE_CODES", "CudaState", "StatePointers"]

STATE_CODES = {"float32": 0, "bfloat16": 1, "int8": 2}  # enum StateType in kernels/cuda/common.cuh
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclass(slots=True)
class StatePointers:
    """How kernels find a state: `arrays` int64 [5], pointers to its tensors and how many slots; `slots` int32 [B]."""

    arrays: torch.Tensor
    slots: torch.Tensor

    def fields(self, spec: ModelSpec, layer: int) -> list[int]:
        """The struct StateRef of kernels/cuda/matrix.cuh."""
        return [self.arrays.data_ptr(), self.slots.data_ptr(), layer, spec.d_conv, spec.d_conv_channels]


class CudaState:
    """State of `batch` sequences; `pointers` is what the kernels read."""

    def __init__(self, spec: ModelSpec, batch: int, dtype: str, device: torch.device) -> None:
        self.batch = batch
        self.dtype = dtype
        rows = (spec.n_layer, batch, spec.d_inner)
        self.ssm = torch.zeros(*rows, spec.d_state, dtype=TYPES[dtype], device=device)
        self.scale = torch.zeros(*rows if dtype == "int8" else (1,), device=device)
        self.conv = torch.zeros(spec.n_layer, batch, spec.d_conv, spec.d_conv_channels, device=device)
        self.pos = torch.zeros(batch, dtype=torch.int32, device=device)
        self.pointers = self._point(torch.arange(batch, dtype=torch.int32, device=device))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.ssm, self.scale, self.conv, self.pos

    @staticmethod
    def nbytes(spec: ModelSpec, batch: int, dtype: str) -> int:
        entry = {"float32": 4, "bfloat16": 2, "int8": 1}[dtype]
        ssm = spec.d_inner * (spec.d_state * entry + (4 if dtype == "int8" else 0))
        return batch * (spec.n_layer * (ssm + spec.d_conv * spec.d_conv_channels * 4) + 8)

    def clone(self) -> CudaState:
        copy = object.__new__(CudaState)
        copy.batch, copy.dtype = self.batch, self.dtype
        copy.ssm, copy.scale, copy.conv, copy.pos = (t.clone() for t in self.tensors)
        copy.pointers = copy._point(self.pointers.slots.clone())
        return copy

    def restore(self, other: CudaState) -> None:
        """Takes over the numbers of a clone."""
        for own, saved in zip(self.tensors, other.tensors, strict=True):
            own.copy_(saved)

    def _point(self, slots: torch.Tensor) -> StatePointers:
        arrays = [*(t.data_ptr() for t in self.tensors), self.pos.shape[0]]
        return StatePointers(torch.tensor(arrays, dtype=torch.int64, device=self.pos.device), slots)

    def reset(self) -> None:
        for t in self.tensors:
            t.zero_()
