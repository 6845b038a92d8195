"""Which layers take kernels/cuda/front.cuh, in_proj and recurrence in one kernel, and with what shape of blocks."""

from __future__ import annotations

from dataclasses import dataclass

from slimba.models.spec import ModelSpec
from slimba.runtime.backends.cuda_lean import TILE, Dot, dot_of
from slimba.runtime.backends.cuda_weights import DeviceMatrix

__all__ = ["Front", "front_of"]

STATE, SPAN, GROUP_ROWS = 128, 32, 256  # d_state, channels of a block, rows of B and C in kernels/cuda/front.cuh
FRONT_SHARED = 4 * (SPAN + 2 * STATE + 16) + 4 * (SPAN + 1)  # FrontShared
RESIDENT = 2  # blocks for which a multiprocessor should have registers: one of out_proj comes beside it


@dataclass(frozen=True, slots=True)
class Front:
    """Arguments of the template `front`: those of `dot` but the tiles, and how many blocks make a cluster."""

    dot: Dot
    cluster: int

    @property
    def threads(self) -> int:
        return self.dot.threads

    @property
    def name(self) -> str:
        d = self.dot
        return f"front<{d.warps}, {d.words}, {GROUP_ROWS // TILE // self.cluster}, {d.plane}, {d.with_plane}>"

    @property
    def shared_bytes(self) -> int:
        return -(-self.dot.shared_bytes // 16) * 16 + FRONT_SHARED


def front_of(m: DeviceMatrix, spec: ModelSpec, cluster: int) -> Front | None:
    """The kernel for a layer with this in_proj and clusters of 16 or 8 blocks; None where it is not one for it."""
    inner, blocks = spec.d_inner, spec.d_inner // SPAN
    rows = [("sign", 2 * inner + GROUP_ROWS), ("int8", spec.n_heads)]
    if (
        (spec.d_state, spec.n_groups) != (STATE, 1)
        or inner % (SPAN * cluster)
        or spec.headdim % SPAN
        or [(s.format, s.rows) for s in m.layout.segments] != rows
        or not (plain := dot_of(m, blocks, 1, False))
        or plain.rank
    ):
        return None
    shared = GROUP_ROWS // TILE // cluster
    plane = m.layout.plane
    kinds = [inner] * 2 + [2 * inner] * shared + [0] * 2  # where the rows of a block's tiles begin
    ends = [2 * inner] * 2 + [2 * inner + GROUP_ROWS] * shared + [inner] * 2
    with_plane = sum(
        1 << i for i, (a, b) in enumerate(zip(kinds, ends, strict=True)) if plane and plane.start < b and a < plane.stop
    )
    tiles = 4 + shared
    dot = Dot(plain.warps, plain.words, tiles, 1, plain.plane, with_plane, 0, blocks)
    return Front(dot, cluster) if 2 * (tiles * TILE + 1) <= dot.threads else None
