"""One small comparison for each kernel family of the CUDA engine: `cuda_check.py --only quick [--part mixer,codes]`.

    PARTS["mixer"].compare(gpu)     # what was found, in words; AssertionError for a wrong result

At odd sizes against the NumPy twins, each in a few seconds, so that compute-sanitizer gets through (scripts/
compute_sanitizer.sh). `kernels` names the files under kernels/cuda that a part runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from cuda_kernels import (
    close,
    codes_products,
    dot_products,
    expansions,
    few_products,
    lean_products,
    mid_products,
    products,
    stream_products,
    turns,
)
from torch.overrides import TorchFunctionMode

from kernels.cuda_cases import SPECS
from runtime.numpy_reference import NumpyModel, mamba2_spec, random_checkpoint
from runtime.stored_states import StoredModel
from slimba.runtime import measure
from slimba.runtime.backends.cuda import CudaEngine
from slimba.runtime.backends.cuda_device import Gpu
from slimba.runtime.engine import SamplingParams


class FloatProducts(TorchFunctionMode):
    """torch's float16 products in float32, by kernels of cuBLAS without products of warpgroups: racecheck broke down at
    the others, before our own kernels behind them (docs/log.md)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in PRODUCTS_OF_TORCH or not any(getattr(a, "dtype", None) == torch.float16 for a in args):
            return func(*args, **kwargs)
        out_dtype, out = kwargs.pop("out_dtype", torch.float16), kwargs.pop("out", None)
        given = torch.matmul if len(args) == 2 else torch.addmm
        result = given(*(a.float() for a in args)).to(out_dtype)
        return result if out is None else out.copy_(result)


