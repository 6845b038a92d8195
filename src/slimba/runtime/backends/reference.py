"""ReferenceEngine: the networks of `models/` in float32 behind the engine interface. Needs torch; slow and readable.

The weights are exactly `Matrix.dequantize()` of what is on disk, which makes it the measure of every other engine.

Run the tests: `pytest tests/runtime/test_reference_engine.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from slimba.checkpoints.checkpoint import Checkpoint, scan_scales
from slimba.errors import UserError
from slimba.formats import MatrixLayout
from slimba.formats.hadamard import hadamard
from slimba.models.spec import ModelSpec
from slimba.runtime.engine import SamplingParams
from slimba.runtime.sampling import Sampler
from slimba.runtime.scoring import check_ids

try:
    import torch
    import torch.nn.functional as F

    from slimba.models.lm import ModelState, SSMForCausalLM, load_weights
    from slimba.models.state import HeldTokens, Rounding
except ModuleNotFoundError as e:
    if e.name != "torch":
        raise
    raise UserError('backend reference needs torch; pip install "slimba[train]", or use --backend cpu') from None

__all__ = ["ReferenceEngine", "TorchState"]

CHUNK = 256  # positions per pass of prefill and nll, which bounds their memory
SCAN_CHUNK = 64  # chunk of the Mamba-2 scan that is fastest on a CPU; speed, not result


def round_bfloat16(state: torch.Tensor) -> torch.Tensor:
    """To the nearest bfloat16, ties to even."""
    return state.bfloat16().float()


def round_int8(state: torch.Tensor) -> torch.Tensor:
    """[..., N] float32: codes round(S 127 / max|S|), ties to even, times max|S| / 127, for each row of N entries.

    A row below 1e-30 becomes zero; NaN and infinity make all of their row NaN.
    """
    top = state.abs().amax(-1, keepdim=True)
    zero = top < 1e-30
    codes = (state * torch.where(zero, 0.0, 127 / top)).round()
    return codes * torch.where(zero, 0.0, top / 127)


def round_fixed(x: torch.Tensor, step: float) -> torch.Tensor:
    """float32 to the nearest of -127..127 steps, ties to even; NaN stays NaN."""
    inverse = float(np.float32(1) / np.float32(step))
    return (x * inverse).clamp(-127, 127).round() * step


ROUND = {"float32": None, "bfloat16": round_bfloat16, "int8": round_int8}


class InputRounding:
    """A forward pre-hook: x [..., cols] to int8 and back, one scale a token, as QuantArgs in kernels.h lays it down.

    With a Hadamard transform H and a column scale c, (H x) c is what is rounded; the module's weights hold both, so
    they are undone again. With a stored scale that one is used for all tokens, and codes saturate.
    """

    def __init__(self, layout: MatrixLayout, arrays: dict[str, np.ndarray], device: str) -> None:
        self._block = layout.hadamard
        column = arrays["col_scale"].astype(np.float32) if layout.col_scale else None
        self._column = None if column is None else torch.from_numpy(column).to(device)
        self._step = float(arrays["input_scale"][0]) if layout.input_scale else None

    def __call__(self, module: torch.nn.Module | None, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        x = args[0].float()
        if self._block:
            x = hadamard(x, self._block)
        if self._column is not None:
            x = x * self._column
        x = round_int8(x) if self._step is None else round_fixed(x, self._step)
        if self._column is not None:
            x = torch.where(self._column == 0, 0.0, x / self._column)
        return hadamard(x, self._block) if self._block else x


class ScanRounding:
    """x, B and C [..., channels] to int8 and back, with the file's scale a channel; codes saturate."""

    def __init__(self, scale: torch.Tensor) -> None:
        self.scale, self._inverse = scale, 1 / scale

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() * self._inverse).clamp(-127, 127).round() * self.scale


class TorchState:
    """Recurrent state of a batch of sequences; float32 numbers, rounded by `store` (None: float32 it is)."""

    def __init__(
        self, model: SSMForCausalLM, batch: int, store: Rounding | None = None, inner: ModelState | None = None
    ) -> None:
        self.batch = batch
        self._model = model
        self._store = store
        self.inner = inner or self._empty()

    def clone(self) -> TorchState:
        return TorchState(self._model, self.batch, self._store, self.inner.clone())

    def reset(self) -> None:
        self.inner = self._empty()

    def _empty(self) -> ModelState:
        state = self._model.new_state(self.batch)
        if self._store is not None and self._model.spec.architecture == "mamba2":
            for layer in state.layers:
                device = layer.ssm.device
                layer.held = HeldTokens.none(self._model.spec, self.batch, device, round_bfloat16, self._store)
        return state


