"""The naive twin of every engine: Mamba-1 and Mamba-2 token by token in NumPy, and random checkpoints to run them on.

Slow and plain on purpose: one token, one line per equation (Gu & Dao 2023, arXiv 2312.00752; Dao & Gu 2024, arXiv
2405.21060). Shapes: D d_model, I d_inner, H heads, P headdim, N d_state, G groups, K d_conv, V vocabulary rows.
"""

from __future__ import annotations

import numpy as np

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.formats import FORMATS, LowRank, Matrix, MatrixLayout, Plane, Segment
from slimba.formats.hadamard import block_of
from slimba.formats.int8 import quantize_rows
from slimba.models.spec import ModelSpec


def mamba2_spec(**changes: object) -> ModelSpec:
    """A tiny Mamba-2; `groups`, `headdim`, ... by keyword."""
    base: dict[str, object] = dict(
        architecture="mamba2", n_layer=2, d_model=40, d_inner=128, d_state=16, vocab_size=67, headdim=16, n_groups=1
    )
    base.update(changes)
    if base.get("gated_norm", True):
        base.setdefault("norm_group_size", base["d_inner"])
    return ModelSpec(**base)  # type: ignore[arg-type]


def mamba1_spec(**changes: object) -> ModelSpec:
    base: dict[str, object] = dict(
        architecture="mamba1", n_layer=2, d_model=40, d_inner=80, d_state=16, vocab_size=67, dt_rank=5
    )
    base.update(changes)
    return ModelSpec(**base)  # type: ignore[arg-type]


def random_matrix(rng: np.random.Generator, layout: MatrixLayout) -> Matrix:
    """Round-to-nearest of Gaussian weights into any layout; random low-rank factors, second plane and column scale."""
    rows, cols = layout.rows, layout.cols
    w = rng.standard_normal((rows, cols)).astype(np.float32) / np.float32(np.sqrt(cols))
    out, row = Matrix(layout), 0
    for i, s in enumerate(layout.segments):
        for part, a in FORMATS[s.format].pack(w[row : row + s.rows]).items():
            out.arrays[layout.part_name(i, part)] = a
        row += s.rows
    if lr := layout.lowrank:
        a = rng.standard_normal((lr.stop - lr.start, lr.rank)).astype(np.float32) * np.float32(0.3 / lr.rank)
        b = rng.standard_normal((lr.rank, cols)).astype(np.float32) / np.float32(np.sqrt(cols))
        out.arrays["lowrank_a"], out.arrays["lowrank_a_scale"] = quantize_rows(a)
        out.arrays["lowrank_b"], out.arrays["lowrank_b_scale"] = quantize_rows(b)
    if p := layout.plane:
        signs = FORMATS["sign"].pack(rng.standard_normal((p.stop - p.start, p.cols)).astype(np.float32))
        out.arrays["plane_packed"] = signs["packed"]
        out.arrays["plane_scale"] = (rng.uniform(0.2, 0.6, p.stop - p.start) / np.sqrt(cols)).astype(np.float16)
        if p.cols < cols:
            out.arrays["plane_index"] = np.sort(rng.permutation(cols)[: p.cols]).astype(np.int32)
    if layout.col_scale:
        out.arrays["col_scale"] = rng.uniform(0.5, 1.5, cols).astype(np.float16)
    if layout.input_scale:
        out.arrays["input_scale"] = np.full(1, 0.02, np.float32)
    return out


def sign_layout(rows: int, cols: int, rank: int, tail: int = 0) -> MatrixLayout:
    """Signs with an int8 correction, the last `tail` rows at int8 without one, and a column scale."""
    segments = (Segment(rows - tail, "sign"),) + ((Segment(tail, "int8"),) if tail else ())
    return MatrixLayout(cols, segments, LowRank(rank, 0, rows - tail), col_scale=True)


