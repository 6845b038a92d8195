"""The naive twin of states in bfloat16 and int8 (docs/decisions.md, "Recurrent state"): NumpyModel with their rounding.

Mamba-2 only. What is kept of each token is rounded, the state after every 16th token, everything else is float64.
"""

from __future__ import annotations

import numpy as np

from runtime.numpy_reference import NumpyModel, silu, softplus
from slimba.checkpoints.checkpoint import Checkpoint

__all__ = ["StoredModel"]

KEPT = 16


def bfloat16(x: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32).astype(np.float64)


def int8(x: np.ndarray) -> np.ndarray:
    """Codes round(x 127 / max) of each row of N entries, times max / 127."""
    top = np.abs(x).max(-1, keepdims=True)
    return np.rint(x * np.where(top < 1e-30, 0, 127 / np.maximum(top, 1e-30))) * top / 127


class StoredModel(NumpyModel):
    def __init__(self, checkpoint: Checkpoint, state_dtype: str) -> None:
        super().__init__(checkpoint)
        self.store = {"bfloat16": bfloat16, "int8": int8}[state_dtype]
        self.tokens: dict[str, int] = {}

    def mixer2(self, at: str, x: np.ndarray, window: np.ndarray, state: np.ndarray) -> np.ndarray:
        spec = self.spec
        i, gn, heads = spec.d_inner, spec.n_groups * spec.d_state, spec.n_heads
        p = self.project(at + "in_proj", x)
        dt = softplus(p[i + spec.d_conv_channels :] + self.v[at + "dt_bias"]).clip(*spec.dt_limit)
        xbc = self.convolve(at, window, p[i : i + spec.d_conv_channels])
        xs = xbc[:i].reshape(heads, spec.headdim)
        b, c = (
            np.repeat(v.reshape(spec.n_groups, -1), heads // spec.n_groups, axis=0) for v in np.split(xbc[i:], [gn])
        )
        state *= np.exp(-dt * np.exp(self.v[at + "A_log"]))[:, None, None]
        state += bfloat16(dt[:, None] * xs)[:, :, None] * bfloat16(b)[:, None, :]
        d = self.v[at + "D"]
        y = np.einsum("hpn,hn->hp", state, c) + (d.reshape(xs.shape) if spec.d_has_hdim else d[:, None]) * xs
        self.tokens[at] = self.tokens.get(at, 0) + 1
        if self.tokens[at] % KEPT == 0:
            state[:] = self.store(state)
        gated = self.gated(at, y.reshape(-1), p[:i]) if spec.gated_norm else y.reshape(-1) * silu(p[:i])
        return self.project(at + "out_proj", gated)
