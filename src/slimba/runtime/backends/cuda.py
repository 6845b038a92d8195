"""CudaEngine: a checkpoint on an NVIDIA GPU, weights packed as they are on disk. Needs torch (memory, graphs, cuBLAS).

Small batches decode by fused kernels in one CUDA graph (cuda_step.py), prompts and large batches run in bulk
(cuda_bulk.py). Run the tests: `pytest tests/runtime/test_cuda_engine.py` (the kernels on a processor), `pytest -m gpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.errors import UserError
from slimba.models.spec import ModelSpec
from slimba.runtime.engine import SamplingParams
from slimba.runtime.sampling import Sampler
from slimba.runtime.scoring import check_ids

try:
    import torch

    from slimba.kernels.cuda.compiler import CudaUnavailable
    from slimba.runtime.backends.cuda_batch import BatchStep
    from slimba.runtime.backends.cuda_broad_step import BroadStep
    from slimba.runtime.backends.cuda_bulk import CHUNK, Bulk
    from slimba.runtime.backends.cuda_device import Gpu, open_gpu
    from slimba.runtime.backends.cuda_eight import EightStep
    from slimba.runtime.backends.cuda_model import CudaModel
    from slimba.runtime.backends.cuda_one import OneStep
    from slimba.runtime.backends.cuda_state import STATE_CODES, CudaState, StatePointers
    from slimba.runtime.backends.cuda_step import BulkStep, FusedStep, Step
except ModuleNotFoundError as e:
    if e.name != "torch":
        raise
    raise UserError('backend cuda needs torch with CUDA; pip install "slimba[gpu]", or use --backend cpu') from None

__all__ = ["CudaEngine", "CudaState", "CudaUnavailable"]

LOGIT_FLOATS = 1 << 27  # most logits made at once by `nll`
NOT_FINITE, ASK_HOST = -2, -3  # instead of an id: of kernels/cuda/decode.cu and sample.cu
GRAPH_TOKENS, MOST_GRAPHS = 2048, 4  # of a recorded piece of a prompt; of pieces


AHEAD, AHEAD_BATCH = 8, 8  # steps of a graph, and of how many sequences at most: between graphs the GPU waits a little


def steps_of(step: Step) -> None:
    """AHEAD steps, each choosing the ids of the next."""
    for i in range(AHEAD):
        step.work(choose=True, follows=i > 0)


class PromptGraph:
    """The bulk pass over a piece of a prompt of one shape, recorded as a CUDA graph."""

    def __init__(self, bulk: Bulk, gpu: Gpu, piece: torch.Tensor, state: CudaState) -> None:
        self._ids = piece.clone()
        self._pointers = StatePointers(state.pointers.arrays.clone(), state.pointers.slots.clone())
        self._replay = gpu.record(lambda: self._work(bulk))

    def _work(self, bulk: Bulk) -> None:
        self._out = bulk.residual(self._ids, self._pointers, chunked=True)

    def run(self, piece: torch.Tensor, state: CudaState) -> torch.Tensor:
        """The residual stream, which the next replay overwrites."""
        self._ids.copy_(piece)
        self._pointers.arrays.copy_(state.pointers.arrays)
        self._pointers.slots.copy_(state.pointers.slots)
        self._replay()
        return self._out


class CudaEngine:
    """Implements `runtime.engine.Engine`.

    state_dtype: float32, bfloat16 or int8, the recurrent state between tokens. activations: float32 or int8, what
    enters the products; by default what the checkpoint says. gpu: a device other than the first one.
    exact: products of bulk passes in float32, for checks. UserError for what the engine cannot run, CudaUnavailable
    (a UserError) where there is no GPU that can.
    """

    name = "cuda"

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        state_dtype: str = "float32",
        activations: str | None = None,
        gpu: Gpu | None = None,
        exact: bool = False,
    ) -> None:
        activations = activations or checkpoint.numerics.get("activations", "float32")
        if activations not in ("float32", "int8"):
            raise UserError(f"activations {activations!r} are unknown, known are float32 and int8")
        if activations == "int8" and checkpoint.numerics.get("ssm_inputs", "float32") != "float32":
            raise UserError(
                "backend cuda does not round what enters the scan, which the file asks for (ssm_inputs int8);"
                " use --activations float32 or --backend cpu"
            )
        if state_dtype not in STATE_CODES:
            raise UserError(f"state dtype {state_dtype!r} is unknown, known are {', '.join(STATE_CODES)}")
        most = 256 if checkpoint.spec.architecture == "mamba2" else 128
        if checkpoint.spec.d_state > most or checkpoint.spec.d_conv > 8:
            raise CudaUnavailable(f"backend cuda takes states of at most {most} entries and at most 8 convolution taps")
        self.gpu = gpu or open_gpu()
        self.spec: ModelSpec = checkpoint.spec
        self.state_dtype, self.activations = state_dtype, activations
        free = self.gpu.free_bytes()
        if free is not None and checkpoint.nbytes() * 1.3 + (1 << 28) > free:
            need, have = (checkpoint.nbytes() * 1.3 + (1 << 28)) / 1e9, free / 1e9
            raise CudaUnavailable(f"the model needs about {need:.1f} GB of GPU memory and {have:.1f} GB are free")
        self.model = CudaModel(checkpoint, self.gpu, activations)
        self._exact = exact
        self._bulk = Bulk(self.model, self.gpu, state_dtype, exact=exact)
        self._steps: dict[int, Step] = {}
        self._graphs: dict[tuple[object, ...], Callable[[], None]] = {}
        self._prompts: dict[tuple[int, int], PromptGraph | None] = {}  # None: seen once

    def new_state(self, batch: int = 1) -> CudaState:
        if batch < 1:
            raise UserError(f"batch is {batch}, it must be at least 1")
        need, free = CudaState.nbytes(self.spec, batch, self.state_dtype), self.gpu.free_bytes()
        if free is not None and need > free:
            raise UserError(
                f"the state of {batch} sequences needs {need / 1e9:.1f} GB but {free / 1e9:.1f} GB are free"
            )
        return CudaState(self.spec, batch, self.state_dtype, self.gpu.device)

    def forward(self, ids: np.ndarray, state: CudaState) -> np.ndarray:
        """int32 [B, L] -> float32 logits [B, L, V]."""
        x = self._ids(ids, state)
        out = np.empty((*x.shape, self.spec.vocab_size), np.float32)
        for at, piece, u in self._pieces(x, state, LOGIT_FLOATS // self.spec.vocab_size):
            logits = self._bulk.logits(u).view(*piece.shape, -1)
            out[:, at : at + piece.shape[1]] = logits.cpu().numpy()
        return out

    def prefill(self, ids: np.ndarray, state: CudaState) -> np.ndarray:
        """int32 [B, L] -> float32 logits of the last position [B, V], in bounded memory for any L."""
        return np.asarray(self._prefill(self._ids(ids, state), state).cpu().numpy())

    def nll(self, ids: np.ndarray, targets: np.ndarray, state: CudaState) -> np.ndarray:
        """int32 [B, L] twice -> float64 negative log-likelihoods [B, L] in nats."""
        if np.shape(ids) != np.shape(targets):
            raise UserError(f"ids are {list(np.shape(ids))} but targets are {list(np.shape(targets))}")
        x, y = self._ids(ids, state), self._ids(targets, state).long()
        out = np.empty(x.shape, np.float64)
        for at, piece, u in self._pieces(x, state, LOGIT_FLOATS // self.spec.vocab_size // 4):
            logits = self._bulk.logits(u).double()
            if not bool(torch.isfinite(logits).all()):
                raise UserError("the logits hold NaN or infinity: the weights are damaged or the state has overflowed")
            target = y[:, at : at + piece.shape[1]].reshape(-1)
            loss = torch.logsumexp(logits, 1) - logits.gather(1, target[:, None])[:, 0]
            out[:, at : at + piece.shape[1]] = loss.view(piece.shape).cpu().numpy()
        return out

    def generate(
        self, prompt: np.ndarray, state: CudaState, params: SamplingParams, *, stride: int = 1
    ) -> Iterator[np.ndarray]:
        """int32 prompt [B, L] -> new ids in pieces [B, <= stride]; -1 pads a sequence that met a stop id."""
        if stride < 1:
            raise UserError(f"stride is {stride}, it must be at least 1")
        if params.n_valid > self.spec.vocab_size:
            raise UserError(f"n_valid is {params.n_valid} but the model has {self.spec.vocab_size} ids")
        logits = self._prefill(self._ids(prompt, state), state)
        sampler = Sampler(params, prompt)
        ids = sampler.step(logits.cpu().numpy())
        ahead = params.repetition_penalty == 1
        piece = [ids]
        while not sampler.done:
            if len(piece) == stride:
                yield np.stack(piece, axis=1)
                piece = []
            if ahead:
                piece += self._run_ahead(piece[-1] if piece else ids, state, sampler, stride - len(piece))
            else:
                piece.append(self._by_host(ids, state, sampler))
            ids = piece[-1]
        yield np.stack(piece, axis=1)

    def _by_host(self, ids: np.ndarray, state: CudaState, sampler: Sampler) -> np.ndarray:
        return sampler.step(self.step(np.maximum(ids, 0), state).cpu().numpy())

    def _run_ahead(self, ids: np.ndarray, state: CudaState, sampler: Sampler, most: int) -> list[np.ndarray]:
        """Up to `most` steps without a look in between. Steps beyond the last stop id, and from a token on that the GPU
        leaves to the host, are taken back, so that the state has seen every new id but the last."""
        params = sampler.params
        count = min(most, params.max_new_tokens - sampler.n, Step.ROOM)
        certain = params.temperature == 0 and (not params.stop_ids or count == 1)
        saved = None if certain else state.clone()
        chosen = self._steps_ahead(ids, state, count, params, sampler.n)
        good = next((t for t, column in enumerate(chosen.T) if (column[~sampler.ended] == ASK_HOST).any()), count)
        out: list[np.ndarray] = []
        for column in chosen.T[:good]:
            out.append(sampler.accept(column))
            if sampler.done:
                break
        if saved is None or len(out) == count:
            return out
        state.restore(saved)
        if out:
            self._steps_ahead(ids, state, len(out), params, sampler.n - len(out))
        if not sampler.done:
            out.append(self._by_host(out[-1] if out else ids, state, sampler))
        return out

    def _steps_ahead(
        self, ids: np.ndarray, state: CudaState, count: int, params: SamplingParams, first: int
    ) -> np.ndarray:
        """The ids that `count` steps choose after `ids`, as tokens `first` and on: int32 [B, count], ASK_HOST where the
        host must sample and the rest is void. UserError where logits are not finite."""
        step = self.stepper(state)
        step.allow(params.n_valid)
        step.sample_by(None if params.temperature == 0 else params)
        if step.samples:
            step.first_token(first)
        step.count.zero_()
        step.ids.copy_(torch.from_numpy(np.maximum(ids, 0).astype(np.int32)))
        self.run_ahead(step, count)
        chosen: np.ndarray = step.chosen[:, :count].cpu().numpy()
        if (chosen == NOT_FINITE).any():
            raise UserError("the logits hold NaN or infinity: the weights are damaged or the state has overflowed")
        return chosen

    def step(self, ids: np.ndarray, state: CudaState) -> torch.Tensor:
        """int32 [B] -> float32 logits [B, V] on the device (overwritten by the next step); one token each."""
        step = self.stepper(state)
        step.ids.copy_(torch.from_numpy(np.asarray(ids, np.int32)))
        self.run(step, choose=False)
        return step.logits

    def arithmetic(self, batch: int) -> str:
        """What the products of a step of `batch` sequences take their inputs in, once there has been one."""
        return self._steps[batch].arithmetic

    def stepper(self, state: CudaState) -> Step:
        """The step for this batch size, pointed to `state`."""
        batch = state.batch
        if batch not in self._steps:
            if OneStep.fits(self.model, self.gpu, batch) and not self._exact:
                self._steps[batch] = OneStep(self.model, self.gpu, batch, self.state_dtype)
            elif EightStep.fits(self.model, self.gpu, batch) and not self._exact:
                self._steps[batch] = EightStep(self.model, self.gpu, batch, self.state_dtype)
            elif batch >= BroadStep.FEWEST and BroadStep.fits(self.model, self.gpu) and not self._exact:
                self._steps[batch] = BroadStep(self.model, self.gpu, batch, self.state_dtype, self._bulk)
            elif batch > 1 and BatchStep.fits(self.model, self.gpu, batch) and not self._exact:
                self._steps[batch] = BatchStep(self.model, self.gpu, batch, self.state_dtype, self._bulk)
            elif FusedStep.fits(self.model, self.gpu, batch):
                self._steps[batch] = FusedStep(self.model, self.gpu, batch, self.state_dtype)
            else:
                self._steps[batch] = BulkStep(self.model, self.gpu, batch, self._bulk)
        self._steps[batch].point_to(state)
        return self._steps[batch]

    def run(self, step: Step, *, choose: bool) -> None:
        """One step; the second and later ones of a kind replay a CUDA graph."""
        key = step.batch, choose, step.samples
        if key in self._graphs:
            return self._graphs[key]()
        step.work(choose=choose)
        self._graphs[key] = self.gpu.record(lambda: step.work(choose=choose))

    def run_ahead(self, step: Step, count: int) -> None:
        """`count` steps, each choosing the ids of the next; of few sequences many steps in one CUDA graph."""
        key = step.batch, True, step.samples
        while count > 0:
            if count < AHEAD or step.batch > AHEAD_BATCH or key not in self._graphs:
                self.run(step, choose=True)
                count -= 1
                continue
            many = (*key, AHEAD)
            if many not in self._graphs:
                self._graphs[many] = self.gpu.record(lambda: steps_of(step))
            self._graphs[many]()
            count -= AHEAD

    def _prefill(self, x: torch.Tensor, state: CudaState) -> torch.Tensor:
        if not x.shape[1]:
            raise UserError("the prompt is empty: prefill needs at least one token")
        length = max(1, CHUNK // state.batch)
        for at in range(0, x.shape[1], length):
            piece = x[:, at : at + length]
            last = self._prompt(piece, state).view(*piece.shape, -1)[:, -1]
        return self._bulk.logits(last)

    def _prompt(self, piece: torch.Tensor, state: CudaState) -> torch.Tensor:
        """The residual stream of a piece of a prompt. A shape that comes again is recorded as a CUDA graph, because
        launching takes longer than a short piece."""
        shape = piece.shape[0], piece.shape[1]
        if self.gpu.device.type != "cuda" or piece.numel() > GRAPH_TOKENS or shape not in self._prompts:
            if len(self._prompts) < MOST_GRAPHS:
                self._prompts.setdefault(shape, None)
            return self._bulk.residual(piece, state.pointers, chunked=True)
        graph = self._prompts[shape]
        if graph is None:
            graph = self._prompts[shape] = PromptGraph(self._bulk, self.gpu, piece, state)
        return graph.run(piece, state)

    def _pieces(
        self, x: torch.Tensor, state: CudaState, tokens: int
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(first position, ids, residual stream) of pieces of at most `tokens` tokens of all sequences."""
        length = max(1, min(CHUNK, tokens) // max(1, state.batch))
        for at in range(0, x.shape[1], length):
            piece = x[:, at : at + length]
            yield at, piece, self._bulk.residual(piece, state.pointers)

    def _ids(self, ids: np.ndarray, state: CudaState) -> torch.Tensor:
        ids = np.asarray(ids)
        if ids.ndim != 2 or len(ids) != state.batch:
            raise UserError(f"ids must be [{state.batch}, length] for this state, not {list(ids.shape)}")
        return torch.from_numpy(check_ids(ids, self.spec.vocab_size).astype(np.int32)).to(self.gpu.device)
