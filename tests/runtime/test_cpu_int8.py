"""CpuEngine with int8 activations: against the torch reference, and its promises bit for bit.

A code may flip where two engines' float32 sums differ in the last bit, and a flipped code moves the logits by about one
activation's step; so engines are compared by how many logits are close, and kernels exactly (test_cpu_quant.py).
Run: `pytest tests/runtime/test_cpu_int8.py`.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from runtime.numpy_reference import random_checkpoint, random_matrix
from runtime.test_cpu_engine import ISAS, SPECS
from slimba.errors import UserError
from slimba.formats import MatrixLayout, Segment
from slimba.runtime.backends.cpu import CpuEngine
from slimba.runtime.load import load


def logits(engine: CpuEngine, ids: np.ndarray) -> np.ndarray:
    return engine.forward(ids, engine.new_state(len(ids)))


@pytest.mark.parametrize("format", ["mixed", "planes", "transformed"])
@pytest.mark.parametrize("name", SPECS)
def test_the_torch_reference_rounds_the_same_inputs(name: str, format: str) -> None:
    pytest.importorskip("torch")
    from slimba.runtime.backends.reference import ReferenceEngine

    checkpoint = random_checkpoint(SPECS[name], 21, format)
    ids = np.random.default_rng(9).integers(0, checkpoint.spec.vocab_size, (2, 5)).astype(np.int32)
    reference = ReferenceEngine(checkpoint, activations="int8")
    want = reference.forward(ids, reference.new_state(2))
    plain = logits(CpuEngine(checkpoint, threads=1), ids)
    assert np.abs(want - plain).max() > 1e-3 * np.abs(plain).max()  # rounding the inputs is seen
    for isa in ISAS:
        got = logits(CpuEngine(checkpoint, threads=2, isa=isa, activations="int8"), ids)
        close = np.isclose(got, want, rtol=0, atol=2e-5).all(axis=-1)
        assert close.mean() >= 0.5, (isa, close)
        np.testing.assert_allclose(got, want, rtol=0, atol=0.2 * np.abs(want).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", ["mixed", "planes", "transformed", "sign", "int8", "int4"])
@pytest.mark.parametrize("name", ["plain", "odd", "falcon"])
def test_chunks_threads_and_neighbours_change_nothing(isa: str, format: str, name: str) -> None:
    checkpoint = random_checkpoint(SPECS[name], 3, format)
    ids = np.random.default_rng(2).integers(0, checkpoint.spec.vocab_size, (5, 90)).astype(np.int32)
    whole = logits(CpuEngine(checkpoint, threads=3, isa=isa, activations="int8"), ids)
    single = CpuEngine(checkpoint, threads=1, isa=isa, activations="int8")
    for b in (0, 4):
        state = single.new_state()
        row = ids[b : b + 1]
        cuts = [*range(12), 14, 19, 52, 53, 90]
        pieces = [single.forward(row[:, i:j], state) for i, j in itertools.pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(pieces, axis=1)[0], whole[b])


def test_float_matrices_keep_float_inputs() -> None:
    checkpoint = random_checkpoint(SPECS["odd"], 4, "float16")
    ids = np.arange(9, dtype=np.int32)[None]
    np.testing.assert_array_equal(
        logits(CpuEngine(checkpoint, threads=1, activations="int8"), ids), logits(CpuEngine(checkpoint, threads=1), ids)
    )


def test_the_checkpoint_chooses_and_a_flag_overrides() -> None:
    checkpoint = random_checkpoint(SPECS["odd"], 5, "mixed")
    assert load(checkpoint, backend="cpu").activations == "float32"
    checkpoint.numerics["activations"] = "int8"
    model = load(checkpoint, backend="cpu")
    assert model.activations == "int8" and model.engine.activations == "int8"  # type: ignore[attr-defined]
    assert load(checkpoint, backend="cpu", activations="float32").activations == "float32"
    with pytest.raises(UserError, match=r"int7.*float32, int8"):
        load(checkpoint, activations="int7")
    with pytest.raises(UserError, match=r"int7.*float32, int8"):
        CpuEngine(checkpoint, activations="int7")


def test_a_matrix_may_keep_float_inputs_or_have_one_scale_for_all() -> None:
    """By the definition, on the one product that the head of a one-layer model makes."""
    spec = dataclasses.replace(SPECS["odd"], tie_embeddings=False, n_layer=1)
    ids = np.arange(6, dtype=np.int32)[None]

    def head_of(**changes: object) -> tuple[np.ndarray, np.ndarray, float]:
        checkpoint = random_checkpoint(spec, 6, "float32")
        rows, cols = spec.vocab_size, spec.d_model
        layout = MatrixLayout(cols, (Segment(rows, "int8"),), **changes)  # type: ignore[arg-type]
        head = random_matrix(np.random.default_rng(0), layout)
        tensors = {k: v for k, v in checkpoint.tensors.items() if k != "lm_head.weight"}
        checkpoint.tensors = tensors | {f"lm_head.{part}": a for part, a in head.arrays.items()}
        checkpoint.layouts["lm_head"] = layout
        w, scale = head.dequantize(), float(head.arrays.get("input_scale", [0])[0])
        return logits(CpuEngine(checkpoint, threads=1, activations="int8"), ids)[0], w, scale

    floats, w, _ = head_of(activations="float32")
    features = np.linalg.lstsq(w, floats.T, rcond=None)[0].T  # the head's input, from its exact product
    rounded = head_of()[0]
    fixed, _, scale = head_of(input_scale=True)
    want = np.clip(np.rint(features / scale), -127, 127) * scale
    assert (np.abs(features) > 127 * scale).any(), "some codes must saturate"
    np.testing.assert_allclose(fixed, want @ w.T, atol=1e-4)
    step = np.abs(features).max(axis=1, keepdims=True) / 127
    np.testing.assert_allclose(rounded, np.rint(features / step) * step @ w.T, atol=1e-4)
    assert np.abs(fixed - floats).max() > 1e-2 and np.abs(rounded - floats).max() > 1e-4
