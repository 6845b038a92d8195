"""Types of the C++ extension (`kernels/cpu/bindings.cpp`). Arrays are C-contiguous; outputs are filled in place."""

from types import ModuleType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

_Bytes: TypeAlias = NDArray[np.uint8]
_Floats: TypeAlias = NDArray[np.float32]
_Ids: TypeAlias = NDArray[np.int32]
_Segment: TypeAlias = tuple[str, int, _Bytes, _Bytes | None]
_LowRank: TypeAlias = tuple[int, int, int, _Bytes, _Bytes, _Bytes, _Bytes]

kernels: ModuleType

class State:
    batch: int
    def clone(self) -> State: ...
    def reset(self) -> None: ...

class Model:
    isa: str
    threads: int
    def __init__(self, config: dict[str, float], threads: int, isa: str = "") -> None: ...
    def set_matrix(
        self,
        name: str,
        layer: int,
        rows: int,
        cols: int,
        segments: list[_Segment],
        lowrank: _LowRank | None,
        plane: tuple[int, int, int, _Bytes, _Bytes, _Ids | None] | None,
        col_scale: _Floats | None,
        bias: _Floats | None,
        hadamard: int = 0,
        input_scale: float = 0.0,
        float_input: bool = False,
    ) -> None: ...
    def set_vector(self, name: str, layer: int, values: _Floats) -> None: ...
    def finish(self) -> None: ...
    def state_bytes(self, batch: int) -> int: ...
    def new_state(self, batch: int) -> State: ...
    def forward(self, ids: _Ids, state: State, out: _Floats) -> None: ...
    def prefill(self, ids: _Ids, state: State, out: _Floats) -> None: ...
    def nll(self, ids: _Ids, targets: _Ids, state: State, out: NDArray[np.float64]) -> None: ...

class Generation:
    def __init__(
        self,
        model: Model,
        state: State,
        logits: _Floats,
        prompts: _Ids,
        params: dict[str, float],
        seed: int,
        stop_ids: list[int],
        max_new_tokens: int,
    ) -> None: ...
    def next(self, out: _Ids) -> int: ...

def isa(isa: str = "") -> str: ...
def sample(logits: _Floats, history: _Ids, params: dict[str, float], seed: int, b: int, i: int) -> int: ...
def uniform(seed: int, b: int, i: int) -> float: ...
