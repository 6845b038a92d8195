"""Token ids that a model writes itself, alone or mixed into a training text: does a student learn more from them?

    python benchmarks/sample_text.py MODEL --tokens 4000000 --out sampled.npy
    python benchmarks/sample_text.py MODEL --tokens 4000000 --into train.npy --window 1024 --out mixed.npy

Sequences of `--window` tokens from an empty state, each beginning with the model's document start and drawn at
temperature 1 over the whole vocabulary, `--batch` at a time; by the CUDA engine where there is a GPU, else by the CPU
engine. With --into, windows of the text spread evenly over it are replaced, so that the length stays. A seed gives the
same ids on the same engine. Tests: `pytest tests/benchmarks/test_sample_text.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.reader import open_checkpoint
from slimba.errors import UserError


def engine_of(model: Checkpoint, device: str) -> Any:
    """The CUDA engine where torch sees a GPU (`auto`) or is told so, else the CPU engine."""
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        from slimba.runtime.backends.cuda import CudaEngine

        return CudaEngine(model)
    from slimba.runtime.backends.cpu import CpuEngine

    return CpuEngine(model)


def sample(model: Checkpoint, tokens: int, *, window: int, batch: int, seed: int, device: str = "auto") -> np.ndarray:
    """int32 [sequences * window], at least `tokens` of them; the first id of each sequence is the document start.

    UserError for a model that names no document start.
    """
    start = next((i for i in (model.spec.bos_token_id, model.spec.eos_token_id) if i is not None), None)
    if start is None:
        raise UserError("the model's config.json names neither bos_token_id nor eos_token_id to begin a text with")
    engine, out = engine_of(model, device), []
    draws = np.random.default_rng(seed)
    for _ in range(-(-tokens // (window * batch))):
        ids = np.full((batch, window), start, np.int32)
        state = engine.new_state(batch)
        for t in range(window - 1):
            ids[:, t + 1] = choose(engine, ids[:, t], state, draws.random(batch))
        out.append(ids.ravel())
    return np.concatenate(out)


def choose(engine: Any, ids: np.ndarray, state: Any, u: np.ndarray) -> np.ndarray:
    """The next ids [batch]: where the cumulative probabilities pass u."""
    if engine.name == "cuda":  # logits stay on the device
        import torch

        logits = engine.step(ids, state)
        p = torch.softmax(logits.double(), 1).cumsum(1)
        at = torch.from_numpy(u[:, None]).to(p.device) * p[:, -1:]
        return np.asarray(torch.searchsorted(p, at).clamp_max(p.shape[1] - 1)[:, 0].int().cpu().numpy())
    logits = engine.forward(ids[:, None], state)[:, 0].astype(np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True)).cumsum(1)
    return np.minimum((p < u[:, None] * p[:, -1:]).sum(1), p.shape[1] - 1).astype(np.int32)


def mixed(text: np.ndarray, sampled: np.ndarray, window: int) -> np.ndarray:
    """`text` with as many windows replaced, evenly spread, as `sampled` holds. UserError if it holds more."""
    n, k = len(text) // window, len(sampled) // window
    if k > n:
        raise UserError(f"{k} sampled windows do not fit a text of {n}")
    out = text[: n * window].astype(np.int32).reshape(n, window)
    out[(np.arange(k) * n // k) if k else []] = sampled[: k * window].reshape(k, window)
    return np.concatenate([out.ravel(), text[n * window :].astype(np.int32)])


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("model")
    args.add_argument("--tokens", type=int, required=True)
    args.add_argument("--window", type=int, default=1024)
    args.add_argument("--batch", type=int, default=512)
    args.add_argument("--seed", type=int, default=0)
    args.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    args.add_argument("--into", type=Path, help="an .npy of token ids")
    args.add_argument("--out", type=Path, required=True)
    a = args.parse_args()
    ids = sample(open_checkpoint(a.model), a.tokens, window=a.window, batch=a.batch, seed=a.seed, device=a.device)
    np.save(a.out, mixed(np.load(a.into), ids, a.window) if a.into else ids)
    print(f"{a.out}: {len(ids):,} sampled tokens{f' in {a.into}' if a.into else ''}")


if __name__ == "__main__":
    main()
