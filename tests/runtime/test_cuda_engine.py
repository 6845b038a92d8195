"""CudaEngine with its kernels run on this processor (tests/kernels/cuda_host.py), against the NumPy recurrence.

Run: `pytest tests/runtime/test_cuda_engine.py`. What needs a GPU is in benchmarks/cuda_check.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from kernels.cuda_cases import SPECS
from kernels.cuda_host import host_gpu
from runtime.numpy_reference import NumpyModel, mamba1_spec, mamba2_spec, random_checkpoint
from runtime.stored_states import StoredModel
from slimba.errors import UserError

torch = pytest.importorskip("torch")


def engine(checkpoint: object, **settings: object):
    from slimba.runtime.backends.cuda import CudaEngine

    return CudaEngine(checkpoint, gpu=host_gpu(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["float32", "mixed"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("batch", [1, 3])
def test_steps_are_the_recurrence(name: str, format: str, batch: int) -> None:
    checkpoint = random_checkpoint(SPECS[name], 1, format)
    ids = np.random.default_rng(0).integers(0, checkpoint.spec.vocab_size, (batch, 6)).astype(np.int32)
    cuda = engine(checkpoint, exact=True)
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
def test_states_are_stored_as_defined(name: str, state_dtype: str) -> None:
    """Pieces and steps that end before, at and after the tokens after which a state is stored."""
    checkpoint = random_checkpoint(SPECS[name], 3, "mixed")
    ids = np.random.default_rng(2).integers(0, checkpoint.spec.vocab_size, (2, 53)).astype(np.int32)
    want = np.stack([StoredModel(checkpoint, state_dtype).logits(row) for row in ids])
    cuda = engine(checkpoint, state_dtype=state_dtype, exact=True)
    state = cuda.new_state(2)
    got = []
    for a, b in ((0, 5), (5, 12), (12, 13), (13, 30), (30, 36), (36, 53)):
        if b - a < 7:
            got += [cuda.step(ids[:, t], state).numpy()[:, None].copy() for t in range(a, b)]
        else:
            got.append(cuda.forward(ids[:, a:b], state))
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, rtol=0, atol=5e-3)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_states_of_mamba1_are_rounded_as_in_the_reference(state_dtype: str) -> None:
    from slimba.runtime.backends.reference import ReferenceEngine

    checkpoint = random_checkpoint(SPECS["falcon"], 3, "mixed")
    ids = np.random.default_rng(2).integers(0, checkpoint.spec.vocab_size, (2, 21)).astype(np.int32)
    reference = ReferenceEngine(checkpoint, state_dtype=state_dtype)
    want = reference.forward(ids, reference.new_state(2))
    cuda = engine(checkpoint, state_dtype=state_dtype, exact=True)
    state = cuda.new_state(2)
    got = [cuda.forward(ids[:, :17], state)]
    got += [cuda.step(ids[:, t], state).numpy()[:, None].copy() for t in range(17, 21)]
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, rtol=0, atol=2e-3)


@pytest.mark.parametrize("format", ["mixed", "float16"])
def test_half_precision_bulk_is_close(format: str) -> None:
    checkpoint = random_checkpoint(SPECS["headdim-64"], 4, format)
    ids = np.random.default_rng(3).integers(0, checkpoint.spec.vocab_size, (1, 30)).astype(np.int32)
    cuda = engine(checkpoint)
    got = cuda.forward(ids, cuda.new_state())
    np.testing.assert_allclose(got[0], NumpyModel(checkpoint).logits(ids[0]), rtol=0, atol=2e-2)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("stride", [1, 4, 16])
def test_greedy_generation_is_that_of_the_reference_and_stops_as_it_does(batch: int, stride: int) -> None:
    from slimba.runtime.backends.reference import ReferenceEngine
    from slimba.runtime.engine import SamplingParams

    checkpoint = random_checkpoint(SPECS["plain"], 6, "mixed")
    prompt = np.random.default_rng(5).integers(0, 67, (batch, 5)).astype(np.int32)
    cuda, reference = engine(checkpoint, exact=True), ReferenceEngine(checkpoint)
    free = SamplingParams(max_new_tokens=10, n_valid=60)
    ids = np.concatenate(list(reference.generate(prompt, reference.new_state(batch), free)), axis=1)
    stopped = SamplingParams(max_new_tokens=10, n_valid=60, stop_ids=(int(ids[0, 5]),))
    for params in (free, stopped):
        ours, theirs = cuda.new_state(batch), reference.new_state(batch)
        want = list(reference.generate(prompt, theirs, params, stride=stride))
        got = list(cuda.generate(prompt, ours, params, stride=stride))
        assert [p.shape for p in got] == [p.shape for p in want]
        np.testing.assert_array_equal(np.concatenate(got, axis=1), np.concatenate(want, axis=1))
        if batch == 1:  # the states have seen the same tokens
            follow = np.array([[7]], np.int32)
            np.testing.assert_allclose(cuda.forward(follow, ours), reference.forward(follow, theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("penalty", [1.0, 1.2])
@pytest.mark.parametrize("batch", [1, 2])
def test_sampling_follows_the_seed_and_stops_as_the_reference_does(batch: int, penalty: float) -> None:
    """On the GPU without a repetition penalty, by the host with one."""
    from slimba.runtime.backends.reference import ReferenceEngine
    from slimba.runtime.engine import SamplingParams

    checkpoint = random_checkpoint(SPECS["plain"], 6, "mixed")
    prompt = np.random.default_rng(1).integers(0, 67, (batch, 3)).astype(np.int32)
    settings = dict(max_new_tokens=11, temperature=0.8, top_p=0.9, repetition_penalty=penalty, seed=3)
    cuda, reference = engine(checkpoint, exact=True), ReferenceEngine(checkpoint)
    free = np.concatenate(list(reference.generate(prompt, reference.new_state(batch), SamplingParams(**settings))), 1)  # type: ignore[arg-type]
    for stop in ((), (int(free[0, 6]),)):
        params = SamplingParams(**settings, stop_ids=stop)  # type: ignore[arg-type]
        ours, theirs = cuda.new_state(batch), reference.new_state(batch)
        got, want = (
            np.concatenate(list(e.generate(prompt, s, params, stride=4)), axis=1)
            for e, s in ((cuda, ours), (reference, theirs))
        )
        np.testing.assert_array_equal(got, want)


def test_nll_is_log_softmax() -> None:
    checkpoint = random_checkpoint(SPECS["odd"], 7, "mixed")
    ids = np.random.default_rng(3).integers(0, 41, (2, 20)).astype(np.int32)
    cuda = engine(checkpoint, exact=True)
    logits = cuda.forward(ids[:, :-1], cuda.new_state(2)).astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -np.take_along_axis(logp, ids[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(cuda.nll(ids[:, :-1], ids[:, 1:], cuda.new_state(2)), want, rtol=0, atol=1e-5)


def test_what_cannot_run_is_refused_by_name() -> None:

    with pytest.raises(UserError, match="at most 128 entries"):
        engine(random_checkpoint(mamba1_spec(d_state=130)))
    cuda = engine(random_checkpoint(SPECS["plain"]))
    with pytest.raises(UserError, match="batch is 0"):
        cuda.new_state(0)
    with pytest.raises(UserError, match="empty"):
        cuda.prefill(np.zeros((1, 0), np.int32), cuda.new_state())
    with pytest.raises(UserError, match=r"ids must be \[2"):
        cuda.forward(np.zeros((1, 3), np.int32), cuda.new_state(2))
    if not torch.cuda.is_available():
        from slimba.runtime.load import load

        with pytest.raises(UserError, match=r"PyTorch (was built without CUDA|finds no usable)"):
            load(random_checkpoint(SPECS["plain"]), backend="cuda")


@pytest.mark.parametrize("d_state", [64, 128])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_chunks_are_the_recurrence(d_state: int, state_dtype: str) -> None:
    """The chunked kernel over whole and partial chunks, from an empty state and from one."""
    spec = mamba2_spec(headdim=64, d_inner=128, d_state=d_state, n_groups=2, n_layer=1)
    checkpoint = random_checkpoint(spec, 8, "float32")
    ids = np.random.default_rng(6).integers(0, 67, (2, 170)).astype(np.int32)
    cuda = engine(checkpoint, state_dtype=state_dtype)
    state = cuda.new_state(2)
    cuda.prefill(ids[:, :70], state)
    got = cuda.prefill(ids[:, 70:169], state)
    after = cuda.step(ids[:, 169], state).numpy()
    for b in range(2):
        want = NumpyModel(checkpoint).logits(ids[b])
        np.testing.assert_allclose(got[b], want[168], rtol=0, atol=1e-2)
        np.testing.assert_allclose(after[b], want[169], rtol=0, atol=1e-2 if state_dtype == "float32" else 5e-2)


@pytest.mark.parametrize("batch", [7, 11])
def test_larger_batches_are_the_recurrence(batch: int) -> None:
    """Seven run by the fused kernels, eleven by the bulk pass."""
    checkpoint = random_checkpoint(SPECS["norm-first"], 9, "mixed")
    ids = np.random.default_rng(0).integers(0, checkpoint.spec.vocab_size, (batch, 3)).astype(np.int32)
    cuda = engine(checkpoint, exact=True)
    state = cuda.new_state(batch)
    got = np.stack([cuda.step(ids[:, t], state).numpy().copy() for t in range(3)], axis=1)
    for b in range(batch):
        np.testing.assert_allclose(got[b], NumpyModel(checkpoint).logits(ids[b]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("d_state", "groups"), [(64, 2), (128, 1)])
@pytest.mark.parametrize("wide", [False, True])
def test_batches_are_the_recurrence(
    wide: bool, d_state: int, groups: int, state_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels for tens of sequences, each of them elsewhere in its buffer, past the token that stores the state.
    wide: with products of expanded matrices."""
    if wide:
        monkeypatch.setattr("slimba.runtime.backends.cuda_batch.BatchStep.WIDE_FROM", 2)
    spec = mamba2_spec(
        headdim=64, d_inner=512, d_state=d_state, n_groups=groups, n_layer=1, norm_group_size=512 // groups
    )
    checkpoint = random_checkpoint(spec, 8, "mixed")
    ids = np.random.default_rng(6).integers(0, 67, (9, 30)).astype(np.int32)
    cuda = engine(checkpoint, state_dtype=state_dtype)
    pool = cuda.new_state(9)
    for b in range(9):
        cuda.prefill(ids[b : b + 1, : 8 + b], pool.view([b]))
    got = [cuda.step(ids[range(9), range(8 + t, 17 + t)], pool).numpy().copy() for t in range(10)]
    assert type(cuda.stepper(pool)).__name__ == "BatchStep"
    for b in range(9):
        model = NumpyModel(checkpoint) if state_dtype == "float32" else StoredModel(checkpoint, state_dtype)
        want = model.logits(ids[b, : 18 + b])[8 + b :]
        np.testing.assert_allclose(np.stack(got)[:, b], want, rtol=0, atol=1.5e-2 if state_dtype == "float32" else 6e-2)


