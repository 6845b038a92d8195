"""ModelSpec: the one normalised description of an SSM, whatever layout its config came in. Needs no torch.

Legend used in every file: B batch, L length, D d_model, I d_inner, H heads, P headdim, N d_state, G groups,
K d_conv, V vocabulary rows, R rank.

Reading and writing the configs of others is in `models/configs.py`. Run the tests: `pytest tests/models/test_spec.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from slimba.errors import UserError

__all__ = ["ModelSpec", "VectorKind"]

VectorKind = Literal["norm", "conv", "ssm", "bias"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """One SSM's shape and every choice that changes its mathematics.

    Canonical tensor names are those of transformers' Mamba/Mamba-2 (`backbone.layers.0.mixer.in_proj.weight`, ...).
    `in_proj` rows of a Mamba-2 are ordered z (I), x (I), B (G*N), C (G*N), dt (H); of a Mamba-1: x (I), z (I).
    """

    architecture: Literal["mamba1", "mamba2"]
    n_layer: int
    d_model: int
    d_inner: int
    d_state: int
    vocab_size: int  # rows of the embedding, padding included
    d_conv: int = 4
    norm_eps: float = 1e-5
    conv_bias: bool = True
    proj_bias: bool = False  # bias on in_proj and out_proj
    tie_embeddings: bool = True
    residual_in_fp32: bool = True

    # Mamba-2 only
    headdim: int = 0
    n_groups: int = 1
    chunk_size: int = 256
    norm_group_size: int = 0  # channels that share one RMS in the gated norm; d_inner means one group
    gated_norm: bool = True  # False: y * silu(z) without a norm (mamba_ssm `rmsnorm=False`)
    norm_before_gate: bool = False  # True: norm(y) * silu(z)
    d_has_hdim: bool = False  # True: D has one entry per channel instead of one per head
    dt_limit: tuple[float, float] = (0.0, float("inf"))  # clamp of softplus(dt + dt_bias)

    # Mamba-1 only
    dt_rank: int = 0
    bcdt_norm_eps: float | None = None  # Falcon-Mamba: weightless RMSNorm on B, C and dt with this eps

    # Text policy, kept from the source layout
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    add_bos: bool = False  # a prompt starts with bos_token_id

    def __post_init__(self) -> None:
        for name in ("n_layer", "d_model", "d_inner", "d_state", "vocab_size", "d_conv"):
            if getattr(self, name) < 1:
                raise UserError(f"config: {name} is {getattr(self, name)}, it must be at least 1")
        if self.architecture == "mamba2":
            if self.headdim < 1 or self.d_inner % self.headdim:
                raise UserError(f"config: headdim {self.headdim} does not divide d_inner {self.d_inner}")
            if self.n_groups < 1 or self.n_heads % self.n_groups:
                raise UserError(f"config: n_groups {self.n_groups} does not divide the {self.n_heads} heads")
            if self.gated_norm and (self.norm_group_size < 1 or self.d_inner % self.norm_group_size):
                size = self.norm_group_size
                raise UserError(f"config: norm_group_size {size} does not divide d_inner {self.d_inner}")
        elif self.architecture == "mamba1":
            if self.dt_rank < 1:
                raise UserError(f"config: dt_rank is {self.dt_rank}, it must be at least 1")
        else:
            raise UserError(f"config: unknown architecture {self.architecture!r}, known are mamba1 and mamba2")

    @property
    def n_heads(self) -> int:
        """H: d_inner / headdim (Mamba-2)."""
        return self.d_inner // self.headdim

    @property
    def d_conv_channels(self) -> int:
        """Channels of the causal convolution: I for Mamba-1; x, B and C together for Mamba-2."""
        return self.d_inner + (2 * self.n_groups * self.d_state if self.architecture == "mamba2" else 0)

    @property
    def in_proj_rows(self) -> dict[str, int]:
        """Rows of in_proj by name, in order."""
        if self.architecture == "mamba1":
            return {"x": self.d_inner, "z": self.d_inner}
        gn = self.n_groups * self.d_state
        return {"z": self.d_inner, "x": self.d_inner, "B": gn, "C": gn, "dt": self.n_heads}

    def norm_before(self, matrix: str) -> str | None:
        """The norm, by its name within the layer, whose weight multiplies the input columns of a layer's matrix.

        None where there is none (Mamba-1's out_proj, a Mamba-2 without a gated norm).
        """
        if matrix == "in_proj":
            return "norm.weight"
        gated = self.architecture == "mamba2" and self.gated_norm
        return "mixer.norm.weight" if matrix == "out_proj" and gated else None

    def layer_matrices(self) -> dict[str, tuple[int, int]]:
        """Matrices of one layer's mixer by short name: (rows, cols)."""
        out = {"in_proj": (sum(self.in_proj_rows.values()), self.d_model)}
        if self.architecture == "mamba1":
            out["x_proj"] = (self.dt_rank + 2 * self.d_state, self.d_inner)
            out["dt_proj"] = (self.d_inner, self.dt_rank)
        out["out_proj"] = (self.d_model, self.d_inner)
        return out

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Every matrix that has a weight format, by canonical name without `.weight`: (rows, cols)."""
        out = {"backbone.embeddings": (self.vocab_size, self.d_model)}
        for i in range(self.n_layer):
            for name, shape in self.layer_matrices().items():
                out[f"backbone.layers.{i}.mixer.{name}"] = shape
        if not self.tie_embeddings:
            out["lm_head"] = (self.vocab_size, self.d_model)
        return out

    def vectors(self) -> dict[str, tuple[tuple[int, ...], VectorKind]]:
        """Every other tensor, by full canonical name: (shape, kind)."""
        out: dict[str, tuple[tuple[int, ...], VectorKind]] = {}
        channels = self.d_conv_channels
        for i in range(self.n_layer):
            at = f"backbone.layers.{i}."
            out[at + "norm.weight"] = ((self.d_model,), "norm")
            out[at + "mixer.conv1d.weight"] = ((channels, 1, self.d_conv), "conv")
            if self.conv_bias:
                out[at + "mixer.conv1d.bias"] = ((channels,), "conv")
            if self.architecture == "mamba2":
                out[at + "mixer.A_log"] = ((self.n_heads,), "ssm")
                out[at + "mixer.D"] = ((self.d_inner if self.d_has_hdim else self.n_heads,), "ssm")
                out[at + "mixer.dt_bias"] = ((self.n_heads,), "ssm")
                if self.gated_norm:
                    out[at + "mixer.norm.weight"] = ((self.d_inner,), "norm")
            else:
                out[at + "mixer.A_log"] = ((self.d_inner, self.d_state), "ssm")
                out[at + "mixer.D"] = ((self.d_inner,), "ssm")
                out[at + "mixer.dt_proj.bias"] = ((self.d_inner,), "ssm")
            if self.proj_bias:
                out[at + "mixer.in_proj.bias"] = ((self.layer_matrices()["in_proj"][0],), "bias")
                out[at + "mixer.out_proj.bias"] = ((self.d_model,), "bias")
        out["backbone.norm_f.weight"] = ((self.d_model,), "norm")
        return out

    def n_params(self) -> int:
        """Parameters, tied embedding counted once."""
        total = sum(rows * cols for rows, cols in self.matrices().values())
        for shape, _ in self.vectors().values():
            size = 1
            for n in shape:
                size *= n
            total += size
        return total

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-ready values (infinite dt limit as null)."""
        out = dataclasses.asdict(self)
        low, high = self.dt_limit
        out["dt_limit"] = [low, None if high == float("inf") else high]
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Inverse of `to_dict`; an unknown or missing key is a UserError."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise UserError(f"config: unknown key {unknown[0]!r} in the model description")
        values = dict(data)
        if "dt_limit" in values:
            low, high = values["dt_limit"]
            values["dt_limit"] = (float(low), float("inf") if high is None else float(high))
        try:
            return cls(**values)
        except TypeError as e:
            raise UserError(f"config: {e}") from None
