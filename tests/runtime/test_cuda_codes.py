"""CudaEngine on models of floats and of codes: the kernels that take their widths, run on this processor.

Run: `pytest tests/runtime/test_cuda_codes.py`. What needs a GPU is in benchmarks/quamba2_gpu.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from kernels.cuda_host import host_gpu
from runtime.numpy_reference import mamba2_spec, random_matrix

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("format", ["w8a8", "w4a16", "w4a8", "float16", "bfloat16", "int8"])
def test_kernels_for_codes_are_those_for_any_matrix(format: str) -> None:
    """A width that codes.cuh and stream.cuh take: in_proj and out_proj in one go, the head in several."""
    from slimba.runtime.backends.cuda import CudaEngine
    from slimba.runtime.backends.cuda_codes import Codes
    from slimba.runtime.backends.cuda_stream import Stream
    from slimba.runtime.measure import random_model

    spec = mamba2_spec(d_model=512, d_inner=1024, headdim=64, d_state=64, n_layer=2, vocab_size=530)
    checkpoint = random_model(spec, format)
    ids = np.random.default_rng(0).integers(0, 530, (1, 4)).astype(np.int32)
    got = []
    for gpu in (host_gpu(), host_gpu(blocks=12, bakes=True)):
        cuda = CudaEngine(checkpoint, gpu=gpu)
        state = cuda.new_state()
        got.append(np.stack([cuda.step(ids[:, t], state).numpy().copy() for t in range(4)]))
    step = cuda.stepper(state)
    assert sum(isinstance(v, Codes | Stream) for v in step._lean.values()) >= 4  # type: ignore[attr-defined]
    difference = np.abs(got[0] - got[1]).max() / np.abs(got[0]).max()
    assert difference < (0.05 if format.endswith("a8") else 1e-5)


@pytest.mark.parametrize(
    "format", ["dfssm", "float16", "w4a16", *(pytest.param(f, marks=pytest.mark.slow) for f in ("int8", "bfloat16"))]
)
def test_the_head_chooses_and_embeds_as_the_kernels_apart(format: str) -> None:
    """Eleven tokens, so that eight steps follow each other; ids from n_valid on are not chosen, and a NaN is seen."""
    from slimba.errors import UserError
    from slimba.runtime.backends.cuda import CudaEngine
    from slimba.runtime.engine import SamplingParams
    from slimba.runtime.measure import random_model

    spec = mamba2_spec(d_model=512, d_inner=1024, headdim=64, d_state=64, n_layer=2, vocab_size=530)
    checkpoint = random_model(spec, format)
    prompt = np.random.default_rng(0).integers(0, 530, (1, 3)).astype(np.int32)
    chosen, logits = [], []
    for gpu in (host_gpu(), host_gpu(blocks=12, bakes=True)):
        cuda = CudaEngine(checkpoint, gpu=gpu)
        for n_valid in (0, 200):
            state, params = cuda.new_state(), SamplingParams(max_new_tokens=12, n_valid=n_valid)
            chosen.append(np.concatenate(list(cuda.generate(prompt, state, params, stride=16)), axis=1)[0].tolist())
            logits.append(cuda.step(np.array([7], np.int32), state).numpy().copy())
            assert int(state.pos[0]) == 3 + 11 + 1
    assert cuda.stepper(state)._chooses  # type: ignore[attr-defined]
    assert chosen[0] == chosen[2] and chosen[1] == chosen[3] and max(chosen[1]) < 200 <= max(chosen[0])
    np.testing.assert_allclose(logits[2:], logits[:2], rtol=0, atol=1e-5 * np.abs(logits[0]).max())
    cuda.model.norm_f[3] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        cuda._steps_ahead(prompt[:, 0], cuda.new_state(), 2, SamplingParams(), 0)


@pytest.mark.parametrize("width", [768, 1024, 1536, 2048, 2560])
def test_projections_of_published_widths_have_a_kernel_of_their_own(width: int) -> None:
    """On 132 multiprocessors, int4: the kernel for any shape took half of the time of a step where one had none."""
    from slimba.formats import MatrixLayout, Segment
    from slimba.runtime.backends.cuda_codes import codes_of
    from slimba.runtime.backends.cuda_weights import DeviceMatrix

    rng = np.random.default_rng(0)
    for cols, rows in (width, 4 * width + 256 + width // 32), (2 * width, width):
        layout = MatrixLayout(cols, (Segment(rows, "int4"),), hadamard=cols & -cols)
        codes = codes_of(DeviceMatrix(random_matrix(rng, layout), torch.device("cpu"), 132), 132, 1, False)
        assert codes is not None and not codes.loop
        assert codes.tiles * 132 * 16 >= rows and codes.warps * codes.pieces * 256 == cols


@pytest.mark.parametrize("format", ["float16", "bfloat16", "int8", "w8a8"])
def test_few_sequences_of_uncompressed_models(format: str) -> None:
    from slimba.runtime.backends.cuda import CudaEngine
    from slimba.runtime.backends.reference import ReferenceEngine
    from slimba.runtime.measure import random_model

    spec = mamba2_spec(d_model=256, d_inner=512, headdim=64, d_state=64, n_layer=2, vocab_size=530)
    checkpoint = random_model(spec, format)
    ids = np.random.default_rng(0).integers(0, 530, (3, 4)).astype(np.int32)
    cuda = CudaEngine(checkpoint, gpu=host_gpu(blocks=12, bakes=True))
    state = cuda.new_state(3)
    got = np.stack([cuda.step(ids[:, t], state).numpy().copy() for t in range(4)], axis=1)
    names = [a[0] for a, _ in cuda.stepper(state)._launches]  # type: ignore[attr-defined]
    assert sum(name.startswith("slimba_few") for name in names) == 5
    reference = ReferenceEngine(checkpoint)
    want = reference.forward(ids, reference.new_state(3))
    assert np.abs(got - want).max() < (0.1 if format == "w8a8" else 0.01) * np.abs(want).max()


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("format", ["w8a8", "w4a16", "w4a8"])
def test_batches_of_quamba2_files(format: str, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels for many sequences, and by cuBLAS over expanded matrices."""
    from slimba.runtime.backends.cuda import CudaEngine
    from slimba.runtime.backends.reference import ReferenceEngine
    from slimba.runtime.measure import random_model

    monkeypatch.setattr("slimba.runtime.backends.cuda_batch.BatchStep.WIDE_FROM", 2 if wide else 99)
    checkpoint = random_model(mamba2_spec(d_model=128, d_inner=256, headdim=64, d_state=64, n_layer=2), format)
    ids = np.random.default_rng(0).integers(0, 67, (3, 3)).astype(np.int32)
    want = []
    for activations in (None, "float32"):
        reference = ReferenceEngine(checkpoint, activations=activations)
        want.append(reference.forward(ids, reference.new_state(3)))
    cuda = CudaEngine(checkpoint, gpu=host_gpu())
    state = cuda.new_state(3)
    got = np.stack([cuda.step(ids[:, t], state).numpy().copy() for t in range(3)], axis=1)
    assert type(cuda.stepper(state)).__name__ == "BatchStep"
    moved = np.abs(want[1] - want[0]).max()
    assert np.abs(got - want[0]).max() < max(0.02 * np.abs(want[0]).max(), moved)