@pytest.mark.parametrize("name", ["two-groups", "norm-first", "odd"])
def test_batches_of_other_shapes_are_the_recurrence(name: str) -> None:
    checkpoint = random_checkpoint(SPECS[name], 9, "mixed")
    ids = np.random.default_rng(0).integers(0, checkpoint.spec.vocab_size, (17, 3)).astype(np.int32)
    cuda = engine(checkpoint)
    state = cuda.new_state(17)
    got = np.stack([cuda.step(ids[:, t], state).numpy().copy() for t in range(3)], axis=1)
    assert type(cuda.stepper(state)).__name__ == "BatchStep"
    for b in range(17):
        np.testing.assert_allclose(got[b], NumpyModel(checkpoint).logits(ids[b]), rtol=0, atol=2e-2)


@pytest.mark.parametrize(("spec", "batch"), [("odd", 1), ("odd", 3), ("headdim-64", 9)])
def test_kernels_made_for_a_model_are_those_for_any(spec: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimba.runtime.backends.cuda import CudaEngine

    monkeypatch.setattr("slimba.runtime.backends.cuda_batch.BatchStep.BAKES", True)
    checkpoint = random_checkpoint(SPECS[spec], 1, "mixed")
    ids = np.random.default_rng(0).integers(0, 41, (batch, 5)).astype(np.int32)
    got = []
    for gpu in (host_gpu(), host_gpu(bakes=True)):
        cuda = CudaEngine(checkpoint, gpu=gpu)
        state = cuda.new_state(batch)
        got.append(np.stack([cuda.step(ids[:, t], state).numpy().copy() for t in range(5)]))
    np.testing.assert_array_equal(*got)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_kernels_of_usual_shapes_are_the_recurrence(batch: int, groups: int, state_dtype: str) -> None:
    """quick.cuh, past two tokens that store the state."""
    from slimba.runtime.backends.cuda import CudaEngine

    spec = mamba2_spec(headdim=64, d_inner=256, d_state=128, n_groups=groups, n_layer=1, conv_bias=groups > 1)
    checkpoint = random_checkpoint(spec, 4, "mixed")
    ids = np.random.default_rng(1).integers(0, 67, (batch, 36)).astype(np.int32)
    cuda = CudaEngine(checkpoint, gpu=host_gpu(bakes=True), state_dtype=state_dtype, exact=True)
    state = cuda.new_state(batch)
    cuda.prefill(ids[:, :13], state)
    got = np.stack([cuda.step(ids[:, t], state).numpy().copy() for t in range(13, 36)], axis=1)
    assert cuda.stepper(state)._quick
    models = [NumpyModel(checkpoint) if state_dtype == "float32" else StoredModel(checkpoint, state_dtype)] * batch
    want = np.stack([m.logits(ids[b])[13:] for b, m in enumerate(models)])
    # a kept number on the edge between two bfloat16 numbers may fall to the other side
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 if state_dtype == "float32" else 3e-2)


