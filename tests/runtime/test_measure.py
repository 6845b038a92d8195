"""The figures behind `slimba bench`: traffic against the published count, the red check, sane random models."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.numpy_reference import mamba1_spec, mamba2_spec
from slimba.errors import UserError
from slimba.formats.presets import PRESETS
from slimba.models.configs import named_spec
from slimba.models.spec import ModelSpec
from slimba.runtime import measure
from slimba.runtime.backends.cpu import CpuEngine

SPECS = [mamba2_spec(), mamba2_spec(tie_embeddings=False), mamba1_spec()]


@pytest.mark.parametrize("format", PRESETS)
@pytest.mark.parametrize("spec", SPECS)
def test_random_models_of_every_format_pass_the_check(spec: ModelSpec, format: str) -> None:
    model = measure.random_model(spec, format, rank=4)
    assert 0 <= measure.check(model, threads=1, activations="int8") <= 1e-4
    logits = CpuEngine(model, threads=1).forward(np.arange(8, dtype=np.int32)[None], CpuEngine(model).new_state())
    assert 0.05 < np.abs(logits).max() < 50


def test_the_check_goes_red_on_wrong_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = CpuEngine.forward

    def broken(self: CpuEngine, ids: np.ndarray, state: object) -> np.ndarray:
        return forward(self, ids, state) * (1 if self.isa == "portable" else 1.01)  # type: ignore[arg-type]

    monkeypatch.setattr(CpuEngine, "forward", broken)
    model = measure.random_model(SPECS[0], "dfssm", rank=4)
    if CpuEngine(model).isa == "portable":
        pytest.skip("this machine has only the portable kernels")
    with pytest.raises(UserError, match="no speed is printed"):
        measure.check(model, threads=1)


def test_the_check_goes_red_on_wrong_int8_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = CpuEngine.forward

    def broken(self: CpuEngine, ids: np.ndarray, state: object) -> np.ndarray:
        return forward(self, ids, state) * (1.001 if self.activations == "int8" and ids.shape[1] == 1 else 1)  # type: ignore[arg-type]

    monkeypatch.setattr(CpuEngine, "forward", broken)
    model = measure.random_model(SPECS[0], "dfssm", rank=4)
    measure.check(model, threads=1)
    with pytest.raises(UserError, match="int8 activations differ"):
        measure.check(model, threads=1, activations="int8")


def test_traffic_of_the_published_layout_is_the_honest_count() -> None:
    """275.6 MB of weights, 201.3 MB of float32 state and 5.0 MB of convolution state at batch 1 (Mamba-2 1.3B)."""
    model = measure.random_model(named_spec("mamba2-1.3b"), "dfssm-published")
    moved = measure.traffic(model)
    assert moved.weights == pytest.approx(275_596_640, rel=2e-4)
    conv, entries = 2 * 3 * 4352 * 4, 64 * 64 * 128
    wide, narrow = (64 * 64 + 128) * 4 + 256, (64 * 64 + 128) * 2 + 256  # a token in the buffer
    assert moved.per_sequence == 48 * (4 * entries * 17 // 16 + conv + 15 * wide // 2 + wide)
    assert moved.step(8) == moved.weights + 8 * moved.per_sequence
    want = 48 * (2 * entries * 17 // 16 + conv + 15 * narrow // 2 + narrow)
    assert measure.traffic(model, "bfloat16").per_sequence == want
    rows = 64 * 64 * (128 + 4)
    want = 48 * (rows + rows // 16 + conv + 15 * narrow // 2 + narrow)
    assert measure.traffic(model, "int8").per_sequence == want


def test_an_untied_embedding_is_read_by_the_row() -> None:
    tied, untied = (measure.traffic(measure.random_model(spec, "float32")) for spec in SPECS[:2])
    assert untied.weights == tied.weights
    assert untied.per_sequence == tied.per_sequence + 40 * 4


def test_speeds_are_consistent() -> None:
    model = measure.random_model(SPECS[0], "dfssm", rank=4)
    engine = CpuEngine(model, threads=2)
    row = measure.decode_speed(engine, measure.traffic(model), 1e9, batch=3, new_tokens=11)
    assert len(row.times) == measure.REPEATS and min(row.times) <= row.time <= max(row.times)
    assert row.share == pytest.approx(row.floor / row.time)
    assert row.tokens_per_second == pytest.approx(3 / row.time)
    faster = row.against(2e9)
    assert faster.share == pytest.approx(row.share / 2) and faster.time == row.time
    first = measure.prefill_speed(engine, batch=2, prompt_len=7)
    assert first.tokens_per_second == pytest.approx(14 / first.time_to_first_token)
    assert measure.bandwidth(1, 1 << 24) > 1e8
    assert measure.machine(2)["threads"] == 2
