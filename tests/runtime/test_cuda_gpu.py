"""CudaEngine on a GPU: what only shows there. Kernels and engine are compared at length by benchmarks/cuda_check.py.

Run: `pytest -m gpu tests/runtime/test_cuda_gpu.py`.
"""

from __future__ import annotations

import gc

import numpy as np
import pytest

from kernels.cuda_cases import SPECS
from runtime.numpy_reference import random_checkpoint
from slimba.runtime.engine import SamplingParams

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_one_engine_after_another_records_graphs(batch: int) -> None:
    """A recording must not depend on memory that went with the graphs of an engine that is gone."""
    from slimba.runtime.backends.cuda import CudaEngine

    checkpoint = random_checkpoint(SPECS["plain"], 6, "mixed")
    prompt = np.random.default_rng(0).integers(0, 67, (batch, 20)).astype(np.int32)
    texts = []
    for _ in range(2):
        engine = CudaEngine(checkpoint)
        for _ in range(3):  # the second call of a shape is recorded, the third replayed
            pieces = engine.generate(prompt, engine.new_state(batch), SamplingParams(max_new_tokens=8), stride=4)
            texts.append(np.concatenate(list(pieces), axis=1))
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    for text in texts[1:]:
        np.testing.assert_array_equal(text, texts[0])