def plane_layout(rows: int, cols: int, rank: int) -> MatrixLayout:
    """Sign, int8, int4 and float rows, and a correction and a plane that overlap on some of them."""
    fifth = max(1, rows // 5)
    segments = (
        Segment(fifth, "int8"), Segment(rows - 3 * fifth, "sign"), Segment(fifth, "int4"), Segment(fifth, "float16"),
    )  # fmt: skip
    plane = Plane(cols if rows % 2 else max(1, cols // 3), fifth // 2, rows - fifth // 3)
    return MatrixLayout(cols, segments, LowRank(rank, fifth // 3, rows - fifth), col_scale=True, plane=plane)


def transformed_layout(rows: int, cols: int, short: str) -> MatrixLayout:
    """int4 and int8 rows behind a Hadamard transform; out_proj with one scale for all inputs, x_proj's stay float."""
    block = block_of(cols) if block_of(cols) > 1 else 0
    segments = (Segment(rows // 2, "int4"), Segment(rows - rows // 2, "int8"))
    if short == "x_proj":
        return MatrixLayout(cols, segments, hadamard=block, activations="float32")
    return MatrixLayout(cols, segments, col_scale=True, hadamard=block, input_scale=short == "out_proj")


def random_checkpoint(spec: ModelSpec, seed: int = 0, format: str = "float32", rank: int = 3) -> Checkpoint:
    """Random weights; `format` is a plain one for every matrix, "mixed" (signs, int8 rows, int4 embedding), "planes"
    (also float and int4 rows and a second sign plane) or "transformed" (Hadamard transforms and kinds of inputs).
    """
    rng = np.random.default_rng(seed)
    layouts: dict[str, MatrixLayout] = {}
    tensors: dict[str, np.ndarray] = {}
    for name, (rows, cols) in spec.matrices().items():
        if format not in ("mixed", "planes", "transformed"):
            layouts[name] = MatrixLayout.plain(rows, cols, format)
        elif name in ("backbone.embeddings", "lm_head"):
            layouts[name] = MatrixLayout.plain(rows, cols, "int4")
        elif format == "transformed":
            layouts[name] = transformed_layout(rows, cols, name.rsplit(".", 1)[-1])
        elif format == "planes":
            layouts[name] = plane_layout(rows, cols, rank)
        else:
            layouts[name] = sign_layout(rows, cols, rank, tail=7 if name.endswith("in_proj") else 0)
        for part, array in random_matrix(rng, layouts[name]).arrays.items():
            tensors[f"{name}.{part}"] = array
    for name, (shape, _) in spec.vectors().items():
        if name.endswith("A_log"):
            value = np.log(rng.uniform(1, 16, shape))
        elif name.endswith(("dt_bias", "dt_proj.bias")):
            value = rng.uniform(-4, -1, shape)
        elif name.endswith("norm.weight") or name.endswith("norm_f.weight"):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.standard_normal(shape) * 0.4
        tensors[name] = value.astype(np.float32)
    return Checkpoint(spec, layouts, tensors)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x, 0)


def rms(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


class NumpyModel:
    """float64 recurrence over dequantised weights: `logits(ids)` for one sequence [L] -> [L, V]."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.spec = checkpoint.spec
        self.w = {n: checkpoint.matrix(n).dequantize().astype(np.float64) for n in self.spec.matrices()}
        self.v = {n: checkpoint.vector(n).astype(np.float64) for n in self.spec.vectors()}
        self.head = self.w[checkpoint.head]

    def logits(self, ids: np.ndarray) -> np.ndarray:
        spec = self.spec
        conv = [np.zeros((spec.d_conv, spec.d_conv_channels)) for _ in range(spec.n_layer)]
        size = (spec.n_heads, spec.headdim) if spec.architecture == "mamba2" else (spec.d_inner,)
        state = [np.zeros((*size, spec.d_state)) for _ in range(spec.n_layer)]
        out = []
        for token in ids:
            u = self.w["backbone.embeddings"][token].copy()
            for i in range(spec.n_layer):
                at = f"backbone.layers.{i}."
                mixer = self.mixer2 if spec.architecture == "mamba2" else self.mixer1
                u += mixer(at + "mixer.", rms(u, spec.norm_eps) * self.v[at + "norm.weight"], conv[i], state[i])
            out.append(self.head @ (rms(u, spec.norm_eps) * self.v["backbone.norm_f.weight"]))
        return np.array(out)

    def project(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.w[name] @ x + self.v.get(name + ".bias", 0)

    def convolve(self, at: str, window: np.ndarray, x: np.ndarray) -> np.ndarray:
        """window [K, channels] holds the last K inputs and is moved on in place."""
        window[:-1] = window[1:]
        window[-1] = x
        sums = (window * self.v[at + "conv1d.weight"][:, 0, :].T).sum(axis=0)
        return silu(sums + self.v.get(at + "conv1d.bias", 0))

    def mixer2(self, at: str, x: np.ndarray, window: np.ndarray, state: np.ndarray) -> np.ndarray:
        spec = self.spec
        i, gn = spec.d_inner, spec.n_groups * spec.d_state
        p = self.project(at + "in_proj", x)
        z, dt = p[:i], softplus(p[i + spec.d_conv_channels :] + self.v[at + "dt_bias"]).clip(*spec.dt_limit)
        xbc = self.convolve(at, window, p[i : i + spec.d_conv_channels])
        xs = xbc[:i].reshape(spec.n_heads, spec.headdim)
        per_group = spec.n_heads // spec.n_groups
        b = np.repeat(xbc[i : i + gn].reshape(spec.n_groups, -1), per_group, axis=0)  # [H, N]
        c = np.repeat(xbc[i + gn :].reshape(spec.n_groups, -1), per_group, axis=0)
        decay = np.exp(-dt * np.exp(self.v[at + "A_log"]))
        state[:] = state * decay[:, None, None] + (dt[:, None] * xs)[:, :, None] * b[:, None, :]
        d = self.v[at + "D"]
        y = np.einsum("hpn,hn->hp", state, c) + (d.reshape(xs.shape) if spec.d_has_hdim else d[:, None]) * xs
        return self.project(at + "out_proj", self.gated(at, y.reshape(-1), z))

    def gated(self, at: str, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        spec = self.spec
        if not spec.gated_norm:
            return y * silu(z)

        def norm(v: np.ndarray) -> np.ndarray:
            return rms(v.reshape(-1, spec.norm_group_size), spec.norm_eps).reshape(-1) * self.v[at + "norm.weight"]

        return norm(y) * silu(z) if spec.norm_before_gate else norm(y * silu(z))

    def mixer1(self, at: str, x: np.ndarray, window: np.ndarray, state: np.ndarray) -> np.ndarray:
        spec = self.spec
        xs, z = np.split(self.project(at + "in_proj", x), 2)
        xs = self.convolve(at, window, xs)
        dt, b, c = np.split(self.w[at + "x_proj"] @ xs, [spec.dt_rank, spec.dt_rank + spec.d_state])
        if spec.bcdt_norm_eps is not None:
            dt, b, c = (rms(v, spec.bcdt_norm_eps) for v in (dt, b, c))
        dt = softplus(self.project(at + "dt_proj", dt))
        state[:] = state * np.exp(-dt[:, None] * np.exp(self.v[at + "A_log"])) + (dt * xs)[:, None] * b
        y = state @ c + self.v[at + "D"] * xs
        return self.project(at + "out_proj", y * silu(z))
