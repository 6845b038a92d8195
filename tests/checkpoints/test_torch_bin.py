"""Pickled weights of others: read as tensors, refused when they hold code.

Run: pytest tests/checkpoints/test_torch_bin.py
"""

from __future__ import annotations

import builtins
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.mamba_ssm import write_mamba_ssm
from slimba.checkpoints.reader import open_checkpoint
from slimba.checkpoints.torch_bin import read_weights
from slimba.checkpoints.transformers import write_transformers
from slimba.errors import UserError
from slimba.models.spec import ModelSpec

torch = pytest.importorskip("torch")

Make = Callable[..., Checkpoint]


def as_torch(checkpoint: Checkpoint) -> dict[str, Any]:
    out = {}
    for name, a in checkpoint.tensors.items():
        if a.dtype.name == "bfloat16":
            out[name] = torch.from_numpy(a.view(np.int16).copy()).view(torch.bfloat16)
        else:
            out[name] = torch.from_numpy(a.copy())
    return out


@pytest.mark.parametrize("preset", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_reads_bin(
    tmp_path: Path, make: Make, facts: Callable[..., Any], spec: ModelSpec, preset: str, sharded: bool
) -> None:
    model = make(spec, preset)
    out = write_transformers(model, tmp_path / "model")
    (out / "model.safetensors").unlink()
    state = as_torch(model)
    if sharded:
        names = list(state)
        parts = {"a.bin": names[:5], "b.bin": names[5:]}
        for file, some in parts.items():
            torch.save({n: state[n] for n in some}, out / file)
        index = {"weight_map": {n: file for file, some in parts.items() for n in some}}
        (out / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, out / "pytorch_model.bin")
    assert facts(open_checkpoint(out).tensors) == facts(model.tensors)


def test_mamba_ssm_bin_with_its_tied_head(
    tmp_path: Path, make: Make, facts: Callable[..., Any], mamba2: ModelSpec
) -> None:
    model = make(mamba2, "float16")
    out = write_mamba_ssm(model, tmp_path / "model")
    (out / "model.safetensors").unlink()
    state = as_torch(model)
    state["backbone.embedding.weight"] = state.pop("backbone.embeddings.weight")
    state["lm_head.weight"] = state["backbone.embedding.weight"]
    torch.save(state, out / "pytorch_model.bin")
    assert facts(open_checkpoint(out).tensors) == facts(model.tensors)


class Attack:
    """A pickle that makes a directory when it is loaded by `pickle.load`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["plain pickle", "torch.save", "inside a tensor file"])
def test_code_is_refused_and_not_run(tmp_path: Path, make: Make, mamba2: ModelSpec, kind: str) -> None:
    out = write_mamba_ssm(make(mamba2, "float16"), tmp_path / "model")
    (out / "model.safetensors").unlink()
    mark, path = tmp_path / "code-was-run", out / "pytorch_model.bin"
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps({"a": Attack(mark)}))
    elif kind == "torch.save":
        torch.save({"a": torch.zeros(2), "b": Attack(mark)}, path)
    else:
        torch.save({"a": torch.zeros(2)}, tmp_path / "good.bin")
        with zipfile.ZipFile(tmp_path / "good.bin") as good, zipfile.ZipFile(path, "w") as bad:
            for item in good.namelist():
                payload = pickle.dumps(Attack(mark), 2) if item.endswith("data.pkl") else good.read(item)
                bad.writestr(item, payload)
    with pytest.raises(UserError, match="refused") as e:
        open_checkpoint(out)
    assert str(path) in str(e.value)
    assert not mark.exists()


def test_damaged_and_wrong_files(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(2000)}, path)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2], b"GIF89a not a pickle"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"pytorch_model\.bin"):
            read_weights(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(2)}}, path)
    with pytest.raises(UserError, match="not a state dict"):
        read_weights(tmp_path)
    torch.save({"a": torch.zeros(2, dtype=torch.complex64), "b": torch.zeros(2).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(UserError, match="b has type"):
        read_weights(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="holds no weights"):
        read_weights(tmp_path)


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    real = builtins.__import__

    def blocked(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(UserError, match=r"pip install slimba\[train\]"):
        read_weights(tmp_path)
