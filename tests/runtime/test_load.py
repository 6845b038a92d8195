"""load() and LoadedModel on both backends: prompts, policies, errors. `pytest tests/runtime/test_load.py`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import slimba
from helpers.bigram import BigramEngine
from helpers.tiny import TEXT, tiny_checkpoint, tiny_directory, tiny_tokenizer
from slimba.data.tokenizer import Tokenizer
from slimba.errors import UserError
from slimba.runtime import load as load_module
from slimba.runtime.api import LoadedModel
from slimba.runtime.load import load

BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(not load_module._has_core(), reason="the C++ core is not built")),
    pytest.param(
        "reference", marks=pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
    ),
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("models") / "tiny", preset="dfssm")


@pytest.fixture
def bigram(tmp_path: Path) -> LoadedModel:
    file = tiny_tokenizer(tmp_path / "tokenizer.json")
    table = np.random.default_rng(0).standard_normal((304, 304)) * 3
    return LoadedModel(BigramEngine(table), tiny_checkpoint(tokenizer=file), Tokenizer.from_file(file))


@pytest.mark.parametrize("backend", BACKENDS)
def test_quick_start(packed: Path, backend: str) -> None:
    model = slimba.load(packed, backend=backend, threads=1)
    assert model.engine.name == backend and model.spec.architecture == "mamba2"
    out = model.generate("The sea", max_new_tokens=30, temperature=0.9, top_p=0.95, seed=3)
    assert 0 < len(out.ids) <= 30 and out.prompt_tokens == len(model.tokenizer.encode("The sea"))
    assert max(out.ids) < 300, "padding rows are never sampled"
    assert out.text == model.tokenizer.decode(i for i in out.ids if i not in model.stop_ids)
    stream = model.stream("The sea", max_new_tokens=30, temperature=0.9, top_p=0.95, seed=3)
    assert "".join(stream) == out.text and stream.generation.ids == out.ids
    ids = model.tokenizer.encode(TEXT)
    logits = model.logits(ids)
    assert logits.shape == (len(ids), 304) and logits.dtype == np.float32
    greedy = model.generate(ids, max_new_tokens=1)
    assert greedy.ids == [int(logits[-1, :300].argmax())]
    log_p = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    nll = -log_p[np.arange(16), ids[1:17]].mean()
    assert model.perplexity(ids[:17], window=16) == pytest.approx(np.exp(nll), rel=1e-4)
    file = packed.parent / "text.txt"
    file.write_text(TEXT)
    assert slimba.evaluate(packed, [file], window=32).perplexity > 1


@pytest.mark.skipif(not importlib.util.find_spec("torch") or not load_module._has_core(), reason="needs both backends")
def test_a_seed_gives_the_same_text_in_both_backends(packed: Path) -> None:
    cpu, reference = load(packed, backend="cpu", threads=1), load(packed, backend="reference")
    np.testing.assert_allclose(cpu.logits(range(5, 60)), reference.logits(range(5, 60)), atol=1e-4)
    for settings in ({}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01}):
        one, two = (m.generate(TEXT, max_new_tokens=40, seed=5, **settings) for m in (cpu, reference))
        assert one.ids == two.ids and one.text == two.text


def test_streams_stop_strings_and_batches(bigram: LoadedModel) -> None:
    free = bigram.generate("a", max_new_tokens=60, temperature=1.0, seed=2)
    assert free.text and "".join(bigram.stream("a", max_new_tokens=60, temperature=1.0, seed=2)) == free.text
    stop = free.text[7:10]
    cut = bigram.generate("a", max_new_tokens=60, temperature=1.0, seed=2, stop=[stop])
    assert cut.finish_reason == "stop" and cut.text == free.text[: free.text.index(stop)]
    assert "".join(bigram.stream("a", max_new_tokens=60, temperature=1.0, seed=2, stop=[stop])) == cut.text
    assert cut.ids == free.ids[: len(cut.ids)]
    many = bigram.generate(["a", "a"], max_new_tokens=60, temperature=1.0, seed=2)
    assert many[0].ids == free.ids
    assert many[1].ids == bigram.generate("a", max_new_tokens=60, temperature=1.0, seed=3).ids != free.ids


def test_state_continues_where_a_stream_ended(bigram: LoadedModel) -> None:
    state = bigram.engine.new_state()
    stream = bigram.stream([5, 6], state=state, max_new_tokens=4)
    next(iter(stream), None)
    stream.close()
    ids = stream.generation.ids
    assert ids and state.seen == [[5, 6, *ids[:-1]]]


def test_prompt_policies(tmp_path: Path) -> None:
    file = tiny_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)

    def model(**policy: object) -> LoadedModel:
        ckpt = tiny_checkpoint(tokenizer=file, **policy)
        engine = BigramEngine(np.zeros((304, 304)))
        engine.spec = ckpt.spec
        return LoadedModel(engine, ckpt, tokenizer)

    a = tokenizer.encode("a")
    assert model().prompt_ids("a").tolist() == a
    assert model(bos_token_id=7).prompt_ids("a").tolist() == a, "the policy decides, not the id's existence"
    assert model(bos_token_id=7, add_bos=True).prompt_ids("a").tolist() == [7, *a]
    assert model(bos_token_id=7, add_bos=True).prompt_ids(a).tolist() == a, "ids stay as they are"
    assert model(bos_token_id=7).prompt_ids("").tolist() == [7]
    assert model().stop_ids == (0,) and model(eos_token_id=None).stop_ids == (0,)
    assert model(eos_token_id=9).stop_ids == (9,)
    two = model(eos_token_id=9)
    two.checkpoint.generation = {"eos_token_id": [3, 9]}
    assert two.stop_ids == (3, 9)


def test_eos_ends_a_generation(tmp_path: Path) -> None:
    file = tiny_tokenizer(tmp_path / "tokenizer.json")
    table = np.zeros((304, 304))
    table[np.arange(303), np.arange(1, 304)] = 9  # the next id is one more
    engine = BigramEngine(table)
    ckpt = tiny_checkpoint(tokenizer=file, eos_token_id=99)
    engine.spec = ckpt.spec
    out = LoadedModel(engine, ckpt, Tokenizer.from_file(file)).generate([90], max_new_tokens=50)
    assert out.ids == list(range(91, 100)) and out.finish_reason == "eos"
    padded = LoadedModel(engine, ckpt, Tokenizer.from_file(file)).generate([298], max_new_tokens=5)
    assert padded.ids[0] == 299 and max(padded.ids) < 300


def test_without_a_tokenizer_ids_work_and_text_names_the_flag(packed: Path, tmp_path: Path) -> None:
    bare = tiny_directory(tmp_path / "bare", with_tokenizer=False)
    model = load(bare)
    assert model.tokenizer is None and model.logits([1, 2]).shape == (2, 304)
    out = model.generate([1, 2], max_new_tokens=3)
    assert out.text is None and out.ids
    for call in (lambda: model.generate("a"), lambda: model.perplexity("abc"), lambda: model.generate([1], stop=["a"])):
        with pytest.raises(UserError, match="--tokenizer"):
            call()
    named = load(bare, tokenizer=tiny_tokenizer(tmp_path / "t.json"))
    assert named.generate("a", max_new_tokens=2).text is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "tpu"}, "backend 'tpu' is not available in this version, known are auto, cpu, cuda, reference"),
        ({"backend": "tpu"}, "known are auto, cpu, cuda, reference"),
        ({"state_dtype": "fp8"}, "unknown state type 'fp8', known are fp32, bf16, int8"),
        ({"threads": 0}, "--threads is 0"),
        ({"tokenizer": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_bad_settings(packed: Path, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(packed, **settings)


def test_bad_prompts(packed: Path) -> None:
    model = load(packed)
    with pytest.raises(UserError, match="token id 304 is outside"):
        model.generate([1, 304])
    with pytest.raises(UserError, match="token id -1 is outside"):
        model.logits([-1])
    with pytest.raises(UserError, match="prompt is empty"):
        model.generate([])
    with pytest.raises(UserError, match="max_new_tokens"):
        model.generate("a", max_new_tokens=0)
    with pytest.raises(UserError, match="non-empty"):
        model.logits([])


def test_too_little_memory(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"GB of memory and 0\.0 GB are free"):
        load(packed)
    monkeypatch.undo()
    free = load_module.available_memory()
    assert free is None or free > 10_000_000


def test_missing_core_is_said(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "slimba._core", None)
    with pytest.warns(UserWarning, match="reference backend"):
        assert load(packed).engine.name == "reference"
    with pytest.raises(UserError, match="compiled core"):
        load(packed, backend="cpu")


def test_import_is_light_and_torch_free() -> None:
    code = """
