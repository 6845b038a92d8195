"""CudaEngine with its kernels run on this processor (tests/kernels/cuda_host.py), against the NumPy recurrence.

Run: `pytest tests/runtime/test_cuda_engine.py`. What needs a GPU is in benchmarks/cuda_check.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from kernels.cuda_host import host_gpu
from runtime.numpy_reference import NumpyModel, mamba2_spec, random_checkpoint
from slimba.models.spec import ModelSpec

torch = pytest.importorskip("torch")

SPECS: dict[str, ModelSpec] = {
    "plain": mamba2_spec(),
    "two-groups": mamba2_spec(n_groups=2, headdim=32, d_state=64, proj_bias=True),
    "four-groups": mamba2_spec(n_groups=4, headdim=16, d_state=128, norm_group_size=32, conv_bias=False),
    "headdim-64": mamba2_spec(headdim=64, d_state=128, d_inner=256, tie_embeddings=False),
    "odd": mamba2_spec(d_model=37, d_inner=72, headdim=12, d_state=7, n_groups=3, d_conv=3, vocab_size=41),
    "norm-first": mamba2_spec(norm_before_gate=True, norm_group_size=64, dt_limit=(0.02, 0.1), d_has_hdim=True),
    "no-norm": mamba2_spec(gated_norm=False),
    "wide-state": mamba2_spec(d_state=200),
}


def engine(checkpoint: object, **settings: object):
    from slimba.runtime.backends.cuda import CudaEngine

    return CudaEngine(checkpoint, gpu=host_gpu(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["float32", "mixed"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("batch", [1, 3])
def test_steps_are_the_recurrence(name: str, format: str, batch: int) -> None:
    checkpoint = random_checkpoint(SPECS[name], 1, format)
    ids = np.random.default_rng(0).integers(0, checkpoint.spec.vocab_size, (batch, 6)).astype(np.int32)
    cuda = engine(checkpoint)
    state = cuda.new_state(batch)
    got = np.stack([cuda.step(ids[:, t], state).numpy().copy() for t in range(6)], axis=1)
    for b in range(batch):
        np.testing.assert_allclose(got[b], NumpyModel(checkpoint).logits(ids[b]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("format", ["float32", "mixed"])
@pytest.mark.parametrize("name", SPECS)
def test_bulk_is_the_recurrence(name: str, format: str) -> None:
    """In pieces, from a state, then a fused step: all forms continue each other."""
    checkpoint = random_checkpoint(SPECS[name], 2, format)
    ids = np.random.default_rng(1).integers(0, checkpoint.spec.vocab_size, (2, 40)).astype(np.int32)
    cuda = engine(checkpoint, exact=True)
    state = cuda.new_state(2)
    pieces = [cuda.forward(ids[:, a:b], state) for a, b in ((0, 1), (1, 3), (3, 25), (25, 39))]
    got = np.concatenate([*pieces, cuda.step(ids[:, 39], state).numpy()[:, None]], axis=1)
    for b in range(2):
        np.testing.assert_allclose(got[b], NumpyModel(checkpoint).logits(ids[b]), rtol=0, atol=3e-5)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", ["headdim-64", "odd"])
def test_states_are_rounded_as_in_the_reference(name: str, state_dtype: str) -> None:
    from slimba.runtime.backends.reference import ReferenceEngine

    checkpoint = random_checkpoint(SPECS[name], 3, "mixed")
    ids = np.random.default_rng(2).integers(0, checkpoint.spec.vocab_size, (2, 21)).astype(np.int32)
    reference = ReferenceEngine(checkpoint, state_dtype=state_dtype)
    want = reference.forward(ids, reference.new_state(2))
    cuda = engine(checkpoint, state_dtype=state_dtype, exact=True)
    state = cuda.new_state(2)
    got = [cuda.forward(ids[:, :17], state)]
    got += [cuda.step(ids[:, t], state).numpy()[:, None].copy() for t in range(17, 21)]
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, rtol=0, atol=2e-3)


def test_half_precision_bulk_is_close() -> None:
    checkpoint = random_checkpoint(SPECS["headdim-64"], 4, "mixed")
    ids = np.random.default_rng(3).integers(0, checkpoint.spec.vocab_size, (1, 30)).astype(np.int32)
    cuda = engine(checkpoint)
    got = cuda.forward(ids, cuda.new_state())
    np.testing.assert_allclose(got[0], NumpyModel(checkpoint).logits(ids[0]), rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", ["headdim-64", "four-groups"])
def test_the_persistent_kernel_is_the_recurrence(name: str) -> None:
    from slimba.runtime.backends.cuda_step import PersistentStep

    checkpoint = random_checkpoint(SPECS[name], 5, "mixed")
    ids = np.random.default_rng(4).integers(0, checkpoint.spec.vocab_size, 4).astype(np.int32)
    cuda = engine(checkpoint)
    state = cuda.new_state()
    step = PersistentStep(cuda.model, cuda.gpu, "float32")
    step.point_to(state)
    got = []
    for token in ids:
        step.ids.fill_(int(token))
        step.work(choose=True)
        got.append(step.logits[0].numpy().copy())
    np.testing.assert_allclose(np.stack(got), NumpyModel(checkpoint).logits(ids), rtol=0, atol=2e-5)
    np.testing.assert_array_equal(step.chosen[0, :4].numpy(), np.argmax(got, axis=1))
