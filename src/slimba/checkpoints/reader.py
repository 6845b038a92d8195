"""`open_checkpoint`: any MODEL argument to a Checkpoint, whatever its layout. No torch, except for `.bin` weights.

    checkpoint = open_checkpoint("demo-teacher")              # bundled with the package
    checkpoint = open_checkpoint("models/mamba2-1bit")        # a directory: packed, transformers or mamba_ssm
    checkpoint = open_checkpoint("state-spaces/mamba2-130m", tokenizer="tokenizer.json")      # a hub id

Run the tests: `pytest tests/checkpoints/test_reader.py`.
"""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.mamba_ssm import is_mamba_ssm, read_mamba_ssm
from slimba.checkpoints.packed import is_packed, read_packed
from slimba.checkpoints.safetensors_io import read_json
from slimba.checkpoints.transformers import read_transformers
from slimba.errors import UserError

__all__ = ["bundled_names", "find_model", "open_checkpoint"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SAFE_FILES = ["*.json", "*.safetensors", "README.md"]


def open_checkpoint(path_or_id: str | Path, *, tokenizer: str | Path | None = None, verify: bool = True) -> Checkpoint:
    """Open a directory, a bundled model or a hub id, in this order; the weights are mapped, not read.

    `tokenizer` (a tokenizer.json or a directory holding one) replaces the checkpoint's own. `verify=False` skips the
    checksums of a packed directory. UserError: not found, not a model directory, a layout or content that is refused.
    """
    directory = find_model(path_or_id)
    if not (directory / "config.json").exists():
        if any(directory.glob("*.gguf")):
            raise UserError(f"{directory} holds a GGUF file, which Slimba does not read; give the original directory")
        raise UserError(f"{directory} holds no config.json, so it is not a model directory")
    config = read_json(directory / "config.json")
    if is_packed(config):
        return read_packed(directory, verify=verify, tokenizer=tokenizer)
    if is_mamba_ssm(config):
        return read_mamba_ssm(directory, tokenizer=tokenizer)
    if "model_type" in config:
        return read_transformers(directory, tokenizer=tokenizer)
    raise UserError(
        f"{directory / 'config.json'} has neither transformers' model_type nor mamba_ssm's d_model and n_layer: "
        "not a model that Slimba reads"
    )


def find_model(path_or_id: str | Path) -> Path:
    """The local directory of a MODEL argument; downloads a hub id. A local path always wins."""
    path = Path(path_or_id).expanduser()
    try:
        is_dir, exists = path.is_dir(), path.exists()
    except OSError as e:  # no right to look, or a text where a name should be
        raise UserError(f"cannot open {str(path)[:100]}: {e.strerror}") from None
    if is_dir:
        return path
    if exists:
        what = "GGUF, which Slimba does not read" if _is_gguf(path) else "a file"
        raise UserError(f"{path} is {what}; give the directory that holds config.json")
    name = str(path_or_id)
    bundled = _assets() / name
    if "/" not in name and name in bundled_names():
        return bundled
    if HUB_ID.fullmatch(name):
        return _download(name)
    known = ", ".join(bundled_names()) or "none"
    raise UserError(f"no model called {name}: it is not a directory, nor a bundled model ({known})")


def bundled_names() -> list[str]:
    """Models inside the package."""
    assets = _assets()
    return sorted(p.name for p in assets.iterdir() if (p / "config.json").exists()) if assets.is_dir() else []


def _assets() -> Path:
    # not files("slimba") / "assets": an editable install has two folders called slimba
    return Path(str(importlib.resources.files("slimba.assets")))


def _is_gguf(path: Path) -> bool:
    with open(path, "rb") as f:
        return f.read(4) == b"GGUF"


def _download(name: str) -> Path:
    """A hub id: JSON and safetensors, and the `.bin` weights only when there are no safetensors."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"there is no directory {name}; to fetch it from the Hugging Face hub: pip install huggingface_hub"
        ) from None
    try:
        directory = Path(snapshot_download(name, allow_patterns=SAFE_FILES))
        if not any(directory.glob("*.safetensors")):
            directory = Path(snapshot_download(name, allow_patterns=[*SAFE_FILES, "pytorch_model*.bin"]))
    except Exception as e:  # offline, unknown, gated: the library has a dozen types for it
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UserError(f"there is no directory {name}, and the Hugging Face hub did not give it: {reason}") from None
    return directory