class ReferenceEngine:
    """Implements `runtime.engine.Engine` with torch.

    threads sets torch's threads (for the process). device: a torch device name. state_dtype: what the recurrent state
    is stored in, by Mamba-2 every 16 tokens, by Mamba-1 after each, whose tokens therefore run one by one. activations:
    float32 or int8, by default what the checkpoint says; with int8 the input of every matrix that is not all floats is
    rounded, one scale a token unless the matrix says otherwise. UserError for other types and for weights that are not
    finite.
    """

    name = "reference"

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        threads: int | None = None,
        state_dtype: str = "float32",
        activations: str | None = None,
        device: str = "cpu",
    ) -> None:
        activations = activations or checkpoint.numerics.get("activations", "float32")
        if activations not in ("float32", "int8"):
            raise UserError(f"backend reference computes with float32 or int8 activations, not {activations}")
        if state_dtype not in ROUND:
            raise UserError(f"state dtype {state_dtype!r} is unknown, known are {', '.join(ROUND)}")
        self._round = ROUND[state_dtype]
        if threads is not None:
            torch.set_num_threads(threads)
        self.spec: ModelSpec = checkpoint.spec
        self.model = SSMForCausalLM(self.spec)
        load_weights(self.model, checkpoint)
        self.model.requires_grad_(False).eval().to(device)
        self._head_input = self._round_inputs(checkpoint, device) if activations == "int8" else None
        for i, name in enumerate(scan_scales(self.spec, checkpoint.numerics) if activations == "int8" else ()):
            scale = torch.from_numpy(checkpoint.vector(name)).to(device)
            mixer: Any = self.model.backbone.layers[i].mixer
            mixer.round_scan = ScanRounding(scale)
        if self.spec.architecture == "mamba2":
            self.model.set_chunk_size(min(SCAN_CHUNK, self.spec.chunk_size))
        self._device = torch.device(device)

    def new_state(self, batch: int = 1) -> TorchState:
        """An empty state for `batch` sequences."""
        if batch < 1:
            raise UserError(f"batch is {batch}, it must be at least 1")
        return TorchState(self.model, batch, self._round)

    @torch.inference_mode()
    def forward(self, ids: np.ndarray, state: TorchState) -> np.ndarray:
        """int32 [B, L] -> float32 logits [B, L, V]; continues from `state` and moves it on by L tokens."""
        return self._head(self._features(self._ids(ids, state), state))

    @torch.inference_mode()
    def prefill(self, ids: np.ndarray, state: TorchState) -> np.ndarray:
        """int32 [B, L] -> float32 logits of the last position [B, V], in pieces of `CHUNK` positions."""
        x = self._ids(ids, state)
        if not x.shape[1]:
            raise UserError("the prompt is empty; prefill needs at least one token")
        for piece in x.split(CHUNK, dim=1):
            last = self._features(piece, state)[:, -1]
        return self._head(last)

    @torch.inference_mode()
    def nll(self, ids: np.ndarray, targets: np.ndarray, state: TorchState) -> np.ndarray:
        """int32 [B, L] twice -> float64 negative log-likelihoods [B, L] in nats."""
        if np.shape(ids) != np.shape(targets):
            raise UserError(f"ids are {list(np.shape(ids))} but targets are {list(np.shape(targets))}")
        x, y = self._ids(ids, state), self._ids(targets, state)
        out = []
        for piece, target in zip(x.split(CHUNK, dim=1), y.split(CHUNK, dim=1), strict=True):
            logits = self._logits(self._features(piece, state))
            out.append(
                F.cross_entropy(logits.double().flatten(0, 1), target.flatten(), reduction="none").view_as(target)
            )
        return torch.cat(out, dim=1).cpu().numpy()

    def generate(
        self, prompt: np.ndarray, state: TorchState, params: SamplingParams, *, stride: int = 1
    ) -> Iterator[np.ndarray]:
        """int32 prompt [B, L] -> new ids in pieces [B, <= stride]; -1 pads a sequence that met a stop id.

        The state takes in the prompt and every new id but the last of each sequence (in a batch, a sequence that ended
        early takes in id 0 for its padding).
        """
        if stride < 1:
            raise UserError(f"stride is {stride}, it must be at least 1")
        logits = self.prefill(prompt, state)
        sampler = Sampler(params, prompt)
        ids = sampler.step(logits)
        piece = [ids]
        while not sampler.done:
            if len(piece) == stride:
                yield np.stack(piece, axis=1)
                piece = []
            logits = self.prefill(np.maximum(ids, 0)[:, None], state)
            ids = sampler.step(logits)
            piece.append(ids)
        yield np.stack(piece, axis=1)

    def _ids(self, ids: np.ndarray, state: TorchState) -> torch.Tensor:
        ids = np.asarray(ids)
        if ids.ndim != 2 or len(ids) != state.batch:
            raise UserError(f"ids must be [{state.batch}, length] for this state, not {list(ids.shape)}")
        return torch.from_numpy(check_ids(ids, self.spec.vocab_size).astype(np.int64)).to(self._device)

    def _features(self, x: torch.Tensor, state: TorchState) -> torch.Tensor:
        if self._round is None or self.spec.architecture == "mamba2":
            whole: torch.Tensor = self.model.backbone(x, state.inner)
            return whole
        pieces = []
        for token in x.split(1, dim=1):
            pieces.append(self.model.backbone(token, state.inner))
            for layer in state.inner.layers:
                layer.ssm = self._round(layer.ssm)
        return torch.cat(pieces, dim=1)

    def _round_inputs(self, checkpoint: Checkpoint, device: str) -> InputRounding | None:
        """Rounds what enters the projections; returns what rounds the head's input (None where the head is float)."""
        found: dict[str, InputRounding] = {}
        for name, layout in checkpoint.layouts.items():
            if not layout.takes_int8:
                continue
            found[name] = InputRounding(layout, checkpoint.matrix(name).arrays, device)
            if name not in ("backbone.embeddings", "lm_head"):
                self.model.get_submodule(name).register_forward_pre_hook(found[name])
        return found.get(checkpoint.head)

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        if self._head_input is not None:
            features = self._head_input(None, (features,))
        return self.model.head(features)

    def _head(self, features: torch.Tensor) -> np.ndarray:
        out: np.ndarray = self._logits(features).float().cpu().numpy()
        return out
