"""mamba_ssm directories: its config keys and its tensor names, safetensors or `.bin`. torch only for the latter.

    checkpoint = read_mamba_ssm(Path("mamba2-130m"), tokenizer="gpt-neox-tokenizer.json")
    write_mamba_ssm(checkpoint, Path("out"))    # safetensors; its pytorch_model.bin is a pickle, never written here

Run the tests: `pytest tests/checkpoints/test_mamba_ssm.py`.
"""

from __future__ import annotations

from pathlib import Path

from slimba.checkpoints.atomic import atomic_directory
from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.common import (
    checkpoint_entries,
    copy_tokenizer,
    find_tokenizer,
    float_checkpoint,
    generation_of,
    with_text_policy,
    write_json,
)
from slimba.checkpoints.safetensors_io import SHARD_BYTES, read_json, write_tensors
from slimba.checkpoints.torch_bin import read_weights
from slimba.models.configs import from_config, to_mamba_ssm_config

__all__ = ["is_mamba_ssm", "read_mamba_ssm", "write_mamba_ssm"]

THEIRS, OURS = "backbone.embedding.weight", "backbone.embeddings.weight"


def is_mamba_ssm(config: dict[str, object]) -> bool:
    """Whether a config.json has mamba_ssm's keys."""
    return "model_type" not in config and "d_model" in config and "n_layer" in config


def read_mamba_ssm(directory: str | Path, *, tokenizer: str | Path | None = None) -> Checkpoint:
    """Read `config.json` with safetensors or `.bin` weights; shapes are checked against the config.

    The layout holds no token ids: bos and eos are the tokenizer's `<|endoftext|>` (or its only special token), and a
    prompt starts without it. UserError: config keys that change the maths and are not supported, missing or unknown or
    misshapen tensors, a tied head that differs from the embedding, an untied one that is missing.
    """
    directory = Path(directory)
    config = read_json(directory / "config.json")
    from_config(config)  # first of all: keys that are refused
    files = read_weights(directory)
    tensors = {OURS if name == THEIRS else name: a for name, a in files.tensors.items()}
    spec = from_config(config, tensor_shapes={name: a.shape for name, a in tensors.items()})
    tokenizer_file = find_tokenizer(directory, tokenizer)
    spec = with_text_policy(spec, directory, tokenizer_file)
    return float_checkpoint(spec, tensors, directory, "mamba-ssm", tokenizer_file)


def write_mamba_ssm(
    checkpoint: Checkpoint, out: str | Path, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write a float checkpoint in mamba_ssm's keys and names, every byte of every tensor kept.

    generation_config.json keeps the token ids, which mamba_ssm's own config cannot. UserError: quantised matrices, or a
    spec that mamba_ssm cannot express (named by `to_mamba_ssm_config`).
    """
    checkpoint.require_float("the mamba_ssm layout")
    config = to_mamba_ssm_config(checkpoint.spec)
    entries = {THEIRS if name == OURS else name: entry for name, entry in checkpoint_entries(checkpoint).items()}
    with atomic_directory(out, overwrite=overwrite) as tmp:
        write_tensors(
            tmp,
            entries,
            lambda name: checkpoint.tensors[OURS if name == THEIRS else name],
            metadata={"format": "pt"},
            checksums=False,
            shard_bytes=shard_bytes,
        )
        write_json(tmp / "config.json", config)
        write_json(tmp / "generation_config.json", generation_of(checkpoint))
        copy_tokenizer(checkpoint, tmp)
    return Path(out)