import sys
import slimba
heavy = {"torch", "numpy", "tokenizers", "rich"} & set(sys.modules)
assert not heavy, heavy
assert "load" in dir(slimba) and slimba.ModelSpec.__name__ == "ModelSpec" and slimba.load.__name__ == "load"
assert slimba.compress.__name__ == "compress" and slimba.evaluate.__name__ == "evaluate"
assert "torch" not in sys.modules
try:
    slimba.nothing
except AttributeError as e:
    print(e)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "nothing" in run.stdout


def test_version_is_the_packages() -> None:
    import tomllib

    project = Path(__file__).parents[2] / "pyproject.toml"
    assert tomllib.loads(project.read_text())["project"]["version"] == slimba.__version__


def test_auto_without_a_usable_gpu_is_the_cpu_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available() or not load_module._has_core():
        pytest.skip("needs the C++ core and no usable GPU")
    assert load_module._choose("auto") is (load_module._gpu_or_cpu if load_module._has_gpu() else load_module._cpu)
    monkeypatch.setattr(load_module, "_has_gpu", lambda: True)
    with pytest.warns(UserWarning, match="the GPU is not used, the CPU engine runs instead: this PyTorch") as caught:
        model = load_module.load("demo-teacher", backend="auto")
    assert model.engine.name == "cpu" and len(caught) == 1
