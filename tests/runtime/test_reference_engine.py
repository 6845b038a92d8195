"""ReferenceEngine: its weights, prefill in any chunking, nll, generation, state.

`pytest tests/runtime/test_reference_engine.py`
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from helpers.tiny import tiny_checkpoint
from slimba.errors import UserError
from slimba.runtime.engine import SamplingParams
from slimba.runtime.sampling import sample

pytest.importorskip("torch")
from slimba.runtime.backends import reference
from slimba.runtime.backends.reference import ReferenceEngine

MODELS = {
    "mamba2": {},
    "mamba2-groups": {"n_groups": 2, "d_state": 24, "norm_group_size": 32},
    "mamba1": {},
    "mamba2-dfssm": {"preset": "dfssm"},
    "mamba1-int8-untied": {"preset": "int8", "tie_embeddings": False},
}
IDS = np.random.default_rng(0).integers(0, 300, (2, 37)).astype(np.int32)


@pytest.fixture(params=MODELS)
def engine(request: pytest.FixtureRequest) -> ReferenceEngine:
    return ReferenceEngine(tiny_checkpoint(request.param.split("-")[0], **MODELS[request.param]))


def test_weights_are_the_dequantised_file() -> None:
    ckpt = tiny_checkpoint(preset="dfssm")
    loaded = ReferenceEngine(ckpt).model.state_dict()
    for name in ckpt.spec.matrices():
        assert (loaded[name + ".weight"].numpy() == ckpt.matrix(name).dequantize()).all()
    for name in ckpt.spec.vectors():
        assert (loaded[name].numpy() == ckpt.vector(name)).all()


@pytest.mark.parametrize("cuts", [[1] * 37, [5, 1, 31], [36, 1]])
def test_any_chunking_gives_the_same_logits(engine: ReferenceEngine, cuts: list[int]) -> None:
    whole = engine.forward(IDS, engine.new_state(2))
    assert whole.shape == (2, 37, engine.spec.vocab_size) and whole.dtype == np.float32
    state, at, parts = engine.new_state(2), 0, []
    for n in cuts:
        parts.append(engine.forward(IDS[:, at : at + n], state))
        at += n
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=2e-5)


def test_prefill_and_nll_in_small_chunks(engine: ReferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = engine.forward(IDS, engine.new_state(2)).astype(np.float64)
    monkeypatch.setattr(reference, "CHUNK", 8)
    np.testing.assert_allclose(engine.prefill(IDS, engine.new_state(2)), whole[:, -1], atol=2e-5)
    targets = np.roll(IDS, -1, axis=1)
    log_p = whole - np.log(np.exp(whole).sum(-1, keepdims=True))
    want = -np.take_along_axis(log_p, targets[..., None].astype(int), -1)[..., 0]
    got = engine.nll(IDS, targets, engine.new_state(2))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_sequences_of_a_batch_do_not_see_each_other(engine: ReferenceEngine) -> None:
    both = engine.forward(IDS, engine.new_state(2))
    for b in range(2):
        np.testing.assert_allclose(engine.forward(IDS[b : b + 1], engine.new_state())[0], both[b], atol=2e-5)


@pytest.mark.parametrize("stride", [1, 4, 100])
def test_generation_samples_from_its_own_logits(engine: ReferenceEngine, stride: int) -> None:
    params = SamplingParams(max_new_tokens=11, temperature=1.0, seed=7, n_valid=300, repetition_penalty=1.1)
    state = engine.new_state(2)
    pieces = list(engine.generate(IDS, state, params, stride=stride))
    assert all(p.shape[1] <= stride and p.dtype == np.int32 for p in pieces)
    out = np.concatenate(pieces, axis=1)
    assert out.shape == (2, 11)
    logits = engine.forward(np.concatenate([IDS, out], 1), engine.new_state(2))[:, 36:]
    for b in range(2):
        for i in range(11):
            seen = [*IDS[b], *out[b, :i]]
            assert out[b, i] == sample(logits[b, i], seen, params, b, i)
    after = engine.forward(out[:, -1:], state)
    np.testing.assert_allclose(after[:, 0], logits[:, 11], atol=2e-5, err_msg="the state lacks exactly the last id")


def test_stop_ids_end_each_sequence(engine: ReferenceEngine) -> None:
    free = SamplingParams(max_new_tokens=12, temperature=1.0, seed=1)
    out = np.concatenate(list(engine.generate(IDS, engine.new_state(2), free)), 1)
    stop = int(out[0, 3])
    params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=1, stop_ids=(stop,))
    cut = np.concatenate(list(engine.generate(IDS, engine.new_state(2), params, stride=5)), 1)
    n = out[0].tolist().index(stop) + 1
    assert cut[0, :n].tolist() == out[0, :n].tolist() and (cut[0, n:] == -1).all()


def test_state_clone_and_reset(engine: ReferenceEngine) -> None:
    state = engine.new_state(2)
    first = engine.forward(IDS, state)
    copy = state.clone()
    again = engine.forward(IDS, state)
    np.testing.assert_array_equal(engine.forward(IDS, copy), again)
    state.reset()
    np.testing.assert_array_equal(engine.forward(IDS, state), first)


def test_bad_requests_are_user_errors(engine: ReferenceEngine) -> None:
    state = engine.new_state(2)
    for call in (
        lambda: engine.new_state(0),
        lambda: engine.forward(IDS[:1], state),
        lambda: engine.forward(np.full((2, 3), engine.spec.vocab_size, np.int32), state),
        lambda: engine.prefill(IDS[:, :0], state),
        lambda: engine.nll(IDS, IDS[:, 1:], state),
        lambda: next(engine.generate(IDS, state, SamplingParams(), stride=0)),
    ):
        with pytest.raises(UserError):
            call()
    with pytest.raises(UserError, match="'float16' is unknown, known are float32, bfloat16, int8"):
        ReferenceEngine(tiny_checkpoint(), state_dtype="float16")


def test_missing_torch_is_one_clear_line() -> None:
    code = """
import sys
sys.modules["torch"] = None
from slimba.errors import UserError
try:
    import slimba.runtime.backends.reference
except UserError as e:
    print(e)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 'pip install "slimba[train]"' in out
