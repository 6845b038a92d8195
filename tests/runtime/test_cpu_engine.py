"""CpuEngine against the NumPy recurrence on every instruction set, and the promises of `runtime.engine.Engine`.

Run: `pytest tests/runtime/test_cpu_engine.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import signal
import time

import numpy as np
import pytest

from runtime.numpy_reference import NumpyModel, mamba1_spec, mamba2_spec, random_checkpoint
from slimba import _core
from slimba.errors import UserError
from slimba.models.spec import ModelSpec
from slimba.runtime.backends.cpu import CpuEngine, default_threads
from slimba.runtime.engine import SamplingParams
from slimba.runtime.sampling import sample, uniform


def _runs(isa: str) -> bool:
    try:
        return _core.isa(isa) == isa
    except ValueError:
        return False


ISAS = [
    isa for isa in ("portable", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512lookup", "amx", "neon") if _runs(isa)
]

SPECS: dict[str, ModelSpec] = {
    "plain": mamba2_spec(),
    "two-groups": mamba2_spec(n_groups=2, headdim=32, d_state=64, proj_bias=True),
    "four-groups": mamba2_spec(n_groups=4, headdim=16, d_state=128, norm_group_size=32, conv_bias=False),
    "headdim-64": mamba2_spec(headdim=64, d_state=128, d_inner=256, tie_embeddings=False),
    "odd": mamba2_spec(d_model=37, d_inner=72, headdim=12, d_state=7, n_groups=3, d_conv=3, vocab_size=41),
    "norm-first": mamba2_spec(norm_before_gate=True, norm_group_size=64, dt_limit=(0.02, 0.1), d_has_hdim=True),
    "no-norm": mamba2_spec(gated_norm=False),
    "mamba1": mamba1_spec(),
    "falcon": mamba1_spec(bcdt_norm_eps=1e-6, proj_bias=True, d_inner=75, d_state=13, conv_bias=False, d_conv=5),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("format", ["float32", "mixed", "planes", "transformed"])
def test_logits_are_the_recurrence(isa: str, name: str, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMBA_CPU_ISA", isa)
    checkpoint = random_checkpoint(SPECS[name], 1, format)
    ids = np.random.default_rng(0).integers(0, checkpoint.spec.vocab_size, (2, 19)).astype(np.int32)
    engine = CpuEngine(checkpoint, threads=2)
    assert engine.isa == isa
    got = engine.forward(ids, engine.new_state(2))
    reference = NumpyModel(checkpoint)
    for b in range(2):
        np.testing.assert_allclose(got[b], reference.logits(ids[b]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", ["float16", "bfloat16", "int8", "int4", "sign"])
@pytest.mark.parametrize("name", ["odd", "falcon"])
def test_every_format(isa: str, format: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMBA_CPU_ISA", isa)
    checkpoint = random_checkpoint(SPECS[name], 2, format)
    ids = np.random.default_rng(1).integers(0, checkpoint.spec.vocab_size, (1, 7)).astype(np.int32)
    engine = CpuEngine(checkpoint, threads=1)
    got = engine.forward(ids, engine.new_state())[0]
    np.testing.assert_allclose(got, NumpyModel(checkpoint).logits(ids[0]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rank", [1, 8, 16, 40])
def test_low_rank_corrections(isa: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMBA_CPU_ISA", isa)
    checkpoint = random_checkpoint(SPECS["headdim-64"], 10, "mixed", rank)
    ids = np.random.default_rng(8).integers(0, 67, (1, 9)).astype(np.int32)
    engine = CpuEngine(checkpoint, threads=2)
    state = engine.new_state()
    got = np.concatenate([engine.forward(ids[:, i : i + 1], state) for i in range(9)], axis=1)
    np.testing.assert_allclose(got[0], NumpyModel(checkpoint).logits(ids[0]), rtol=0, atol=3e-5)
    np.testing.assert_array_equal(engine.forward(ids, engine.new_state()), got)


@pytest.mark.parametrize("format", ["float32", "mixed", "planes", "transformed"])
@pytest.mark.parametrize("name", SPECS)
def test_the_torch_reference_agrees(format: str, name: str) -> None:
    pytest.importorskip("torch")
    from slimba.runtime.backends.reference import ReferenceEngine

    checkpoint = random_checkpoint(SPECS[name], 11, format)
    ids = np.random.default_rng(9).integers(0, checkpoint.spec.vocab_size, (2, 33)).astype(np.int32)
    reference, engine = ReferenceEngine(checkpoint), CpuEngine(checkpoint)
    want = reference.forward(ids, reference.new_state(2))
    np.testing.assert_allclose(engine.forward(ids, engine.new_state(2)), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", ["mixed", "planes", "transformed"])
@pytest.mark.parametrize("name", ["plain", "odd", "falcon"])
def test_chunks_threads_and_neighbours_change_nothing(
    isa: str, format: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: token by token, in odd pieces, in one long call, in a batch, with other thread counts."""
    monkeypatch.setenv("SLIMBA_CPU_ISA", isa)
    checkpoint = random_checkpoint(SPECS[name], 3, format)
    ids = np.random.default_rng(2).integers(0, checkpoint.spec.vocab_size, (5, 150)).astype(np.int32)
    engine = CpuEngine(checkpoint, threads=3)
    whole = engine.forward(ids, engine.new_state(5))
    single = CpuEngine(checkpoint, threads=1)
    for b in (0, 4):
        state = single.new_state()
        row = ids[b : b + 1]
        pieces = [single.forward(row[:, i : i + 1], state) for i in range(20)]
        cuts = [20, 53, 54, 150]
        pieces += [single.forward(row[:, i:j], state) for i, j in itertools.pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(pieces, axis=1)[0], whole[b])
    np.testing.assert_array_equal(engine.prefill(ids, engine.new_state(5)), whole[:, -1])


