"""The correctness ladder (docs/decisions.md) on a real model: the bundled teacher and a one-bit model made from it.

Rungs, each a test here: 1 our network = transformers; 2 formats on real weights; 3 the deployed student = the packed
file; 4 the CPU engine = the torch reference, in any chunking; 5 the same perplexity from both engines.
Random models of odd shapes stand in tests/models, tests/formats, tests/methods and tests/runtime.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.convert import convert_checkpoint
from slimba.checkpoints.packed import read_packed, write_packed
from slimba.checkpoints.reader import open_checkpoint
from slimba.data.batches import WindowBatches
from slimba.data.text import documents, encode_documents
from slimba.data.tokenizer import Tokenizer
from slimba.evaluation.perplexity import evaluate
from slimba.formats import Matrix, MatrixLayout
from slimba.methods.dfssm.recipe import DfssmRecipe
from slimba.methods.dfssm.run import build
from slimba.models.lm import SSMForCausalLM, load_weights
from slimba.runtime.api import LoadedModel
from slimba.runtime.load import load
from slimba.training.recipes import load_recipe

TEXT = Path(str(files("slimba.assets") / "demo-text" / "heldout.txt"))
TOLERANCE = 2e-4  # logits of the CPU engine against the reference's, both float32: sums in another order


@pytest.fixture(scope="module")
def teacher() -> Checkpoint:
    return open_checkpoint("demo-teacher")


@pytest.fixture(scope="module")
def ids(teacher: Checkpoint) -> np.ndarray:
    assert teacher.tokenizer_file is not None
    words = Tokenizer.from_file(teacher.tokenizer_file)
    return encode_documents(words, documents([TEXT]), teacher.spec.bos_token_id)


@pytest.fixture(scope="module")
def student(teacher: Checkpoint, ids: np.ndarray):
    """Fitted, not trained: what matters here is that every number survives packing."""
    recipe = load_recipe(DfssmRecipe, "dfssm.yaml", None, {"window": 128, "batch": 4, "calibration_windows": 4})
    return build(teacher, recipe, WindowBatches(ids, 128, 4), torch.device("cpu"), True)[0]


@pytest.fixture(scope="module")
def packed(teacher: Checkpoint, student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "one-bit"
    checkpoint = Checkpoint(
        spec=teacher.spec,
        layouts=student.layouts,
        tensors=student.export(),
        tokenizer_file=teacher.tokenizer_file,
    )
    return write_packed(checkpoint, out)


@pytest.fixture(scope="module", params=["teacher", "one-bit"])
def engines(request: pytest.FixtureRequest, packed: Path) -> tuple[LoadedModel, LoadedModel]:
    """The same files under the CPU engine and the torch reference."""
    name = "demo-teacher" if request.param == "teacher" else packed
    return load(name, backend="cpu", threads=1), load(name, backend="reference")


def test_rung_1_our_network_is_transformers(teacher: Checkpoint, ids: np.ndarray, tmp_path: Path) -> None:
    convert_checkpoint(teacher, tmp_path / "hf", to="transformers", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ours = SSMForCausalLM(teacher.spec)
    load_weights(ours, teacher)
    x = torch.from_numpy(ids[:131]).long()[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits, rtol=0, atol=1e-4)


def test_rung_2_formats_on_real_weights(teacher: Checkpoint) -> None:
    name = "backbone.layers.3.mixer.in_proj"
    w = teacher.matrix(name).dequantize()
    x = np.random.default_rng(0).normal(size=(3, w.shape[1])).astype(np.float32)
    errors = {}
    for fmt in ("float32", "float16", "int8", "int4", "sign"):
        m = Matrix.quantize(w, MatrixLayout.plain(*w.shape, fmt))
        again = Matrix.quantize(m.dequantize(), m.layout) if fmt != "sign" else m
        assert all(np.array_equal(m.arrays[k], again.arrays[k]) for k in m.arrays if k != "0.scale"), fmt
        np.testing.assert_allclose(m.matmul(x), x @ m.dequantize().T, rtol=1e-4, atol=1e-4)
        errors[fmt] = float(np.square(m.dequantize() - w).sum() / np.square(w).sum())
    assert errors["float32"] == errors["float16"] == 0  # the teacher is stored in float16
    assert 0 < errors["int8"] < 1e-3 < errors["int4"] < 0.03 < errors["sign"] < 0.6


def test_rung_3_the_deployed_student_is_the_packed_file(student, packed: Path, ids: np.ndarray) -> None:
    file = read_packed(packed)
    with student.deployed(), torch.no_grad():
        weights = {name: w.numpy() for name, w in student.effective().items()}
    for name in file.spec.matrices():
        stored, w = file.matrix(name), weights[name + ".weight"]
        factors = stored.lowrank_factors()
        if factors is None:
            assert np.array_equal(w, stored.dequantize()), name
        else:  # the product of the factors is summed in another order by torch
            np.testing.assert_allclose(w, stored.dequantize(), rtol=0, atol=1e-6, err_msg=name)
    for name in file.spec.vectors():
        assert np.array_equal(weights[name], file.vector(name)), name
    reference = SSMForCausalLM(file.spec)
    load_weights(reference, file)
    x = torch.from_numpy(ids[:200]).long()[None]
    with torch.no_grad():
        deployed = torch.func.functional_call(reference, {n: torch.from_numpy(w) for n, w in weights.items()}, (x,))
        torch.testing.assert_close(deployed, reference(x), rtol=0, atol=1e-4)


def test_rung_4_the_cpu_engine_is_the_reference(engines: tuple[LoadedModel, LoadedModel], ids: np.ndarray) -> None:
    cpu, reference = engines
    x = ids[:1500]
    ours, theirs = cpu.logits(x), reference.logits(x)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    agree = ours.argmax(-1) == theirs.argmax(-1)
    best = np.sort(theirs, axis=-1)[:, -2:]
    clear = best[:, 1] - best[:, 0] > TOLERANCE
    assert clear.mean() > 0.99, "the tolerance must not swallow the test"
    assert agree.mean() >= 0.99
    assert agree[clear].all()


def test_rung_4_any_chunking_is_token_by_token(packed: Path, ids: np.ndarray) -> None:
    model = load(packed, backend="cpu", threads=1)
    x = ids[None, :150]
    whole = model.engine.forward(x, model.engine.new_state())
    for cuts in ([1] * 150, [7, 64, 1, 78], [149, 1]):
        state, at, pieces = model.engine.new_state(), 0, []
        for n in cuts:
            pieces.append(model.engine.forward(x[:, at : at + n], state))
            at += n
        np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=0, atol=1e-4)


def test_rung_5_both_engines_measure_the_same(engines: tuple[LoadedModel, LoadedModel], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text("utf-8")[:24_000], "utf-8")
    cpu, reference = (evaluate(m, [text], window=256) for m in engines)
    assert cpu.tokens == reference.tokens > 4000
    assert cpu.perplexity == pytest.approx(reference.perplexity, rel=5e-3)
    assert cpu.perplexity < 1000, "even a model that was only fitted is far better than chance among 4096"
