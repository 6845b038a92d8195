"""Continuous batching with the kernels run on this processor: every request gets what it would get alone.

Run: `pytest tests/runtime/test_cuda_batcher.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kernels.cuda_cases import SPECS
from kernels.cuda_host import host_gpu
from runtime.numpy_reference import random_checkpoint
from slimba.errors import UserError
from slimba.runtime.engine import SamplingParams

torch = pytest.importorskip("torch")


def engine() -> Any:
    from slimba.runtime.backends.cuda import CudaEngine

    return CudaEngine(random_checkpoint(SPECS["plain"], 6, "mixed"), gpu=host_gpu(), exact=True)


def alone(cuda: Any, prompt: np.ndarray, params: SamplingParams) -> list[int]:
    return list(np.concatenate(list(cuda.generate(prompt[None], cuda.new_state(), params)), axis=1)[0])


def test_requests_get_what_they_would_get_alone() -> None:
    """Five requests, three slots, pieces of four tokens: they wait, join, leave and end at different steps."""
    from slimba.runtime.backends.cuda_batcher import Batcher

    cuda, rng = engine(), np.random.default_rng(0)
    prompts = [rng.integers(0, 67, n).astype(np.int32) for n in (3, 9, 1, 6, 4)]
    free = alone(cuda, prompts[1], SamplingParams(max_new_tokens=9))
    params = [
        SamplingParams(max_new_tokens=7),
        SamplingParams(max_new_tokens=9, stop_ids=(int(free[4]),)),
        SamplingParams(max_new_tokens=12, temperature=0.8, top_p=0.9, seed=5),
        SamplingParams(max_new_tokens=5, temperature=1.0, repetition_penalty=1.3, seed=6),
        SamplingParams(max_new_tokens=1),
    ]
    want = [alone(cuda, p, s) for p, s in zip(prompts, params, strict=True)]
    batcher = Batcher(cuda, 3, chunk=4)
    assert [batcher.add(p, s) for p, s in zip(prompts, params, strict=True)] == [0, 1, 2, 3, 4]
    got: list[list[int]] = [[] for _ in prompts]
    ended, steps = set(), 0
    while batcher.busy:
        tokens = batcher.step()
        steps += 1
        assert len({t.request for t in tokens}) == len(tokens) <= 4
        for t in tokens:
            assert t.request not in ended
            got[t.request].append(t.id)
            ended |= {t.request} if t.last else set()
    assert got == want and ended == {0, 1, 2, 3, 4}
    assert steps < sum(map(len, want))  # they ran together
    assert sorted(batcher._free) == [0, 1, 2]


def test_a_saved_prefix_goes_on_as_if_it_had_been_given() -> None:
    from slimba.runtime.backends.cuda_batcher import Batcher

    cuda = engine()
    prompt = np.arange(11, dtype=np.int32)
    want = alone(cuda, prompt, SamplingParams(max_new_tokens=5))
    batcher = Batcher(cuda, 2)
    first = batcher.add(prompt[:8], SamplingParams(max_new_tokens=20))
    batcher.step()
    saved = batcher.save(first)
    batcher.cancel(first)
    assert not batcher.busy
    batcher.add(prompt[8:], SamplingParams(max_new_tokens=5), saved)
    got = []
    while batcher.busy:
        got += [t.id for t in batcher.step()]
    assert got == want


def test_what_cannot_be_is_refused() -> None:
    from slimba.runtime.backends.cuda_batcher import Batcher

    cuda = engine()
    with pytest.raises(UserError, match="slots is 0"):
        Batcher(cuda, 0)
    batcher = Batcher(cuda, 1)
    with pytest.raises(UserError, match="prompt is empty"):
        batcher.add(np.array([], np.int32), SamplingParams())
    with pytest.raises(UserError, match="request 3 is not running"):
        batcher.save(3)
    batcher.add(np.array([1]), SamplingParams())
    batcher.cancel(0)
    assert not batcher.busy and batcher.step() == []
