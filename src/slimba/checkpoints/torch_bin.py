"""Reading `pytorch_model.bin` of others, single or sharded: plain tensors only, a pickle with code in it is never run.

The one file of this room that needs torch, and only when such a file is read. Slimba never writes pickles.

Run the tests: `pytest tests/checkpoints/test_torch_bin.py`.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from slimba.checkpoints.safetensors_io import TensorFiles, merge_shards, read_tensors
from slimba.errors import UserError
from slimba.formats.floats import DTYPES

__all__ = ["read_weights"]

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def read_weights(directory: Path) -> TensorFiles:
    """The tensors of a transformers or mamba_ssm directory: safetensors where there are any, else `.bin`."""
    if (directory / "model.safetensors").exists() or (directory / "model.safetensors.index.json").exists():
        return read_tensors(directory)
    if (directory / SINGLE).exists():
        return _read_bin(directory / SINGLE)
    if (directory / INDEX).exists():
        return merge_shards(directory / INDEX, _read_bin)
    raise UserError(f"{directory} holds no weights: neither model.safetensors nor {SINGLE}, single or with an index")


def _read_bin(path: Path) -> TensorFiles:
    """One pickled state dict, read with torch's `weights_only`, which builds tensors and refuses everything else."""
    try:
        import torch
    except ImportError:
        raise UserError(f"reading {path} needs torch: pip install slimba[train], or get safetensors") from None
    if not path.exists():
        raise UserError(f"{path} is missing")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its advice on pickles would come before our one line
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than plain tensors (it may hold code that runs on loading), so it was refused and "
            "nothing in it was run; get the model as safetensors"
        ) from None
    except Exception as e:  # on a damaged file its unpickler raises whatever its stack machine runs into
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"{path} is damaged or truncated ({reason}); copy or download it again") from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path} is not a state dict of tensors; save the model's state_dict() alone, as safetensors")
    tensors = {str(name): _to_numpy(path, str(name), value) for name, value in state.items()}
    return TensorFiles(tensors, {}, [path], dict.fromkeys(tensors, path.name))


def _to_numpy(path: Path, name: str, value: Any) -> np.ndarray:
    import torch

    value = value.detach().contiguous()
    if value.dtype == torch.bfloat16:
        return np.asarray(value.view(torch.int16).numpy().view(DTYPES["bfloat16"]))
    try:
        return np.asarray(value.numpy())
    except (TypeError, RuntimeError):
        raise UserError(f"{path}: {name} has type {value.dtype}, which is not supported") from None