def test_nll_is_log_softmax_of_the_logits() -> None:
    checkpoint = random_checkpoint(SPECS["plain"], 4, "mixed")
    ids = np.random.default_rng(3).integers(0, 67, (3, 131)).astype(np.int32)
    engine = CpuEngine(checkpoint)
    logits = engine.forward(ids[:, :-1], engine.new_state(3)).astype(np.float64)
    top = logits.max(axis=-1, keepdims=True)
    logp = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    want = -np.take_along_axis(logp, ids[:, 1:, None], axis=-1)[..., 0]
    state = engine.new_state(3)
    pieces = [engine.nll(ids[:, i:j], ids[:, i + 1 : j + 1], state) for i, j in ((0, 50), (50, 130))]
    got = np.concatenate(pieces, axis=1)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_states_clone_and_reset() -> None:
    engine = CpuEngine(random_checkpoint(SPECS["odd"], 5), threads=1)
    ids = np.array([[1, 2, 3]], np.int32)
    state = engine.new_state()
    first = engine.forward(ids, state)
    twin = state.clone()
    np.testing.assert_array_equal(engine.forward(ids, state), engine.forward(ids, twin))
    state.reset()
    np.testing.assert_array_equal(engine.forward(ids, state), first)
    assert engine.forward(ids[:, :0], state).shape == (1, 0, 41)


SETTINGS = [
    SamplingParams(max_new_tokens=9),
    SamplingParams(max_new_tokens=9, temperature=0.8, seed=7, repetition_penalty=1.3),
    SamplingParams(max_new_tokens=9, temperature=1.5, top_k=20, top_p=0.9, min_p=0.02, seed=2**64 - 1, n_valid=50),
]


@pytest.mark.parametrize("params", SETTINGS)
def test_generation_follows_the_sampling_reference(params: SamplingParams) -> None:
    engine = CpuEngine(random_checkpoint(SPECS["plain"], 6, "mixed"), threads=2)
    prompt = np.random.default_rng(4).integers(0, 67, (3, 11)).astype(np.int32)
    pieces = list(engine.generate(prompt, engine.new_state(3), params, stride=4))
    assert [p.shape[1] for p in pieces] == [4, 4, 1]
    got = np.concatenate(pieces, axis=1)
    again = np.concatenate(list(engine.generate(prompt, engine.new_state(3), params, stride=1)), axis=1)
    np.testing.assert_array_equal(got, again)
    for b in range(3):
        state = engine.new_state()
        logits = engine.prefill(prompt[b : b + 1], state)[0]
        seen = {int(t) for t in prompt[b]}
        for i in range(9):
            token = sample(logits, seen, params, b, i)
            assert token == got[b, i]
            seen.add(token)
            logits = engine.forward(np.array([[token]], np.int32), state)[0, 0]


def test_stop_ids_end_a_sequence_and_its_neighbours_go_on() -> None:
    engine = CpuEngine(random_checkpoint(SPECS["plain"], 6, "mixed"), threads=1)
    prompt = np.random.default_rng(5).integers(0, 67, (3, 5)).astype(np.int32)
    params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=1)
    free = np.concatenate(list(engine.generate(prompt, engine.new_state(3), params)), axis=1)
    stop = int(free[1, 4])
    stopped = dataclasses.replace(params, stop_ids=(stop,))
    got = np.concatenate(list(engine.generate(prompt, engine.new_state(3), stopped, stride=5)), axis=1)
    for b in range(3):
        at = np.flatnonzero(free[b] == stop)
        end = int(at[0]) + 1 if at.size else 12
        np.testing.assert_array_equal(got[b, :end], free[b, :end])
        assert (got[b, end:] == -1).all()
    every = dataclasses.replace(params, stop_ids=tuple(range(67)))
    assert [p.shape for p in engine.generate(prompt, engine.new_state(3), every, stride=5)] == [(3, 1)]


