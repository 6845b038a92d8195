"""`open_checkpoint`: what a MODEL argument may be. Run: pytest tests/checkpoints/test_reader.py"""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from slimba.checkpoints import reader
from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.mamba_ssm import write_mamba_ssm
from slimba.checkpoints.packed import write_packed
from slimba.checkpoints.reader import bundled_names, open_checkpoint
from slimba.checkpoints.transformers import write_transformers
from slimba.errors import UserError
from slimba.models.spec import ModelSpec

Make = Callable[..., Checkpoint]


def test_layouts(tmp_path: Path, make: Make, spec: ModelSpec) -> None:
    model = make(spec, "float16")
    for kind, write in (("slimba", write_packed), ("transformers", write_transformers), ("mamba-ssm", write_mamba_ssm)):
        assert open_checkpoint(write(model, tmp_path / kind)).kind == kind
        assert open_checkpoint(str(tmp_path / kind)).spec.n_layer == spec.n_layer


def test_what_is_no_model(tmp_path: Path) -> None:
    def refused(what: Path | str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            open_checkpoint(what)

    refused(tmp_path / "nothing", "no model called .*nothing: it is not a directory, nor a bundled model")
    refused("x" * 5000, "cannot open xxx")
    refused("demo-teachr", "no model called demo-teachr")
    refused(tmp_path, r"holds no config\.json")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03")
    refused(tmp_path, "holds a GGUF file")
    refused(tmp_path / "model.gguf", "is GGUF, which Slimba does not read")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path / "config.json", r"is a file; give the directory that holds config\.json")
    refused(tmp_path, "neither transformers' model_type nor mamba_ssm's")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refused(tmp_path, "'llama' is not supported")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "not valid JSON")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba2"}))
    refused(tmp_path, "holds no weights")


def test_bundled_name(tmp_path: Path, make: Make, mamba2: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    write_packed(make(mamba2, "float16", seed=1), tmp_path / "assets" / "tiny")
    monkeypatch.setattr(reader, "_assets", lambda: tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    assert bundled_names() == ["tiny"]
    assert open_checkpoint("tiny").provenance["seed"] == 1
    write_packed(make(mamba2, "float16", seed=2), tmp_path / "tiny")  # a local path always wins
    assert open_checkpoint("tiny").provenance["seed"] == 2


def test_every_bundled_model_opens() -> None:
    for name in bundled_names():
        assert open_checkpoint(name).tokenizer_file is not None, name


def test_hub_id(tmp_path: Path, make: Make, mamba2: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is not reached: the library is replaced by one that hands out a directory, then by none."""
    out = write_transformers(make(mamba2, "float16"), tmp_path / "snapshot")
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, "pytorch_model*.bin" in allow_patterns))
        if name == "org/offline":
            raise OSError("no network\nand more lines")
        return str(out)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)  # type: ignore[arg-type]
    assert open_checkpoint("org/name").kind == "transformers"
    assert asked == [("org/name", False)]
    with pytest.raises(UserError, match=r"no directory org/offline, and the .* hub did not give it: no network$"):
        open_checkpoint("org/offline")
    (out / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        open_checkpoint("org/name")
    assert asked[-2:] == [("org/name", False), ("org/name", True)]  # pickles only where there is nothing else
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        open_checkpoint("org/name")


def test_torch_is_not_imported(tmp_path: Path, make: Make, mamba2: ModelSpec) -> None:
    model = make(mamba2, "float16")
    for kind, write in (("a", write_packed), ("b", write_transformers), ("c", write_mamba_ssm)):
        write(model, tmp_path / kind)
    code = (
        "import sys; sys.modules['torch'] = None; from slimba.checkpoints.reader import open_checkpoint\n"
        "from slimba.checkpoints.convert import convert_checkpoint; import slimba.cli.convert, slimba.cli.inspect\n"
        "for d in 'abc': convert_checkpoint(open_checkpoint(sys.argv[1] + d), sys.argv[1] + 'out-' + d, to='slimba')"
    )
    path = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code, f"{tmp_path}/"], check=True, env=path)
    assert open_checkpoint(tmp_path / "out-c").is_float
