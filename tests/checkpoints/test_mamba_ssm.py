"""mamba_ssm directories: names, tied and untied heads, text policy. Run: pytest tests/checkpoints/test_mamba_ssm.py"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.mamba_ssm import read_mamba_ssm, write_mamba_ssm
from slimba.checkpoints.reader import open_checkpoint
from slimba.checkpoints.safetensors_io import dtype_name, read_json, read_tensors, write_tensors
from slimba.errors import UserError
from slimba.models.spec import ModelSpec

Make = Callable[..., Checkpoint]
TEACHER = Path(__file__).parents[3] / "shared" / "teacher" / "mamba2-25m"
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"


def edit(directory: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = {n: a.copy() for n, a in read_tensors(directory).tensors.items()}
    change(tensors)
    (directory / "model.safetensors").unlink()
    entries = {n: (dtype_name(a), a.shape) for n, a in tensors.items()}
    write_tensors(directory, entries, tensors.__getitem__, metadata={"format": "pt"}, checksums=False)


@pytest.mark.parametrize("preset", ["float32", "float16", "bfloat16"])
def test_round_trip(tmp_path: Path, make: Make, facts: Callable[..., Any], spec: ModelSpec, preset: str) -> None:
    model = make(spec, preset)
    out = write_mamba_ssm(model, tmp_path / "model")
    assert EMBEDDING in read_tensors(out).tensors
    assert "ssm_cfg" in read_json(out / "config.json")
    back = open_checkpoint(out)
    assert facts(back.tensors) == facts(model.tensors)
    assert back.kind == "mamba-ssm"
    assert dataclasses.replace(back.spec, add_bos=spec.add_bos) == spec  # ids kept by generation_config.json


def test_tied_head(tmp_path: Path, make: Make, mamba2: ModelSpec) -> None:
    out = write_mamba_ssm(make(mamba2, "float16"), tmp_path / "model")
    edit(out, lambda t: t.update({HEAD: t[EMBEDDING]}))
    assert HEAD not in read_mamba_ssm(out).tensors
    edit(out, lambda t: t[HEAD].fill(1))
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        read_mamba_ssm(out)


def test_untied_head_must_be_there(tmp_path: Path, make: Make, mamba1: ModelSpec) -> None:
    out = write_mamba_ssm(make(mamba1, "float16"), tmp_path / "model")
    edit(out, lambda t: t.pop(HEAD))
    with pytest.raises(UserError, match=r"lm_head\.weight is missing"):
        read_mamba_ssm(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("backbone.norm_f.weight"), r"norm_f\.weight is missing"),
        (lambda t: t.update(more=np.zeros(1, np.float32)), "unknown tensor more"),
        (lambda t: t.update({EMBEDDING: t[EMBEDDING][:32]}), r"embeddings\.weight has shape \[32, 24\]"),
        (lambda t: t.update({EMBEDDING: t[EMBEDDING].astype(np.int8)}), "has type int8"),
    ],
)
def test_tensors_that_disagree(
    tmp_path: Path, make: Make, mamba2: ModelSpec, change: Callable[..., Any], message: str
) -> None:
    out = write_mamba_ssm(make(mamba2, "float16"), tmp_path / "model")
    edit(out, change)
    with pytest.raises(UserError, match=message) as e:
        read_mamba_ssm(out)
    assert str(out) in str(e.value)


def test_text_policy_from_the_tokenizer(tmp_path: Path, make: Make, mamba2: ModelSpec, tokenizer_file: Path) -> None:
    silent = dataclasses.replace(mamba2, bos_token_id=None, eos_token_id=None)
    out = write_mamba_ssm(make(silent, "float16"), tmp_path / "model")
    assert read_mamba_ssm(out).spec == silent
    assert read_mamba_ssm(out).tokenizer_file is None
    for given in (tokenizer_file, tokenizer_file.parent):
        back = read_mamba_ssm(out, tokenizer=given)
        assert back.tokenizer_file == tokenizer_file
        assert (back.spec.bos_token_id, back.spec.eos_token_id, back.spec.add_bos) == (0, 0, False)
    shutil.copy(tokenizer_file, out)
    assert read_mamba_ssm(out).tokenizer_file == out / "tokenizer.json"
    assert read_mamba_ssm(out).spec.eos_token_id == 0

    tokenizer = json.loads(tokenizer_file.read_text())
    end = tokenizer["added_tokens"][0]
    for tokens, expected in (
        ([end | {"content": "</s>", "id": 7}], 7),
        ([end | {"content": "<pad>", "id": 5}, end | {"id": 9}], 9),
        ([end | {"content": "<a>", "id": 5}, end | {"content": "<b>", "id": 6}], None),
        ([], None),
    ):
        tokenizer_file.write_text(json.dumps(tokenizer | {"added_tokens": tokens}))
        assert read_mamba_ssm(out, tokenizer=tokenizer_file).spec.eos_token_id == expected
    tokenizer_file.write_text(json.dumps(tokenizer | {"added_tokens": [end | {"id": 4000}]}))
    with pytest.raises(UserError, match="is 4000, but the embedding has 40 rows"):
        read_mamba_ssm(out, tokenizer=tokenizer_file)


def test_tokenizer_that_is_not_there(tmp_path: Path, make: Make, mamba2: ModelSpec) -> None:
    out = write_mamba_ssm(make(mamba2, "float16"), tmp_path / "model")
    with pytest.raises(UserError, match="no tokenizer at"):
        read_mamba_ssm(out, tokenizer=tmp_path)
    (tmp_path / "words.txt").write_text("hello")
    with pytest.raises(UserError, match=r"words\.txt is not valid JSON"):
        read_mamba_ssm(out, tokenizer=tmp_path / "words.txt")


@pytest.mark.skipif(not TEACHER.exists(), reason="the development teacher is not here")
def test_real_teacher() -> None:
    teacher = open_checkpoint(TEACHER)
    assert teacher.kind == "mamba-ssm"
    assert teacher.spec.n_params() == 24_836_160
    assert (teacher.spec.eos_token_id, teacher.spec.add_bos) == (0, False)