def test_sampler_twin() -> None:
    """The C++ sampler chooses what runtime/sampling.py chooses, over many settings and a vocabulary with ties."""
    rng = np.random.default_rng(6)
    for i in range(400):
        logits = np.round(rng.standard_normal(int(rng.integers(1, 700))) * 4, 1).astype(np.float32)
        params = SamplingParams(
            temperature=float(rng.choice([0, 0.3, 1, 2.5])),
            top_k=int(rng.choice([0, 1, 5, 1000])),
            top_p=float(rng.choice([1, 0.9, 0.2, 1e-9])),
            min_p=float(rng.choice([0, 0.05, 1])),
            repetition_penalty=float(rng.choice([1, 1.4, 0.7])),
            seed=int(rng.integers(0, 2**63)),
            n_valid=int(rng.choice([0, len(logits), max(1, len(logits) // 2)])),
        )
        seen = rng.integers(0, len(logits), 9).astype(np.int32)
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "n_valid")
        numbers = {name: float(getattr(params, name)) for name in names}
        got = _core.sample(logits, seen, numbers, params.seed, i, 3 * i)
        assert got == sample(logits, seen.tolist(), params, i, 3 * i), params
    assert _core.uniform(2**64 - 1, 3, 5) == uniform(2**64 - 1, 3, 5)


def test_weights_that_overflow_are_named_not_sampled() -> None:
    checkpoint = random_checkpoint(SPECS["plain"], 7)
    checkpoint.tensors["backbone.embeddings.weight"][5] = np.nan  # type: ignore[index]
    engine = CpuEngine(checkpoint, threads=1)
    prompt = np.array([[1, 2]], np.int32)
    with pytest.raises(UserError, match="NaN or infinity at id 5"):
        next(engine.generate(prompt, engine.new_state(), SamplingParams()))
    with pytest.raises(UserError, match="NaN or infinity"):
        engine.nll(prompt, prompt, engine.new_state())


def test_bad_input_is_refused_by_name() -> None:
    checkpoint = random_checkpoint(SPECS["plain"], 8)
    engine = CpuEngine(checkpoint, threads=1)
    state = engine.new_state(2)
    good = np.zeros((2, 3), np.int32)
    for ids, words in [
        (np.array([[0, 67], [0, 0]]), "id 67 is outside 0..66"),
        (np.array([[0, -1], [0, 0]]), "-1"),
        (np.array([[0, 2**40], [0, 0]]), "no token id"),
        (np.zeros((3, 2), np.int32), "batch of 3"),
        (np.zeros(3, np.int32), "shape"),
        (np.zeros((2, 3)), "integers"),
    ]:
        with pytest.raises(UserError, match=words):
            engine.forward(ids, state)
    with pytest.raises(UserError, match="empty"):
        engine.prefill(good[:, :0], state)
    with pytest.raises(UserError, match="targets are"):
        engine.nll(good, good[:, :2], state)
    with pytest.raises(UserError, match="batch is 0"):
        engine.new_state(0)
    with pytest.raises(UserError, match=r"GB.*smaller batch"):
        engine.new_state(10**10)
    with pytest.raises(UserError, match="another shape"):
        engine.forward(good, CpuEngine(random_checkpoint(SPECS["odd"], 8), threads=1).new_state(2))
    with pytest.raises(UserError, match=r"float16.*known are float32, bfloat16, int8"):
        CpuEngine(checkpoint, state_dtype="float16")
    with pytest.raises(UserError, match="another shape"):
        engine.forward(good, CpuEngine(checkpoint, threads=1, state_dtype="int8").new_state(2))
    with pytest.raises(UserError, match="threads"):
        CpuEngine(checkpoint, threads=0)
    with pytest.raises(UserError, match="n_valid"):
        next(engine.generate(good, state, SamplingParams(n_valid=68)))


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMBA_CPU_ISA", "sse9")
    with pytest.raises(UserError, match="sse9"):
        CpuEngine(random_checkpoint(SPECS["plain"], 8))


def test_an_interrupt_stops_a_long_prompt_and_spoils_only_its_state() -> None:
    """Ctrl-C, here an alarm whose handler raises, ends the call within moments; the state says what to do."""
    if not hasattr(signal, "setitimer"):
        pytest.skip("no timers on this system")
    engine = CpuEngine(random_checkpoint(SPECS["four-groups"], 12), threads=1)
    state = engine.new_state()
    ids = np.ones((1, 2_000_000), np.int32)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            engine.prefill(ids, state)
        assert time.monotonic() - start < 10
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(UserError, match=r"interrupted.*reset"):
        engine.prefill(ids[:, :3], state)
    state.reset()
    np.testing.assert_array_equal(engine.prefill(ids[:, :3], state), engine.prefill(ids[:, :3], engine.new_state()))


def _child(engine: CpuEngine, ids: np.ndarray, queue: multiprocessing.Queue) -> None:
    queue.put(engine.forward(ids, engine.new_state(1)))


def test_the_pool_survives_a_fork() -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork on this system")
    engine = CpuEngine(random_checkpoint(SPECS["plain"], 9), threads=3)
    ids = np.arange(40, dtype=np.int32)[None]
    want = engine.forward(ids, engine.new_state())
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(engine, ids, queue))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=60), want)
    child.join(60)
    np.testing.assert_array_equal(engine.forward(ids, engine.new_state()), want)


def test_default_threads() -> None:
    assert 1 <= default_threads() <= 4096