PRODUCTS_OF_TORCH = (torch.mm, torch.addmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


def plain(gpu: Gpu, *, warpgroups: bool = False) -> Gpu:
    """The GPU without kernels for each shape, whose compilation would take most of the time of small checks."""
    return Gpu(
        gpu.device, gpu.module, gpu.blocks, gpu.shared, overlap=gpu.overlaps, warpgroups=warpgroups and gpu.warpgroups
    )


def steps_of_one(gpu: Gpu) -> str:
    """The kernels that are made for a model, and the head that chooses and embeds: prompt and greedy tokens by two sets
    of kernels, past the token that stores the state."""
    spec = mamba2_spec(d_model=512, d_inner=1024, headdim=64, d_state=128, n_layer=1, vocab_size=530)
    worst, texts = 0.0, []
    for format in ("dfssm", "w4a16"):
        checkpoint = measure.random_model(spec, format)
        ids = np.random.default_rng(0).integers(0, 530, (1, 24)).astype(np.int32)
        got = []
        for device in (plain(gpu), gpu):
            engine = CudaEngine(checkpoint, gpu=device, state_dtype="int8")
            state = engine.new_state()
            engine.prefill(ids[:, :5], state)
            got.append(np.stack([engine.step(ids[:, t], state)[0].cpu().numpy().copy() for t in range(5, 24)]))
            params = SamplingParams(max_new_tokens=12)
            pieces = list(engine.generate(ids, engine.new_state(), params, stride=16))
            texts.append(np.concatenate(pieces, axis=1)[0].tolist())
        worst = max(worst, close(got[1], got[0], 1e-2 * float(np.abs(got[0]).max())))
        assert texts[-1] == texts[-2], f"{format}: {texts[-1]} for {texts[-2]}"
    return f"largest difference {worst:.2g}, the same tokens"


def steps_of_any(gpu: Gpu) -> str:
    """Bulk in pieces and fused steps of a shape nothing is made for."""
    found = [small_engine(name, "mixed", 3, True, gpu) for name in ("odd", "two-groups")]
    return "; ".join(found)


def small_engine(name: str, format: str, batch: int, exact: bool, gpu: Gpu) -> str:
    """Bulk in pieces, then fused steps, the second and later ones from a graph; also with ordinary launches."""
    checkpoint = random_checkpoint(SPECS[name], 1, format)
    ids = np.random.default_rng(0).integers(0, checkpoint.spec.vocab_size, (batch, 44)).astype(np.int32)
    engine = CudaEngine(checkpoint, gpu=plain(gpu), exact=exact)
    state = engine.new_state(batch)
    pieces = [engine.forward(ids[:, a:b], state) for a, b in ((0, 1), (1, 3), (3, 25), (25, 38))]
    pieces += [engine.step(ids[:, t], state).cpu().numpy()[:, None].copy() for t in range(38, 44)]
    got = np.concatenate(pieces, axis=1)
    want = np.stack([NumpyModel(checkpoint).logits(row) for row in ids])
    bulk = close(got[:, :38], want[:, :38], 5e-5 if exact else 3e-2)
    return f"bulk {bulk:.2g}, steps {close(got[:, 38:], want[:, 38:], 5e-5 if exact else 3e-2):.2g}"


def chunks(gpu: Gpu, d_state: int = 128, state_dtype: str = "int8") -> str:
    """The chunked recurrence over whole and partial chunks, from an empty state and from one."""
    spec = mamba2_spec(headdim=64, d_inner=256, d_state=d_state, n_groups=2)
    return _prompts(plain(gpu), spec, state_dtype, (170, 399), 3e-2, 3e-2 if state_dtype == "float32" else 0.1)


def mixers(gpu: Gpu, heads: int = 64) -> str:
    """mixer.cu, of prompts whose lengths are no multiples of a chunk: with the shape of a 1.3B layer's heads, the gate
    inside and states in int8; and with the gate elsewhere, states in float32."""
    device = plain(gpu, warpgroups=True)
    if not device.warpgroups:
        return "not for this GPU"
    one = mamba2_spec(headdim=64, d_inner=64 * heads, d_state=128, n_layer=1, norm_group_size=64 * heads)
    other = mamba2_spec(headdim=64, d_inner=256, d_state=64, n_groups=2, n_layer=1, norm_before_gate=True)
    found = [
        _prompts(device, one, "int8", (203, 280), 3e-2, 0.1),
        _prompts(device, other, "float32", (33, 101), 3e-2, 3e-2),
    ]
    return "; ".join(found)


def _prompts(gpu: Gpu, spec: Any, state_dtype: str, ends: tuple[int, int], tolerance: float, after: float) -> str:
    """A prompt in two pieces and a token after it, two sequences, against the recurrence."""
    checkpoint = random_checkpoint(spec, 8, "float32")
    ids = np.random.default_rng(6).integers(0, 67, (2, ends[1] + 1)).astype(np.int32)
    engine = CudaEngine(checkpoint, state_dtype=state_dtype, gpu=gpu)
    state = engine.new_state(2)
    engine.prefill(ids[:, : ends[0]], state)
    got = engine.prefill(ids[:, ends[0] : ends[1]], state)
    stepped = engine.step(ids[:, -1], state).cpu().numpy()
    want = np.stack([NumpyModel(checkpoint).logits(row) for row in ids])
    return f"prefill {close(got, want[:, -2], tolerance):.2g}, step {close(stepped, want[:, -1], after):.2g}"


def batches(gpu: Gpu, state_dtype: str) -> str:
    """The kernels for tens of sequences, each elsewhere in its buffer, past the token that stores the state."""
    spec = mamba2_spec(headdim=64, d_inner=512, d_state=128, n_groups=2, n_layer=1, norm_group_size=256)
    checkpoint = random_checkpoint(spec, 8, "mixed")
    got, ids = _steps_of_many(plain(gpu), checkpoint, state_dtype, 20)
    models = [NumpyModel(checkpoint) if state_dtype == "float32" else StoredModel(checkpoint, state_dtype) for _ in ids]
    want = np.stack([m.logits(ids[b, : 28 + b])[8 + b :] for b, m in enumerate(models)])
    return f"largest difference {close(got, want, 2e-2 if state_dtype == 'float32' else 8e-2):.2g}"


def broad_steps(gpu: Gpu, state_dtype: str) -> str:
    """The same by warpgroups, against the kernels above; with int8 states also by flow.cu, and codes by the norm."""
    from slimba.runtime.backends.cuda_broad import Broad
    from slimba.runtime.backends.cuda_broad_step import BroadStep

    if not gpu.warpgroups:
        return "not for this GPU"
    spec = mamba2_spec(d_model=64, headdim=64, d_inner=2048, d_state=128, n_layer=1, norm_group_size=2048)
    checkpoint = measure.random_model(spec, "dfssm")
    want, _ = _steps_of_many(plain(gpu), checkpoint, state_dtype, 10)
    worst, kept = 0.0, (BroadStep.FLOW, BroadStep.FLOW_FILLS, BroadStep.BROAD_HEAD_FROM, Broad.CODES_BY_NORM)
    for fours in ((), (4,)) if state_dtype == "int8" else ((),):
        try:
            BroadStep.FLOW, BroadStep.FLOW_FILLS, BroadStep.BROAD_HEAD_FROM = fours, 0.0, 2  # type: ignore[assignment]
            Broad.CODES_BY_NORM = range(99 if fours else 0)
            got, _ = _steps_of_many(gpu, checkpoint, state_dtype, 10, "BroadStep")
        finally:
            BroadStep.FLOW, BroadStep.FLOW_FILLS, BroadStep.BROAD_HEAD_FROM, Broad.CODES_BY_NORM = kept
        most = float(np.abs(want).max())
        worst = max(worst, close(got, want, (2e-3 if state_dtype == "float32" else 1e-2) * most) / most)
    return f"largest difference {worst:.2g} of the largest logit"


def steps_of_eight(gpu: Gpu) -> str:
    """The three kernels a layer for up to 32 sequences, two layers with other columns in the second plane, against the
    kernels for tens. On a processor, where the others take eight minutes, three sequences alone."""
    more = [] if gpu.device.type == "cpu" else [("float32", 8), ("int8", 11), ("int8", 19)]
    return _steps_by(gpu, 40, ("BatchStep", "EightStep"), [("int8", 3), *more], 4e-3)


def steps_of_digits(gpu: Gpu) -> str:
    """Steps of one sequence whose out_proj leaves digits, likewise."""
    return _steps_by(gpu, 60, ("FusedStep", "OneStep"), [("float32", 1), ("int8", 1)], 1e-3)


def _steps_by(gpu: Gpu, blocks: int, kinds: tuple[str, str], cases: list[tuple[str, int]], exact: float) -> str:
    """Two kinds of step against each other, the first by the kernels for any model. cases: types of the states and
    numbers of sequences; exact: largest difference with float32 states, of the largest logit."""
    if gpu.device.type == "cpu":  # whose few blocks would have too many tiles each
        gpu = Gpu(gpu.device, gpu.module, blocks, gpu.shared, bakes=gpu.bakes)
    spec = mamba2_spec(d_model=2048, headdim=64, d_inner=2048, d_state=128, n_layer=2, norm_group_size=2048)
    checkpoint, worst = measure.random_model(spec, "dfssm"), 0.0
    for state_dtype, batch in cases:
        want, _ = _steps_of_many(plain(gpu), checkpoint, state_dtype, 10, kinds[0], batch)
        got, _ = _steps_of_many(gpu, checkpoint, state_dtype, 10, kinds[1], batch)
        most = float(np.abs(want).max())
        worst = max(worst, close(got, want, (exact if state_dtype == "float32" else 2e-2) * most) / most)
    return f"largest difference {worst:.2g} of the largest logit"


def _steps_of_many(
    gpu: Gpu, checkpoint: Any, state_dtype: str, count: int, kind: str = "BatchStep", batch: int = 9
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [batch, count, V] of steps after prompts of 8, 9 ... tokens; and all ids."""
    ids = np.random.default_rng(6).integers(0, 67, (batch, 40)).astype(np.int32)
    engine = CudaEngine(checkpoint, state_dtype=state_dtype, gpu=gpu)
    pool = engine.new_state(batch)
    for b in range(batch):
        engine.prefill(ids[b : b + 1, : 8 + b], pool.view([b]))
    each = range(batch)
    steps = [engine.step(ids[each, [8 + t + b for b in each]], pool).cpu().numpy().copy() for t in range(count)]
    assert type(engine.stepper(pool)).__name__ == kind
    return np.stack(steps, axis=1), ids


def draws(gpu: Gpu) -> str:
    """slimba_sample over a real vocabulary against the NumPy reference."""
    from slimba.runtime.sampling import sample

    rng = np.random.default_rng(0)
    engine = CudaEngine(random_checkpoint(mamba2_spec(vocab_size=50288, d_model=8, n_layer=1)), gpu=plain(gpu))
    step = engine.stepper(engine.new_state(8))
    same = asked = 0
    for k, (top_k, top_p) in enumerate([(0, 1.0), (50, 1.0), (0, 0.9), (0, 0.5)]):
        logits = (rng.standard_normal((8, 50288)) * 2.5).astype(np.float32)
        params = [SamplingParams(temperature=0.8, top_k=top_k, top_p=top_p, seed=b) for b in range(8)]
        step.sample_by(params)
        step.first_token(k)
        step.count.zero_()
        step.logits.copy_(torch.from_numpy(logits))
        step.after(True)
        got = step.chosen[:, 0].tolist()
        want = [sample(row, (), p, b, k) for b, (row, p) in enumerate(zip(logits, params, strict=True))]
        same += sum(g == w for g, w in zip(got, want, strict=True))
        asked += got.count(-3)
    assert same + asked == 32, f"{same} of 32 draws are the reference's, {asked} are left to the host"
    return f"{same} of 32 draws are the reference's, {asked} left to the host"


class Part(NamedTuple):
    compare: Callable[[Gpu], str]
    kernels: str  # files of kernels/cuda


PARTS: dict[str, Part] = {
    "products": Part(functools.partial(products, few=True), "generic.cu matrix.cuh product.cuh tiles.cuh"),
    "lean": Part(lean_products, "lean.cuh rows.cuh"),
    "dot": Part(dot_products, "dot.cuh still.cu"),
    "codes": Part(codes_products, "codes.cuh turn.cuh"),
    "stream": Part(stream_products, "stream.cuh ring.cuh"),
    "few": Part(few_products, "few.cu"),
    "mid": Part(functools.partial(mid_products, few=True), "mid.cu mid_norm.cu many.cu"),
    "turn": Part(turns, "turn.cu"),
    "expand": Part(expansions, "expand.cu"),
    "one": Part(steps_of_one, "decode.cu step.cuh quick.cuh choice.cuh"),
    "any": Part(steps_of_any, "bulk.cu scan.cu span.cuh"),
    "mamba1": Part(lambda gpu: small_engine("falcon", "mixed", 2, True, gpu), "scan1.cu"),
    "chunks": Part(chunks, "ssd.cu"),
    "mixer": Part(mixers, "mixer.cu warpgroup.cuh"),
    "batches-float32": Part(lambda gpu: batches(gpu, "float32"), "batch.cu"),
    "batches-int8": Part(lambda gpu: batches(gpu, "int8"), "batch.cu"),
    "broad-float32": Part(lambda gpu: broad_steps(gpu, "float32"), "broad.cu broad_norm.cu steps.cu"),
    "broad-int8": Part(lambda gpu: broad_steps(gpu, "int8"), "steps.cu flow.cu store.cuh"),
    "eight": Part(steps_of_eight, "eight.cuh steps.cu image.cuh"),
    "digits": Part(steps_of_digits, "one.cuh quick.cuh dot.cuh"),
    "draws": Part(draws, "sample.cu"),
}