@pytest.mark.parametrize("state_dtype", ["float32", "int8", "bfloat16"])
def test_sequences_join_leave_and_are_saved(state_dtype: str) -> None:
    """Three sequences in slots of one pool, coming and going between steps, see what they would see alone."""
    checkpoint = random_checkpoint(SPECS["plain"], 10, "mixed")
    ids = np.random.default_rng(7).integers(0, 67, (3, 12)).astype(np.int32)
    cuda = engine(checkpoint, state_dtype=state_dtype, exact=True)
    want = [cuda.forward(ids[b : b + 1], cuda.new_state())[0] for b in range(3)]
    pool = cuda.new_state(5)
    got: list[list[np.ndarray]] = [[], [], []]
    slots = {0: 4, 1: 0, 2: 2}
    alive = {t: [0, 1] if t < 4 else [0, 1, 2] if t < 8 else [0, 2] for t in range(12)}
    for b in (0, 1):
        got[b].append(cuda.prefill(ids[b : b + 1, :2], pool.view([slots[b]]))[0])
    for t in range(2, 12):
        if t == 4:
            got[2].append(cuda.prefill(ids[2:, :2], pool.view([2]))[0])
        if t == 6:  # sequence 0 moves to another slot by way of a saved state
            pool.view([3]).load(pool.view([4]).save())
            pool.view([4]).reset()
            slots[0] = 3
        run = alive[t]
        tokens = np.array([ids[b, len(got[b]) + 1] for b in run], np.int32)
        logits = cuda.step(tokens, pool.view([slots[b] for b in run])).numpy()
        for b, row in zip(run, logits, strict=True):
            got[b].append(row.copy())
    for b in range(3):
        tolerance = 2e-5 if state_dtype == "float32" else 2e-3  # a rounding may fall to the other side
        np.testing.assert_allclose(np.stack(got[b]), want[b][1 : len(got[b]) + 1], rtol=0, atol=tolerance)
    assert int(pool.pos[4]) == 0 and int(pool.pos[3]) == 12


