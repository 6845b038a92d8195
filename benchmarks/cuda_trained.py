"""Trained models on the CUDA engine against the torch reference on the same text, for cuda_check.py: the packed 25M
model, and the bundled teacher quantised to `w8a8` and `w4a8` on the spot. Random weights show less (docs/log.md).
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from cuda_kernels import close

from runtime.trained_layers import ALLOWED, compare_layers, rms
from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.reader import open_checkpoint
from slimba.runtime.backends.cuda import CudaEngine
from slimba.runtime.backends.cuda_device import Gpu
from slimba.runtime.backends.cuda_speed import SHAKEN, shake
from slimba.runtime.backends.reference import ReferenceEngine

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ROOT / "src/slimba/assets/demo-text"
TOKENS, STEPPED = 1024, 256


def real_text(model: Path, count: int = TOKENS + 1) -> np.ndarray:
    from slimba.data.tokenizer import Tokenizer

    text = (TEXTS / "heldout.txt").read_text(encoding="utf-8")[: count * 8]
    return np.array(Tokenizer.from_file(model / "tokenizer.json").encode(text)[:count], np.int32)


def quantised(mode: str, folder: Path) -> Path:
    """The bundled teacher by quamba2 with few windows, in `folder`."""
    import slimba

    out = folder / mode
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(sys.stdout):
        slimba.compress(
            "demo-teacher", out, method="quamba2", data=[TEXTS / "train.txt"], device="cpu", mode=mode, windows=4,
            check_windows=0, window=256,
        )  # fmt: skip
    return out


def packed_model(path: Path, gpu: Gpu) -> str:
    """With float32 activations: bulk and step by step."""
    checkpoint, ids = open_checkpoint(path), real_text(path)
    want = _logits(checkpoint, "float32", ids, gpu)
    parts = []
    for name, got in _ours(CudaEngine(checkpoint, activations="float32", gpu=gpu), ids).items():
        tolerance = 0.15 if name == "bulk" else 2e-3
        parts.append(f"{name}: {_agreement(name, got, want, ids, tolerance, 0.99)}")
    return "; ".join(parts)


def int8_model(path: Path, gpu: Gpu) -> str:
    """With int8 activations. Every code that flips moves what follows (cuda_speed.py), so logits may differ by twice as
    much as the reference's own when its input is off in the last place. Perplexity as without."""
    checkpoint, ids = open_checkpoint(path), real_text(path)
    reference = ReferenceEngine(checkpoint, activations="int8", device=str(gpu.device))
    run = lambda: reference.forward(ids[None, :-1], reference.new_state())[0]  # noqa: E731
    want, plain = run(), _logits(checkpoint, "float32", ids, gpu)
    parts = [f"int8 moves by {rms(want - plain):.2g}, argmax agrees at {_same(plain, want):.4f}"]
    for name, got in _ours(CudaEngine(checkpoint, activations="int8", gpu=gpu), ids).items():
        n = len(got)
        shaken = shake(reference, run, SHAKEN["prompt" if name == "bulk" else "steps"])[:n]
        allowed = 2 * float(np.abs(shaken - want[:n]).max())
        found = _agreement(name, got, want, ids, allowed, _same(shaken, want[:n]) - 0.02)
        share, by_shaking = rms(got - want[:n]), rms(shaken - want[:n])
        assert share <= 1.5 * by_shaking, f"{name}: root mean square {share:.3g}, {by_shaking:.3g} by shaking"
        parts.append(f"{name}: {found}, root mean square {share:.2g} ({by_shaking:.2g} by shaking)")
    return "; ".join(parts)


def int8_layers(path: Path, gpu: Gpu) -> str:
    """Each layer apart, where codes hardly flip: what is wrong shows (tests/runtime/trained_layers.py)."""
    checkpoint, ids = open_checkpoint(path), real_text(path, 300)

    def engine_of(layer: Checkpoint, exact: bool) -> CudaEngine:
        return CudaEngine(layer, activations="int8", gpu=gpu, exact=exact)

    found = compare_layers(checkpoint, ids, engine_of, device=str(gpu.device))
    worst = {name: max(getattr(f, name) for f in found) for name in ALLOWED}
    wrong = [f for f in found if not f.right]
    assert not wrong, f"of what int8 moves {ALLOWED} are allowed: {wrong[:3]}"
    moved = [f.moved for f in found]
    text = ", ".join(f"{name} {value:.2g}" for name, value in worst.items())
    return f"int8 moves outputs by {min(moved):.2g} to {max(moved):.2g}; of that the engine differs by at most: {text}"


def trained_checks(models: Path, gpu: Gpu) -> dict[str, Any]:
    """Names of checks, and what to run; quantised models are made at their first use."""
    folder = tempfile.TemporaryDirectory(prefix="slimba-quantised-")
    packed = models / "mamba2-25m-1bit"
    checks: dict[str, Any] = {
        "packed 25M model": lambda: packed_model(packed, gpu),
        "int8 packed 25M layers": lambda: int8_layers(packed, gpu),
        "int8 packed 25M model": lambda: int8_model(packed, gpu),
    }
    for mode in ("w8a8", "w4a8"):
        checks[f"int8 {mode} layers"] = lambda m=mode: int8_layers(quantised(m, Path(folder.name)), gpu)
        checks[f"int8 {mode} model"] = lambda m=mode: int8_model(Path(folder.name) / m, gpu)
    return checks


def _logits(checkpoint: Checkpoint, activations: str, ids: np.ndarray, gpu: Gpu) -> np.ndarray:
    reference = ReferenceEngine(checkpoint, activations=activations, device=str(gpu.device))
    return reference.forward(ids[None, :-1], reference.new_state())[0]


def _ours(engine: CudaEngine, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Logits of the whole text in bulk, and of its first STEPPED tokens one by one."""
    state = engine.new_state()
    steps = [engine.step(ids[t : t + 1], state)[0].cpu().numpy().copy() for t in range(STEPPED)]
    return {"bulk": engine.forward(ids[None, :-1], engine.new_state())[0], "steps": np.stack(steps)}


def _same(got: np.ndarray, want: np.ndarray) -> float:
    return float((got.argmax(1) == want.argmax(1)).mean())


def _agreement(name: str, got: np.ndarray, want: np.ndarray, ids: np.ndarray, tolerance: float, least: float) -> str:
    """Logits within `tolerance`, argmax the same at `least` so many and wherever the margin exceeds the tolerance,
    perplexity within half a percent; or AssertionError."""
    n = len(got)
    want = want[:n]
    top = np.sort(want, axis=1)
    same, clear = got.argmax(1) == want.argmax(1), top[:, -1] - top[:, -2] > tolerance
    difference = close(got, want, tolerance)
    ours, theirs = (perplexity(x, ids[1 : n + 1]) for x in (got, want))
    assert same.mean() >= least, f"{name}: argmax agrees at {same.mean():.4f}"
    assert same[clear].all(), f"{name}: argmax differs where the margin exceeds the tolerance"
    assert abs(ours / theirs - 1) < 0.005, f"{name}: perplexity {ours} for {theirs}"
    return f"logits {difference:.2g}, argmax {same.mean():.4f}, ppl {ours:.4f} for {theirs:.4f}"


def perplexity(logits: np.ndarray, targets: np.ndarray) -> float:
    x = logits.astype(np.float64)
    top = x.max(1, keepdims=True)
    logp = x - top - np.log(np.exp(x - top).sum(1, keepdims=True))
    return float(np.exp(-logp[np.arange(len(targets)), targets].mean()))
