"""Many tokens at once on the GPU: prefill, scoring, and steps of large batches.

    bulk = Bulk(model, gpu, state_dtype="float32")
    u = bulk.residual(ids, state.pointers)   # ids int32 [B, L] -> residual stream float32 [B * L, D], state moved on
    logits = bulk.logits(u)                  # float32 [rows, V]

Products run in cuBLAS over a scratch of one matrix, expanded from the packed bits just before (float16; float32 with
`exact`, for checks). Callers bound the tokens of one call by `CHUNK`.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from slimba.runtime.backends.cuda_device import Gpu
from slimba.runtime.backends.cuda_mid import Mid
from slimba.runtime.backends.cuda_model import CudaModel, LayerWeights, entries_of, span_of
from slimba.runtime.backends.cuda_state import STATE_CODES, StatePointers, kept_widths
from slimba.runtime.backends.cuda_weights import WARPS, DeviceMatrix, fields_of, float_bits

__all__ = ["CHUNK", "Bulk"]

CHUNK = 16384  # tokens of all sequences in one pass
SCAN_TOKENS = 16  # of kernels/cuda/scan.cu
CONV_TOKENS = 16  # of kernels/cuda/bulk.cu
IN, OUT = 0, 1  # the two scratches: that of out_proj may be filled while that of in_proj is in use
SSD_FROM = 8  # shortest call that is worth a chunk of 64
EXPAND_BYTES = {"half": 4 * (128 + 64), "float": 4 * 256}  # shared memory of slimba_expand for each rank
MOST_REJOINED = 8192  # channels of slimba_rejoin
HEAD_ROWS = 8192  # rows of the head expanded at a time
FEW = 32  # vectors for which the head is not expanded


def ssd_bytes(n: int) -> int:
    """Shared memory of slimba_ssd: SsdShared in kernels/cuda/ssd.cu."""
    return 2 * (2 * 64 * 72 + 5 * 64 * (n + 8) + 64) + 4 * 3 * 64 + 4 * 2 * 64


def mixer_bytes(n: int) -> int:
    """Shared memory of slimba_mixer: MixerShared in kernels/cuda/mixer.cu, begun at a multiple of 1024."""
    return 1024 + 64 * 128 * (5 * n // 64 + 1) + 2 * 67 * 128 + 64 * (2 * (3 * 4 + 2) + 6 * 4)


class Bulk:
    def __init__(self, model: CudaModel, gpu: Gpu, state_dtype: str, *, exact: bool = False) -> None:
        self._model, self._gpu = model, gpu
        self._type = STATE_CODES[state_dtype]
        self.dtype = torch.float32 if exact else torch.float16
        self._suffix = "float" if exact else "half"
        matrices = [m for layer in model.layers for m in layer.matrices.values()]
        head = min(HEAD_ROWS, model.head.rows) * model.head.cols
        most = max(head, *(m.rows * m.cols for m in matrices))
        out = max(layer.matrices["out_proj"].rows * layer.matrices["out_proj"].cols for layer in model.layers)
        self._scratch = [torch.empty(n, dtype=self.dtype, device=gpu.device) for n in (most, out)]
        self._side = torch.cuda.Stream(gpu.device) if gpu.device.type == "cuda" else None
        self._pending: dict[int, torch.cuda.Event] = {}
        self._few: dict[int, Mid] = {}
        self._expansions: dict[tuple[int, int], np.ndarray] = {}

    def residual(
        self, ids: torch.Tensor, state: StatePointers, *, advance: bool = True, chunked: bool = False
    ) -> torch.Tensor:
        """int32 [B, L] on the device -> what the final norm takes, float32 [B * L, D].

        advance: count the tokens. chunked: a state that is stored in fewer bits may be rounded once, after the last
        token, instead of after each.
        """
        spec, (batch, length) = self._model.spec, ids.shape
        tokens = batch * length
        flat = ids.reshape(-1).contiguous()
        u = self._empty(tokens, spec.d_model, dtype=torch.float32)
        self._launch_embed(flat, u)
        mixer = self._mixer2 if spec.architecture == "mamba2" else self._mixer1
        layers = self._model.layers
        self._pending.clear()
        self._ahead(layers[0].matrices["in_proj"], IN)
        self._ahead(layers[0].matrices["out_proj"], OUT)
        for i, layer in enumerate(layers):
            x = self._empty(tokens, spec.d_model)
            self._norm(u, x, layer.norm)
            following = layers[i + 1] if i + 1 < len(layers) else None
            given = mixer(layer, x, state.fields(spec, i), batch, length, chunked, following)
            self._add_out(layer, given, u)
            if following is not None:
                self._ahead(following.matrices["out_proj"], OUT)
        if advance:
            fields = fields_of(state.fields(spec, 0), batch, length)
            self._gpu.launch("slimba_advance", (-(-batch // 256),), fields)
        return u

    # For a step of many sequences (cuda_batch.py), whose vectors are normed already: x float16 [B, cols].

    def begin(self, first: dict[str, DeviceMatrix]) -> None:
        """Begins to expand the matrices of the first layer."""
        self._pending.clear()
        self._ahead(first["in_proj"], IN)
        self._ahead(first["out_proj"], OUT)

    def in_proj(
        self,
        x: torch.Tensor,
        m: DeviceMatrix,
        following: dict[str, DeviceMatrix] | None,
        p: torch.Tensor,
        dt: torch.Tensor,
    ) -> None:
        """in_proj but dt to float16 p, dt in float32; `following`: the matrices of the next layer."""
        w = self._weights(m, IN)
        torch.mm(x, w[: p.shape[1]].T, out=p)
        dt.copy_(self._product32(x, w[p.shape[1] :]))
        if following is not None:
            self._ahead(following["in_proj"], IN)

    def out_proj(
        self, x: torch.Tensor, m: DeviceMatrix, following: dict[str, DeviceMatrix] | None, out: torch.Tensor
    ) -> None:
        """out_proj in float32, to `out`."""
        out.copy_(self._product32(x, self._weights(m, OUT)))
        if following is not None:
            self._ahead(following["out_proj"], OUT)

    def head(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Logits of normed vectors, float32 [B, V]."""
        head = self._model.head
        for first in range(0, head.rows, HEAD_ROWS):
            rows = min(HEAD_ROWS, head.rows - first)
            out[:, first : first + rows] = self._product32(x, self._expand(head, first, rows))

    def logits(self, u: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of the residual stream [n, D] -> float32 [n, V], in `out` where it is given."""
        model = self._model
        if len(u) <= FEW and self.dtype == torch.float16 and Mid.fits(model.head):
            return self._logits_of_few(u.contiguous(), out)
        x = self._empty(*u.shape)
        self._norm(u.contiguous(), x, model.norm_f)
        x = self._turned(model.head, x)
        out = self._empty(len(u), model.head.rows, dtype=torch.float32) if out is None else out
        self.head(x, out)
        return out

    def _logits_of_few(self, u: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """The same without expanding the head."""
        model, count = self._model, len(u)
        if count not in self._few:
            self._few[count] = Mid(self._gpu, count, [model.head])
        out = self._empty(count, model.head.rows, dtype=torch.float32) if out is None else out
        source = [u.data_ptr(), u.shape[1], 0, 0, model.norm_f.data_ptr(), 1, float_bits(model.spec.norm_eps)]
        self._few[count].norm(model.head, source, 1)
        self._few[count].product(model.head, [0, out.data_ptr(), model.head.rows, *[0] * 7], [0] * 5)
        return out

    def _mixer2(
        self,
        layer: LayerWeights,
        x: torch.Tensor,
        state: list[int],
        batch: int,
        length: int,
        chunked: bool,
        following: LayerWeights | None,
    ) -> torch.Tensor:
        """A Mamba-2 mixer: normed x [T, D] -> what out_proj takes."""
        spec, tokens = self._model.spec, batch * length
        inner, channels, heads = spec.d_inner, spec.d_conv_channels, spec.n_heads
        wide = inner + channels
        w = self._weights(layer.matrices["in_proj"], IN)
        x = self._turned(layer.matrices["in_proj"], x)
        p = x @ w[:wide].T
        dt = self._product32(x, w[wide:])
        if following is not None:
            self._ahead(following.matrices["in_proj"], IN)
        if (bias := layer.matrices["in_proj"].bias) is not None:
            p += bias[:wide].to(p.dtype)
            dt += bias[wide:]
        fused = self._by_warpgroups(length, chunked)
        _held, xbc, convolution = self._convolve(layer, p[:, inner:], state, batch, length, inner if fused else 0)
        y = self._empty(tokens, inner)
        span, n = span_of(spec.headdim), spec.d_state
        low, high = spec.dt_limit
        scan = fields_of(
            state, batch, length, heads, spec.headdim, n, spec.n_groups, inner, span, self._type, int(spec.d_has_hdim),
            layer.a.data_ptr(), layer.d.data_ptr(), layer.dt_bias.data_ptr(), *xbc, dt.data_ptr(), heads,
            y.data_ptr(), inner, float_bits(low), float_bits(high),
        )  # fmt: skip
        weight = layer.gated_norm
        gates = fused and weight is not None and not spec.norm_before_gate and spec.norm_group_size == inner
        if fused:
            squares = self._empty(tokens, heads, dtype=torch.float32)
            bias_of_conv = layer.conv_bias.data_ptr() if layer.conv_bias is not None else 0
            more = fields_of(p[:, inner:].data_ptr(), wide, layer.conv.data_ptr(), bias_of_conv,
                             p.data_ptr() if gates else 0, wide, squares.data_ptr())  # fmt: skip
            fields = np.concatenate([scan, more])
            self._gpu.launch(f"slimba_mixer_{n}", (batch * heads,), fields, mixer_bytes(n))
        elif self._by_chunks(length, chunked):
            self._gpu.launch(f"slimba_ssd_{n}", (batch * heads,), scan, ssd_bytes(n))
        else:
            name = f"slimba_scan_{self._suffix}_{entries_of(n)}"
            self._gpu.launch(name, (batch * (inner // span),), scan, 4 * SCAN_TOKENS * (span + 2 * n + 2))
        steps = fields_of(
            dt.data_ptr(), heads, layer.dt_bias.data_ptr(), layer.a.data_ptr(), float_bits(low), float_bits(high)
        )  # fmt: skip
        self._push(convolution, steps, channels, batch)
        if gates and weight is not None:
            norm = fields_of(y.data_ptr(), squares.data_ptr(), weight.data_ptr(), inner, float_bits(spec.norm_eps))
            self._gpu.launch("slimba_rejoin", (tokens,), norm, 32)
            return y
        gated = self._empty(tokens, inner)
        groups = inner // spec.norm_group_size if spec.gated_norm else 0
        fields = fields_of(
            y.data_ptr(), inner, p.data_ptr(), wide, gated.data_ptr(), inner,
            weight.data_ptr() if weight is not None else 0, inner, groups,
            float_bits(spec.norm_eps), int(spec.norm_before_gate),
        )  # fmt: skip
        self._launch("gate_norm", (tokens,), fields, 32)
        return gated

    def _mixer1(
        self,
        layer: LayerWeights,
        x: torch.Tensor,
        state: list[int],
        batch: int,
        length: int,
        chunked: bool,
        following: LayerWeights | None,
    ) -> torch.Tensor:
        """A Mamba-1 mixer: normed x [T, D] -> what out_proj takes."""
        spec, tokens = self._model.spec, batch * length
        inner, n, rank = spec.d_inner, spec.d_state, spec.dt_rank
        p = self._turned(layer.matrices["in_proj"], x) @ self._expand(layer.matrices["in_proj"]).T
        if (bias := layer.matrices["in_proj"].bias) is not None:
            p += bias.to(p.dtype)
        xs, _, convolution = self._convolve(layer, p[:, :inner], state, batch, length)
        self._push(convolution, np.zeros(6, np.int64), inner, batch)
        given = self._turned(layer.matrices["x_proj"], xs.clone() if layer.matrices["x_proj"].turns else xs)
        selected = self._product32(given, self._expand(layer.matrices["x_proj"]))
        if spec.bcdt_norm_eps is not None:
            parts = torch.split(selected, [rank, n, n], dim=1)
            selected = torch.cat([F.rms_norm(t, t.shape[1:], None, spec.bcdt_norm_eps) for t in parts], dim=1)
        given = self._turned(layer.matrices["dt_proj"], selected[:, :rank].to(self.dtype, copy=True))
        dt = self._product32(given, self._expand(layer.matrices["dt_proj"]))
        y = self._empty(tokens, inner)
        fields = fields_of(
            state, batch, length, n, inner, self._type, layer.a.data_ptr(), layer.d.data_ptr(),
            layer.dt_bias.data_ptr(), xs.data_ptr(), inner, p[:, inner:].data_ptr(), 2 * inner, y.data_ptr(), inner,
            dt.data_ptr(), inner, selected[:, rank:].data_ptr(), rank + 2 * n,
        )  # fmt: skip
        self._launch("scan1", (-(-inner // 16), batch), fields)
        return y

    # ------------------------------------------------------------ the pieces

    def _convolve(
        self, layer: LayerWeights, given: torch.Tensor, state: list[int], batch: int, length: int, first: int = 0
    ) -> tuple[torch.Tensor, list[int], np.ndarray]:
        """silu of the causal convolution of the columns `given` [T, channels], from channel `first` on; where channel 0
        would be and what lies between tokens; and the fields of its launch."""
        channels = given.shape[1]
        out = self._empty(len(given), channels - first)
        place = [out.data_ptr() - first * out.element_size(), channels - first]
        fields = fields_of(
            state, batch, length, given.data_ptr(), given.stride(0), place, layer.conv.data_ptr(),
            layer.conv_bias.data_ptr() if layer.conv_bias is not None else 0,
            self._type, list(kept_widths(self._model.spec)), first,
        )  # fmt: skip
        grid = -(-(channels - first) // 256), -(-length // CONV_TOKENS), batch
        self._launch("conv", grid, np.concatenate([fields, np.zeros(6, np.int64)]))
        return out, place, fields

    def _push(self, convolution: np.ndarray, steps: np.ndarray, channels: int, batch: int) -> None:
        """The last inputs of a convolution, and what is kept of the tokens in no stored state, into the state. steps:
        where dt and what makes L of it are."""
        self._launch("push", (-(-channels // 256), batch), np.concatenate([convolution, steps]))

    def _add_out(self, layer: LayerWeights, y: torch.Tensor, u: torch.Tensor) -> None:
        """out_proj, added to the residual stream u in float32 within the product."""
        m = layer.matrices["out_proj"]
        y, w = self._turned(m, y), self._weights(m, OUT).T
        if y.dtype == u.dtype:
            u.addmm_(y, w)
        elif y.device.type == "cuda":
            torch.addmm(u, y, w, out_dtype=torch.float32, out=u)
        else:
            u += y.float() @ w.float()
        if m.bias is not None:
            u += m.bias

    def _turned(self, m: DeviceMatrix, x: torch.Tensor) -> torch.Tensor:
        """x [T, cols], transformed and rounded in place as the matrix wants its inputs."""
        if m.turns:
            fields = fields_of(x.data_ptr(), x.stride(0), m.cols, m.hadamard, m.rounding, m.input_step, m.col_scale)
            self._launch("turn", (len(x),), fields, 4 * (m.cols + WARPS))
        return x

    def _by_chunks(self, length: int, chunked: bool) -> bool:
        """Whether the chunked kernel computes this recurrence, and does so faster than token by token."""
        spec = self._model.spec
        shape = spec.headdim == 64 and spec.d_state in (64, 128) and spec.d_inner % 8 == 0
        rounds = self._type == STATE_CODES["float32"] or chunked
        return shape and rounds and length >= SSD_FROM and self.dtype == torch.float16

    def _by_warpgroups(self, length: int, chunked: bool) -> bool:
        """Whether mixer.cu does: the convolution of x, the recurrence by chunks and the gate in one kernel."""
        spec = self._model.spec
        shape = spec.d_conv == 4 and spec.d_inner <= MOST_REJOINED and spec.d_conv_channels % 8 == 0
        return self._gpu.warpgroups and shape and self._by_chunks(length, chunked)

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self._gpu.device)

    def _launch(self, name: str, grid: tuple[int, ...], fields: object, shared: int = 0) -> None:
        self._gpu.launch(f"slimba_{name}_{self._suffix}", grid, fields, shared)  # type: ignore[arg-type]

    def _launch_embed(self, ids: torch.Tensor, u: torch.Tensor) -> None:
        fields = fields_of(self._model.embedding.fields, [0] * 5, len(ids), ids.data_ptr(), u.data_ptr())
        self._gpu.launch("slimba_embed", (max(1, min(u.numel() // 1024, 16 * self._gpu.blocks)),), fields)

    def _norm(self, u: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        fields = fields_of(
            u.data_ptr(), x.data_ptr(), weight.data_ptr(), u.shape[1], float_bits(self._model.spec.norm_eps)
        )
        self._launch("norm", (len(u),), fields, 32)

    def _ahead(self, m: DeviceMatrix, place: int) -> None:
        """Begins to expand a matrix beside what the stream does next; what lay in that scratch has been used."""
        if self._side is None or self._model.spec.architecture != "mamba2" or m.half is not None:
            return
        self._side.wait_stream(torch.cuda.current_stream(self._gpu.device))
        with torch.cuda.stream(self._side):
            self._expand(m, place=place)
            self._pending[place] = self._side.record_event()

    def _weights(self, m: DeviceMatrix, place: int) -> torch.Tensor:
        """The expanded matrix, waiting for what `_ahead` began."""
        if (done := self._pending.pop(place, None)) is None:
            return self._expand(m, place=place)
        torch.cuda.current_stream(self._gpu.device).wait_event(done)
        return self._scratch[place][: m.rows * m.cols].view(m.rows, m.cols)

    def _expand(self, m: DeviceMatrix, first: int = 0, rows: int | None = None, place: int = IN) -> torch.Tensor:
        """Rows of the matrix that `Matrix.dequantize` describes, in a scratch: [rows, cols]."""
        rows = m.rows if rows is None else rows
        if m.half is not None and self.dtype == torch.float16:
            return m.half[first : first + rows]
        out = self._scratch[place][: rows * m.cols].view(rows, m.cols)
        key = id(m), first
        if key not in self._expansions:
            self._expansions[key] = fields_of(m.fields, first, rows, out.data_ptr(), m.cols, m.plane_inverse)
        grid = -(-m.cols // 256), -(-rows // 64)
        if m.rank or self.dtype == torch.float32:
            self._launch("expand", grid, self._expansions[key], m.rank * EXPAND_BYTES[self._suffix])
        else:
            self._gpu.launch("slimba_expand_plain", grid, self._expansions[key])
        return out

    def _product32(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """x w^T with a float32 result."""
        if x.dtype == torch.float32:
            return x @ w.T
        if x.device.type == "cuda":
            return torch.mm(x, w.T, out_dtype=torch.float32)
        return x.float() @ w.T.float()
