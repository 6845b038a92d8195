"""A recipe of stages: the same bits as its methods one by one, resumed where it was cut, refused before it starts.

Run: `pytest tests/methods/test_stages.py`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimba.methods.dfssm.run as dfssm
import slimba.methods.ptq.run as ptq
from helpers.tiny import TEXT, tiny_directory
from kernels.cuda_host import host_gpu
from slimba import compress
from slimba.checkpoints.packed import read_packed
from slimba.cli.main import main
from slimba.data.batches import WindowBatches
from slimba.errors import UserError
from slimba.runtime.load import load

DFSSM = "{method: dfssm, tokens: 640, window: 32, batch: 2, calibration_windows: 2, rank: 2, float_rows: [out]"
DFSSM += ", int8_rows: [dt], plane: 0.3, plane_rows: [x], embedding: float16}"
PTQ = "{method: ptq, tokens: 128, window: 32, int4_rows: [out], int8_rows: [embedding]}"
RECIPE = f"stages:\n  - {DFSSM}\n  - {PTQ}\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_directory(tmp_path / "teacher")
    Path("text.txt").write_text(TEXT * 20, "utf-8")
    Path("stages.yaml").write_text(RECIPE)
    return tmp_path


def run(out: str, **more: Any) -> dict[str, Any]:
    return compress("teacher", out, recipe="stages.yaml", data=["text.txt"], device="cpu", **more)


def weights(out: str) -> bytes:
    return Path(out, "model.safetensors").read_bytes()


def test_two_stages_are_the_two_methods_one_after_the_other(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["compress", "teacher", "out", "--recipe", "stages.yaml", "--data", "text.txt", "--json", "run.json"]
    assert main(line) == 0
    assert "768 tokens" in capsys.readouterr().out
    Path("one.yaml").write_text(DFSSM.replace("tokens: 640, ", ""))
    Path("two.yaml").write_text(PTQ.replace("tokens: 128, ", ""))
    compress("teacher", "one", recipe="one.yaml", data=["text.txt"], tokens=640, device="cpu")
    compress("one", "two", recipe="two.yaml", data=["text.txt"], tokens=128, device="cpu")
    assert weights("out") == weights("two") != weights("one")

    model = read_packed(Path("out"))
    formats = {name: [s.format for s in layout.segments] for name, layout in model.layouts.items()}
    assert formats["backbone.layers.0.mixer.in_proj"] == ["sign", "int8"]
    assert formats["backbone.layers.1.mixer.out_proj"] == ["int4"]
    assert formats["backbone.embeddings"] == ["int8"]
    record = json.loads(Path("run.json").read_text())
    assert model.provenance["stages"] == record["stages"]
    assert [s["method"] for s in record["stages"]] == ["dfssm", "ptq"]
    assert record["tokens"] == 640 + 128 and set(record["final"]) >= {"dfssm.kl", "ptq.error"}
    assert not Path("out.work").exists() and Path("out/training.jsonl").is_file()
    card = Path("out/README.md").read_text()
    assert "## Stage 1: dfssm" in card and "## Stage 2: ptq" in card
    assert "a second sign plane on 30% of the columns in the rows x" in card
    assert "rank 2; int8 in the rows dt; float16 in the rows out" in card and "out at int4" in card
    assert len(load("out", backend="cpu").generate("The sea", max_new_tokens=3).ids) >= 1


def test_every_engine_runs_what_the_stages_leave(here: Path) -> None:
    """Signs with int8 rows and a second plane in in_proj, int4 in out_proj; the CUDA kernels on this processor."""
    from slimba.runtime.backends.cuda import CudaEngine

    run("out")
    packed = read_packed(Path("out"))
    ids = np.random.default_rng(0).integers(0, packed.spec.vocab_size, (1, 6)).astype(np.int32)
    cuda = CudaEngine(packed, gpu=host_gpu())
    state = cuda.new_state()
    got = {"cuda": np.stack([cuda.step(ids[:, t], state).numpy().copy() for t in range(6)], axis=1)}
    for name in ("cpu", "reference"):
        got[name] = load("out", backend=name).logits(ids[0])[None]
    for name in ("cpu", "cuda"):
        np.testing.assert_allclose(got[name], got["reference"], rtol=0, atol=1e-3 * np.abs(got["reference"]).max())
    plain = load("teacher", backend="reference").logits(ids[0])
    assert np.abs(plain - got["reference"][0]).max() > 1e-2 * np.abs(plain).max()  # the stages did something


def test_resume_passes_over_the_stage_that_is_done(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("whole")
    with monkeypatch.context() as m:
        m.setattr(ptq, "quantised", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    assert Path("cut.work/stage-1/model.safetensors").is_file() and not Path("cut").exists()
    with monkeypatch.context() as m:
        m.setattr(dfssm, "train", interrupted)  # stage 1 is not run again
        run("cut", resume=True)
    assert weights("cut") == weights("whole")
    assert not Path("cut.work").exists()


def test_resume_continues_within_a_stage(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("whole")
    seen: list[int] = []
    usual = WindowBatches.__getitem__

    def batch(self: WindowBatches, step: int) -> Any:
        seen.append(step)
        return interrupted() if step == 6 and seen.count(6) == 1 else usual(self, step)

    monkeypatch.setattr(WindowBatches, "__getitem__", batch)
    monkeypatch.setattr(dfssm, "LoopSettings", functools.partial(dfssm.LoopSettings, save_every_s=0.0, log_every=1))
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    run("cut", resume=True)
    assert weights("cut") == weights("whole")
    assert seen[:7] == list(range(7)) and seen[7] > 0, "the second run began where the first was saved"


def interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_resume_with_another_recipe_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m:
        m.setattr(ptq, "quantised", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    Path("stages.yaml").write_text(RECIPE.replace("int4_rows: [out]", "int4_rows: []"))
    with pytest.raises(UserError, match="stages differs from the interrupted run's"):
        run("cut", resume=True)
    assert Path("cut.work/stage-1").is_dir(), "nothing is thrown away"


BAD = {
    "nothing in the list": ("stages: []", "", "must be a list of mappings"),
    "settings beside the stages": (f"rank: 4\n{RECIPE}", "", "'rank' stands beside stages"),
    "a stage without a method": ("stages: [{rank: 4}]", "", "stage 1 names no method"),
    "an unknown method": (f"stages: [{DFSSM}, {{method: magic}}]", "", "stage 2: unknown method 'magic'"),
    "an unknown setting": (f"stages: [{DFSSM}, {{method: ptq, rank: 4}}]", "", "stage 2: unknown setting 'rank'"),
    "tokens that are none": ("stages: [{method: dfssm, tokens: many}]", "", "tokens of stage 1 is 'many'"),
    "tokens given apart": (RECIPE, "--tokens 64", "hold their own tokens"),
    "settings given apart": (RECIPE, "--set rank=3", "hold their own settings"),
    "a method given apart": (RECIPE, "--method ptq", "hold their own method"),
    "rows that stage 1 has made signs": (
        RECIPE.replace("int4_rows: [out]", "int4_rows: [z]"),
        "",
        "stage 2 (ptq): the z rows of backbone.layers.0.mixer.in_proj are sign already",
    ),
    "quamba2 after another": (
        f"stages: [{DFSSM}, {{method: quamba2}}]",
        "",
        "stage 2 (quamba2): quamba2 begins from a float model, but backbone.layers.0.mixer.in_proj is sign and int8",
    ),
    "what quamba2 has rounded once more": (
        f"stages: [{{method: quamba2}}, {PTQ}]",
        "",
        "stage 2 (ptq): the embedding rows of backbone.embeddings are int8 already",
    ),
    "dfssm after another": (f"stages: [{PTQ}, {DFSSM}]", "", "stage 2 (dfssm): dfssm begins from a float model"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_recipe_is_refused_before_anything_runs(
    here: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    text, options, message = BAD[name]
    Path("stages.yaml").write_text(text)
    before = sorted(here.rglob("*"))
    assert main(f"compress teacher out --recipe stages.yaml --data text.txt {options}".split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert sorted(here.rglob("*")) == before
