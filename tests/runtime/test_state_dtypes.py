"""Recurrent states in bfloat16 and int8: the CPU engine's promises, and the torch reference with the same roundings.

Run: `pytest tests/runtime/test_state_dtypes.py`.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from runtime.numpy_reference import random_checkpoint
from runtime.test_cpu_engine import ISAS, SPECS
from slimba.runtime.backends.cpu import STATE_DTYPES, CpuEngine
from slimba.runtime.engine import SamplingParams
from slimba.runtime.load import load

ROUNDED = STATE_DTYPES[1:]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("name", ["plain", "odd", "falcon"])
def test_neighbours_threads_and_cuts_change_nothing(isa: str, dtype: str, name: str) -> None:
    checkpoint = random_checkpoint(SPECS[name], 3, "mixed")
    ids = np.random.default_rng(2).integers(0, checkpoint.spec.vocab_size, (3, 150)).astype(np.int32)
    engine = CpuEngine(checkpoint, threads=3, isa=isa, state_dtype=dtype)
    whole = engine.forward(ids, engine.new_state(3))
    single = CpuEngine(checkpoint, threads=1, isa=isa, state_dtype=dtype)
    for b in (0, 2):
        row = ids[b : b + 1]
        state = single.new_state()
        pieces = [single.forward(row[:, i : i + 1], state) for i in range(20)]
        twin = state.clone()
        pieces += [single.forward(row[:, i:j], state) for i, j in itertools.pairwise([20, 53, 54, 150])]
        np.testing.assert_array_equal(np.concatenate(pieces, axis=1)[0], whole[b])
        np.testing.assert_array_equal(single.prefill(row[:, 20:], twin)[0], whole[b, -1])
    state, other = single.new_state(), single.new_state()
    single.forward(ids[:1, :77], state)
    other.load(state.save())
    np.testing.assert_array_equal(single.forward(ids[:1, 77:], other)[0], whole[0, 77:])
    state.reset()
    np.testing.assert_array_equal(single.forward(ids[:1], state)[0], whole[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("name", ["plain", "odd", "headdim-64", "falcon"])
def test_the_torch_reference_agrees(isa: str, dtype: str, name: str) -> None:
    """Sums of another order move a few entries to the next code: the engines differ by less than rounding does."""
    pytest.importorskip("torch")
    from slimba.runtime.backends.reference import ReferenceEngine

    checkpoint = random_checkpoint(SPECS[name], 11, "mixed")
    ids = np.random.default_rng(9).integers(0, checkpoint.spec.vocab_size, (2, 48)).astype(np.int32)
    reference = ReferenceEngine(checkpoint, state_dtype=dtype)
    engine = CpuEngine(checkpoint, isa=isa, state_dtype=dtype)
    want = reference.forward(ids, reference.new_state(2))
    got = engine.forward(ids, engine.new_state(2))
    exact = CpuEngine(checkpoint)
    rounding = np.abs(exact.forward(ids, exact.new_state(2)) - want)
    assert rounding.max() > 1e-5  # the state is really rounded
    assert np.sqrt(((got - want) ** 2).mean()) < 0.2 * np.sqrt((rounding**2).mean())
    assert np.abs(got - want).max() < rounding.max()


def test_the_reference_stores_every_sixteen_tokens() -> None:
    pytest.importorskip("torch")
    from slimba.runtime.backends.reference import ReferenceEngine

    checkpoint = random_checkpoint(SPECS["plain"], 12)
    ids = np.random.default_rng(1).integers(0, 67, (1, 35)).astype(np.int32)
    engine = ReferenceEngine(checkpoint, state_dtype="int8")
    state = engine.new_state()
    pieces = [engine.forward(ids[:, i:j], state) for i, j in ((0, 4), (4, 5), (5, 35))]
    np.testing.assert_allclose(np.concatenate(pieces, 1), engine.forward(ids, engine.new_state()), atol=1e-5)
    held = state.inner.layers[0].held
    assert held is not None and held.u.shape[1] == 35 % 16
    codes = state.inner.layers[0].ssm / (state.inner.layers[0].ssm.abs().amax(-1, keepdim=True) / 127)
    np.testing.assert_allclose(codes.numpy(), np.rint(codes.numpy()), atol=1e-3)


def test_the_checkpoint_chooses_and_the_flag_overrides() -> None:
    checkpoint = random_checkpoint(SPECS["plain"], 13)
    checkpoint.numerics["state"] = "int8"
    prompt = np.array([[1, 2, 3]], np.int32)
    by_file, by_flag = load(checkpoint, backend="cpu"), load(checkpoint, backend="cpu", state_dtype="fp32")
    assert (by_file.state_dtype, by_flag.state_dtype) == ("int8", "float32")
    plain = CpuEngine(checkpoint)
    want = plain.forward(prompt, plain.new_state())[0]
    np.testing.assert_array_equal(by_flag.logits(prompt[0]), want)
    assert np.abs(by_file.logits(prompt[0]) - want).max() > 0
    ids = next(by_file.engine.generate(prompt, by_file.engine.new_state(1), SamplingParams(max_new_tokens=5), stride=5))
    assert ids.shape == (1, 5) and (ids >= 0).all()
