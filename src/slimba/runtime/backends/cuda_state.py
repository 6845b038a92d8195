"""Recurrent states in GPU memory. A state is a set of slots; the sequences of a batch name theirs.

    pool = CudaState(spec, 64, "int8", device)     # room for 64 sequences
    pool.view([5]).reset()                         # a sequence joins in slot 5: prefill it through this view
    batch = pool.view([0, 3, 5])                   # and steps on with those that are running
    saved = pool.view([5]).save()                  # a prefix, of the same size whatever its length

Layout: ssm [layer][slot][I][N] in the state's type, scale float32 [layer][slot][I] (int8 only), conv float32
[layer][slot][K][channels], a ring in which token t of a sequence lies at t % K, and pos int32 [slot], tokens seen.
Mamba-2 stores ssm after every KEPT-th token only (docs/decisions.md, "Recurrent state") and keeps the pos % KEPT tokens
since: kept_u [layer][slot][KEPT][I] and kept_b [..][G N], float32 or, where ssm has fewer bits, bfloat16, and
kept_l float32 [..][H].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from slimba.errors import UserError
from slimba.models.spec import ModelSpec

__all__ = ["STATE_CODES", "CudaState", "StatePointers"]

STATE_CODES = {"float32": 0, "bfloat16": 1, "int8": 2}  # enum StateType in kernels/cuda/common.cuh
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
PARTS = ("ssm", "scale", "conv", "kept_u", "kept_b", "kept_l", "pos")
KEPT = 16  # of kernels/cuda/step.cuh
POINTERS = 8  # of a state: its parts, and how many slots it has


def kept_widths(spec: ModelSpec) -> tuple[int, int, int]:
    """Numbers a token that is kept takes in the three parts: u, B and L. None for Mamba-1."""
    if spec.architecture != "mamba2":
        return 0, 0, 0
    return spec.d_inner, spec.n_groups * spec.d_state, spec.n_heads


@dataclass(slots=True)
class StatePointers:
    """How kernels find a state: `arrays` int64 [POINTERS], its tensors and how many slots; `slots` int32 [B]."""

    arrays: torch.Tensor
    slots: torch.Tensor

    def fields(self, spec: ModelSpec, layer: int) -> list[int]:
        """The struct StateRef of kernels/cuda/matrix.cuh."""
        return [self.arrays.data_ptr(), self.slots.data_ptr(), layer, spec.d_conv, spec.d_conv_channels]


class CudaState:
    """State of `batch` sequences; `pointers` is what the kernels read."""

    def __init__(self, spec: ModelSpec, batch: int, dtype: str, device: torch.device) -> None:
        rows = (spec.n_layer, batch, spec.d_inner)
        self.dtype = dtype
        self.ssm = torch.zeros(*rows, spec.d_state, dtype=TYPES[dtype], device=device)
        self.scale = torch.zeros(*(rows if dtype == "int8" else (1, batch, 1)), device=device)
        self.conv = torch.zeros(spec.n_layer, batch, spec.d_conv, spec.d_conv_channels, device=device)
        kind = torch.float32 if dtype == "float32" else torch.bfloat16
        self.kept_u, self.kept_b, self.kept_l = (
            torch.zeros(spec.n_layer, batch, KEPT, width, dtype=torch.float32 if i == 2 else kind, device=device)
            for i, width in enumerate(kept_widths(spec))
        )
        self.pos = torch.zeros(batch, dtype=torch.int32, device=device)
        self._take(range(batch))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.ssm, self.scale, self.conv, self.kept_u, self.kept_b, self.kept_l, self.pos

    @staticmethod
    def nbytes(spec: ModelSpec, batch: int, dtype: str) -> int:
        entry = {"float32": 4, "bfloat16": 2, "int8": 1}[dtype]
        ssm = spec.d_inner * (spec.d_state * entry + (4 if dtype == "int8" else 0))
        u, b, heads = kept_widths(spec)
        kept = KEPT * ((u + b) * (4 if dtype == "float32" else 2) + heads * 4)
        return batch * (spec.n_layer * (ssm + spec.d_conv * spec.d_conv_channels * 4 + kept) + 8)

    def view(self, slots: Sequence[int]) -> CudaState:
        """The sequences in these of its slots, in this order, sharing its memory. UserError for what is not a slot."""
        have = self.pos.shape[0]
        if not slots or len(set(slots)) < len(slots) or not all(0 <= s < have for s in slots):
            raise UserError(f"slots are {list(slots)}; they must be different numbers below {have}, and at least one")
        out = object.__new__(CudaState)
        out.dtype = self.dtype
        out._hold(self.tensors)
        out._take(slots)
        return out

    def padded(self, slots: Sequence[int], size: int) -> CudaState:
        """`view`, filled up to `size` sequences by the pool's last slot, in which nothing of worth may be."""
        out = self.view(slots)
        out._take([*slots, *[self.pos.shape[0] - 1] * (size - len(slots))])
        return out

    def clone(self) -> CudaState:
        """A copy with memory for its own sequences only."""
        out = object.__new__(CudaState)
        out.dtype = self.dtype
        out._hold(self._own())
        out._take(range(self.batch))
        return out

    def restore(self, other: CudaState) -> None:
        """Takes over the numbers of another state of as many sequences."""
        self._put(other._own())

    def reset(self) -> None:
        """Forgets everything."""
        self._put([torch.zeros_like(t) for t in self._own()] if self._partly else None)

    def save(self) -> dict[str, np.ndarray]:
        """The state as arrays in host memory; bfloat16 as its bits."""
        parts = zip(PARTS, self._own(), strict=True)
        return {n: (t.view(torch.int16) if t.dtype == torch.bfloat16 else t).cpu().numpy() for n, t in parts}

    def load(self, saved: dict[str, np.ndarray]) -> None:
        """Takes over what `save` made of a state of as many sequences of the same model and type."""
        own, parts = self._own(), []
        for name, t in zip(PARTS, own, strict=True):
            given = torch.from_numpy(np.ascontiguousarray(saved[name])).to(t.device)
            given = given.view(torch.bfloat16) if t.dtype == torch.bfloat16 else given
            if given.shape != t.shape or given.dtype != t.dtype:
                raise UserError(f"the saved state's {name} is {list(given.shape)}, this one's {list(t.shape)}")
            parts.append(given)
        self._put(parts)

    def _hold(self, tensors: Sequence[torch.Tensor]) -> None:
        for name, t in zip(PARTS, tensors, strict=True):
            setattr(self, name, t)

    def _take(self, slots: Sequence[int]) -> None:
        """Makes these slots the sequences of this state."""
        device = self.pos.device
        self.batch = len(slots)
        self._partly = list(slots) != list(range(self.pos.shape[0]))
        self._index = torch.tensor(list(slots), dtype=torch.int64, device=device)
        order = self.ssm, self.scale, self.conv, self.pos
        arrays = [*(t.data_ptr() for t in order), self.pos.shape[0]]
        arrays += [t.data_ptr() for t in (self.kept_u, self.kept_b, self.kept_l)]
        self.pointers = StatePointers(
            torch.tensor(arrays, dtype=torch.int64, device=device), self._index.to(torch.int32)
        )  # fmt: skip

    def _own(self) -> list[torch.Tensor]:
        """Copies of the parts of these sequences; slots are the second dimension, of pos the first."""
        *layered, pos = self.tensors
        return [*(t.index_select(1, self._index) for t in layered), pos.index_select(0, self._index)]

    def _put(self, parts: Sequence[torch.Tensor] | None) -> None:
        if parts is None:
            for t in self.tensors:
                t.zero_()
            return
        for t, part in zip(self.tensors, parts, strict=True):
            t.index_copy_(0 if t is self.pos else 1, self._index, part)
