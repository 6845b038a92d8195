"""transformers directories of Mamba, Mamba-2 and Falcon-Mamba, without transformers (torch only for `.bin` files).

    checkpoint = read_transformers(Path("mamba2-130m-hf"))
    write_transformers(checkpoint, Path("out"))

Canonical tensor names are transformers' own, so little is renamed.
Run the tests: `pytest tests/checkpoints/test_transformers.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

from slimba.checkpoints.atomic import atomic_directory
from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.common import (
    checkpoint_entries,
    copy_tokenizer,
    find_tokenizer,
    float_checkpoint,
    generation_of,
    most_common_dtype,
    token_ids,
    with_text_policy,
    write_json,
)
from slimba.checkpoints.safetensors_io import SHARD_BYTES, read_json, write_tensors
from slimba.checkpoints.torch_bin import read_weights
from slimba.errors import UserError
from slimba.models.configs import from_config, to_transformers_config

__all__ = ["read_transformers", "write_transformers"]

OLD_EMBEDDING, EMBEDDING = "backbone.embedding.weight", "backbone.embeddings.weight"


def read_transformers(directory: str | Path, *, tokenizer: str | Path | None = None) -> Checkpoint:
    """Read `config.json` with safetensors or `.bin` weights; shapes are checked against the config.

    UserError: unknown model type, weights quantised by another method, missing or unknown or misshapen tensors.
    """
    directory = Path(directory)
    config = read_json(directory / "config.json")
    from_config(config)  # first of all: another kind of model, or one quantised by another tool
    files = read_weights(directory)
    if files.metadata.get("format") == "slimba":
        raise UserError(f"{directory}: Slimba's tensors, but config.json lacks quantization_config; copy it again")
    tensors = {EMBEDDING if name == OLD_EMBEDDING else name: a for name, a in files.tensors.items()}
    spec = from_config(config, tensor_shapes={name: a.shape for name, a in tensors.items()})
    tokenizer_file = find_tokenizer(directory, tokenizer)
    spec = with_text_policy(spec, directory, tokenizer_file)
    return float_checkpoint(spec, tensors, directory, "transformers", tokenizer_file)


def write_transformers(
    checkpoint: Checkpoint, out: str | Path, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write a float checkpoint that `AutoModelForCausalLM.from_pretrained` loads, every byte of every tensor kept.

    UserError: quantised matrices, or a spec that transformers cannot express (named by `to_transformers_config`).
    """
    checkpoint.require_float("the transformers layout")
    config = to_transformers_config(checkpoint.spec)
    entries = checkpoint_entries(checkpoint)
    config["torch_dtype"] = most_common_dtype(checkpoint)  # the name that old and new releases read
    with atomic_directory(out, overwrite=overwrite) as tmp:
        get = checkpoint.tensors.__getitem__
        write_tensors(tmp, entries, get, metadata={"format": "pt"}, checksums=False, shard_bytes=shard_bytes)
        write_json(tmp / "config.json", config)
        write_json(tmp / "generation_config.json", generation_of(checkpoint))
        tokenizer = copy_tokenizer(checkpoint, tmp)
        settings = tmp / "tokenizer_config.json"
        if tokenizer and not settings.exists():
            write_json(settings, _tokenizer_config(checkpoint, tokenizer))
    return Path(out)


def _tokenizer_config(checkpoint: Checkpoint, tokenizer: Path) -> dict[str, object]:
    """What AutoTokenizer needs beside tokenizer.json, with the text policy of the spec."""
    added = {t["id"]: t["content"] for t in json.loads(tokenizer.read_text(encoding="utf-8")).get("added_tokens") or []}
    out: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": checkpoint.spec.add_bos,
        "clean_up_tokenization_spaces": False,
    }
    for key, value in token_ids(checkpoint.spec).items():
        if value in added:
            out[key.removesuffix("_id")] = added[value]
    return out
