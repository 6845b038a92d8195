"""transformers directories, against transformers itself. Run: pytest tests/checkpoints/test_transformers.py"""

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
from slimba.checkpoints.mamba_ssm import write_mamba_ssm
from slimba.checkpoints.packed import write_packed
from slimba.checkpoints.reader import open_checkpoint
from slimba.checkpoints.safetensors_io import read_json, read_tensors, write_tensors
from slimba.checkpoints.transformers import read_transformers, write_transformers
from slimba.errors import UserError
from slimba.models.spec import ModelSpec

Make = Callable[..., Checkpoint]


@pytest.mark.parametrize("preset", ["float32", "float16", "bfloat16"])
def test_round_trip(tmp_path: Path, make: Make, facts: Callable[..., Any], spec: ModelSpec, preset: str) -> None:
    model = make(spec, preset)
    out = write_transformers(model, tmp_path / "model")
    assert read_json(out / "config.json")["torch_dtype"] == preset
    back = open_checkpoint(out)
    assert facts(back.tensors) == facts(model.tensors)
    assert (back.kind, back.spec) == ("transformers", spec)


def test_sharded(tmp_path: Path, make: Make, facts: Callable[..., Any], mamba2: ModelSpec) -> None:
    model = make(mamba2, "float32")
    out = write_transformers(model, tmp_path / "model", shard_bytes=4000)
    assert (out / "model.safetensors.index.json").exists()
    assert facts(read_transformers(out).tensors) == facts(model.tensors)


def test_packed_weights_are_refused(tmp_path: Path, make: Make, mamba2: ModelSpec) -> None:
    with pytest.raises(UserError, match=r"needs float weights, but backbone\.embeddings is stored as int4"):
        write_transformers(make(mamba2, "dfssm"), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_old_name_of_the_embedding(tmp_path: Path, make: Make, facts: Callable[..., Any], mamba2: ModelSpec) -> None:
    model = make(mamba2, "float32")
    out = write_transformers(model, tmp_path / "model")
    other = write_mamba_ssm(model, tmp_path / "other")
    shutil.copy(other / "model.safetensors", out)
    assert facts(read_transformers(out).tensors) == facts(model.tensors)


def test_configs_that_are_refused(tmp_path: Path, make: Make, mamba2: ModelSpec) -> None:
    out = write_transformers(make(mamba2, "float32"), tmp_path / "model")
    good = read_json(out / "config.json")
    for change, message in (
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"hidden_size": 48, "head_dim": 32}, "has shape"),
        ({"num_hidden_layers": 3}, r"layers\.2\..* is missing"),
        ({"num_hidden_layers": 1}, r"unknown tensor backbone\.layers\.1\."),
    ):
        (out / "config.json").write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=message):
            open_checkpoint(out)


def test_text_policy(tmp_path: Path, make: Make, mamba2: ModelSpec, tokenizer_file: Path) -> None:
    silent = dataclasses.replace(mamba2, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = dataclasses.replace(make(silent, "float32"), tokenizer_file=tokenizer_file)
    out = write_transformers(model, tmp_path / "model")

    def policy() -> tuple[Any, ...]:
        spec = read_transformers(out).spec
        return spec.bos_token_id, spec.eos_token_id, spec.pad_token_id, spec.add_bos

    (out / "generation_config.json").write_text('{"bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 8}')
    assert policy() == (5, 6, 8, False)
    (out / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    assert policy() == (5, 6, 8, True)
    (out / "tokenizer_config.json").unlink()
    tokenizer = json.loads(tokenizer_file.read_text())
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [5], "tokens": ["<s>"]}},
    }
    (out / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": template}))
    assert policy() == (5, 6, 8, True)
    both = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": both}))
    assert policy() == (5, 6, 8, True)
    (out / "generation_config.json").write_text('{"bos_token_id": 4, "eos_token_id": "x"}')
    with pytest.raises(UserError, match="'x' is not a token id"):
        policy()


# ------------------------------------------------------------------------------------------- transformers itself


def hf_model(kind: str, seed: int = 0) -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    common = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 50, "expand": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if kind == "mamba2":
        config = transformers.Mamba2Config(num_heads=4, head_dim=16, n_groups=2, chunk_size=16, **common, **ids)
    elif kind == "mamba":
        config = transformers.MambaConfig(**common, **ids)
    else:
        config = transformers.FalconMambaConfig(tie_word_embeddings=False, **common, **ids)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def logits(model: Any) -> np.ndarray:
    import torch

    torch.set_num_threads(1)
    with torch.no_grad():
        return np.asarray(model(torch.arange(21)[None] % 50).logits.float().numpy())


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_from_transformers_and_back(tmp_path: Path, kind: str) -> None:
    """Saved by transformers, through the packed and the transformers layout, loaded by transformers: equal logits."""
    theirs = hf_model(kind)
    theirs.save_pretrained(tmp_path / "hf")
    packed = write_packed(open_checkpoint(tmp_path / "hf"), tmp_path / "packed")
    back = write_transformers(open_checkpoint(packed), tmp_path / "back")
    import transformers

    again, report = transformers.AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    np.testing.assert_array_equal(logits(theirs), logits(again.eval()))


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_our_network_gives_their_logits(tmp_path: Path, kind: str) -> None:
    theirs = hf_model(kind)
    theirs.save_pretrained(tmp_path / "hf")
    import torch

    from slimba.models.lm import SSMForCausalLM, load_weights

    checkpoint = open_checkpoint(tmp_path / "hf")
    ours = SSMForCausalLM(checkpoint.spec).eval()
    load_weights(ours, checkpoint)
    with torch.no_grad():
        out = ours(torch.arange(21)[None] % 50)
    out = out[0] if isinstance(out, tuple) else out
    np.testing.assert_allclose(np.asarray(getattr(out, "logits", out)), logits(theirs), atol=1e-4)


def test_bfloat16_saved_by_transformers(tmp_path: Path) -> None:
    import torch

    hf_model("mamba2").to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    checkpoint = open_checkpoint(tmp_path / "hf")
    assert {layout.describe() for layout in checkpoint.layouts.values()} == {"bfloat16"}
    assert np.isfinite(checkpoint.vector("backbone.norm_f.weight")).all()


def test_tokenizer_loads(tmp_path: Path, make: Make, mamba2: ModelSpec, tokenizer_file: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = dataclasses.replace(make(mamba2, "float32"), tokenizer_file=tokenizer_file)
    out = write_transformers(model, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("abc")["input_ids"] == [1, 2, 3]
    assert tokenizer.eos_token_id == 0


def test_own_tensors_without_their_config(tmp_path: Path, make: Make, mamba2: ModelSpec) -> None:
    packed = write_packed(make(mamba2, "float32"), tmp_path / "model")
    config = read_json(packed / "config.json")
    del config["quantization_config"]
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="lacks quantization_config"):
        open_checkpoint(packed)


def test_extra_tensor_is_named(tmp_path: Path, make: Make, mamba2: ModelSpec) -> None:
    out = write_transformers(make(mamba2, "float32"), tmp_path / "model")
    tensors = dict(read_tensors(out).tensors) | {"backbone.more": np.zeros(2, np.float32)}
    (out / "model.safetensors").unlink()
    entries = {n: (a.dtype.name, a.shape) for n, a in tensors.items()}
    write_tensors(out, entries, tensors.__getitem__, metadata={"format": "pt"}, checksums=False)
    with pytest.raises(UserError, match=r"unknown tensor backbone\.more"):
        read_transformers(out)