def test_slots_are_checked() -> None:

    pool = engine(random_checkpoint(SPECS["plain"])).new_state(2)
    for slots in ([], [0, 0], [2], [-1]):
        with pytest.raises(UserError, match="slots are"):
            pool.view(slots)
    other = engine(random_checkpoint(SPECS["odd"])).new_state(1)
    with pytest.raises(UserError, match="the saved state's ssm"):
        pool.view([1]).load(other.save())


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("name", ["plain", "headdim-64", "odd", "two-groups", "mamba1", "falcon"])
@pytest.mark.parametrize("batch", [1, 3])
def test_inputs_are_transformed_and_rounded_as_the_file_says(name: str, activations: str, batch: int) -> None:
    """In bulk, then step by step. A code may flip where sums differ in the last bit, hence the two measures."""
    from slimba.runtime.backends.reference import ReferenceEngine

    checkpoint = random_checkpoint(SPECS[name], 21, "transformed")
    ids = np.random.default_rng(9).integers(0, checkpoint.spec.vocab_size, (batch, 12)).astype(np.int32)
    reference = ReferenceEngine(checkpoint, activations=activations)
    want = reference.forward(ids, reference.new_state(batch))
    for exact in (True, False):
        cuda = engine(checkpoint, activations=activations, exact=exact)
        state = cuda.new_state(batch)
        got = [cuda.forward(ids[:, :9], state)]
        got += [cuda.step(ids[:, t], state).numpy()[:, None].copy() for t in range(9, 12)]
        error = np.abs(np.concatenate(got, axis=1) - want)
        if activations == "float32":
            assert error.max() < (1e-4 if exact else 0.03 * np.abs(want).max())
        else:
            assert error.max() < 0.2 * np.abs(want).max()
            assert not exact or (error < 1e-4).all(axis=-1).mean() > 0.4


def test_what_the_engine_does_not_round_is_refused() -> None:
    checkpoint = random_checkpoint(SPECS["plain"], 1, "float32")
    checkpoint.numerics = {"activations": "int8", "ssm_inputs": "int8"}
    with pytest.raises(UserError, match=r"ssm_inputs.*--backend cpu"):
        engine(checkpoint)
    with pytest.raises(UserError, match="activations 'int4' are unknown"):
        engine(checkpoint, activations="int4")
    assert engine(checkpoint, activations="float32").name == "cuda"
