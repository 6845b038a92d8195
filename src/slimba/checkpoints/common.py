"""What the three layouts share: tensors against a spec, float layouts, tokenizer and text policy. No torch.

Run the tests: `pytest tests/checkpoints`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.safetensors_io import Entries, dtype_name, read_json
from slimba.errors import UserError
from slimba.formats import MatrixLayout
from slimba.models.spec import ModelSpec

__all__ = [
    "check_finite",
    "check_tensors",
    "checkpoint_entries",
    "copy_tokenizer",
    "find_tokenizer",
    "float_checkpoint",
    "generation_config",
    "generation_of",
    "most_common_dtype",
    "token_ids",
    "with_text_policy",
    "write_json",
]

FLOATS = ("float32", "float16", "bfloat16")
ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
END_OF_TEXT = "<|endoftext|>"


def check_tensors(found: Mapping[str, np.ndarray], expected: Entries, where: Path | str) -> None:
    """UserError naming the first missing, mistyped, misshapen or unknown tensor."""
    for name, (dtype, shape) in expected.items():
        if name not in found:
            raise UserError(f"{where}: tensor {name} is missing")
        a = found[name]
        if a.shape != shape:
            raise UserError(f"{where}: {name} has shape {list(a.shape)}, but config.json implies {list(shape)}")
        if a.dtype.name != dtype:
            raise UserError(f"{where}: {name} has type {a.dtype.name}, but config.json says {dtype}")
    for name in found:
        if name not in expected:
            raise UserError(f"{where}: unknown tensor {name}; config.json has no place for it")


def check_finite(name: str, a: np.ndarray, where: Path | str) -> None:
    """UserError when `a` holds NaN or an infinite value."""
    if not np.isfinite(a.astype(np.float32)).all():
        raise UserError(f"{where}: {name} holds NaN or infinite values; the model is broken, get or make it again")


def checkpoint_entries(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor that `checkpoint` must hold, embedding first: name -> (dtype, shape); vectors keep their dtype.

    UserError naming a tensor that is missing or unknown; the writer checks types and shapes as it goes.
    """
    spec = checkpoint.spec
    out: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in spec.matrices():
        out |= checkpoint.layouts[name].tensors(name)
    vectors = checkpoint.vectors()
    for name in [*out, *vectors]:
        if name not in checkpoint.tensors:
            raise UserError(f"{checkpoint.path or 'the model to write'}: tensor {name} is missing")
    for name in checkpoint.tensors:
        if name not in out and name not in vectors:
            raise UserError(f"{checkpoint.path or 'the model to write'}: unknown tensor {name}")
    for name, (shape, _) in vectors.items():
        out[name] = (dtype_name(checkpoint.tensors[name]), shape)
    return out


def float_checkpoint(
    spec: ModelSpec, tensors: dict[str, np.ndarray], directory: Path, kind: str, tokenizer_file: Path | None
) -> Checkpoint:
    """A Checkpoint of plain float tensors under canonical names, every shape checked against `spec`.

    `lm_head.weight` of a tied model is dropped when it equals the embedding, and an error otherwise.
    """
    head, embedding = tensors.get("lm_head.weight"), tensors.get("backbone.embeddings.weight")
    if spec.tie_embeddings and head is not None and embedding is not None:
        if not np.array_equal(_bits(head), _bits(embedding)):
            raise UserError(
                f"{directory}: config.json ties the head to the embedding, but lm_head.weight differs from it; "
                "set tie_word_embeddings (mamba_ssm: tie_embeddings) to false in config.json if the head is its own"
            )
        tensors = {k: v for k, v in tensors.items() if k != "lm_head.weight"}
    layouts = {}
    for name, (rows, cols) in spec.matrices().items():
        dtype = _float_dtype(tensors, f"{name}.weight", directory)
        layouts[name] = MatrixLayout.plain(rows, cols, dtype)
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, layout in layouts.items():
        expected |= layout.tensors(name)
    for name, (shape, _) in spec.vectors().items():
        expected[name] = (_float_dtype(tensors, name, directory), shape)
    check_tensors(tensors, expected, directory)
    return Checkpoint(
        spec=spec,
        layouts=layouts,
        tensors=tensors,
        path=directory,
        kind=kind,
        tokenizer_file=tokenizer_file,
        generation=generation_config(directory),
    )


def most_common_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that most weights of a float checkpoint have."""
    weights: Counter[str] = Counter()
    for layout in checkpoint.layouts.values():
        weights[layout.segments[0].format] += layout.rows * layout.cols
    return weights.most_common(1)[0][0]


def _bits(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8)


def _float_dtype(tensors: Mapping[str, np.ndarray], name: str, directory: Path) -> str:
    if name not in tensors:
        raise UserError(f"{directory}: tensor {name} is missing")
    dtype = dtype_name(tensors[name])
    if dtype not in FLOATS:
        raise UserError(f"{directory}: {name} has type {dtype}; weights of this layout must be {', '.join(FLOATS)}")
    return dtype


# ------------------------------------------------------------------------------------------------- tokenizer and ids


def find_tokenizer(directory: Path, tokenizer: str | Path | None) -> Path | None:
    """The tokenizer.json to use: `tokenizer` (a file, or a directory holding one) or the directory's own."""
    if tokenizer is None:
        own = directory / "tokenizer.json"
        return own if own.exists() else None
    path = Path(tokenizer).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"no tokenizer at {path}; give a tokenizer.json or a directory that holds one")
    read_json(path)
    return path


def generation_config(directory: Path) -> dict[str, Any]:
    """generation_config.json, or {} where there is none."""
    path = directory / "generation_config.json"
    return read_json(path) if path.exists() else {}


def with_text_policy(spec: ModelSpec, directory: Path, tokenizer_file: Path | None) -> ModelSpec:
    """Fill in the ids that `spec` lacks, and whether a prompt starts with bos.

    Ids: generation_config.json, else (when there is neither bos nor eos) the tokenizer's `<|endoftext|>` or its only
    special token as both. add_bos: tokenizer_config.json, else whether the tokenizer's own template puts bos first.
    """
    generation = generation_config(directory)
    ids: dict[str, int | None] = {}
    for key in ID_KEYS:
        value = getattr(spec, key)
        ids[key] = _first_id(generation.get(key), directory) if value is None else value
    tokenizer = read_json(tokenizer_file) if tokenizer_file else {}
    if ids["bos_token_id"] is None and ids["eos_token_id"] is None:
        ids["bos_token_id"] = ids["eos_token_id"] = _end_of_text(tokenizer)
    for key, value in ids.items():
        if key != "pad_token_id" and value is not None and not 0 <= value < spec.vocab_size:
            raise UserError(
                f"{directory}: {key} is {value}, but the embedding has {spec.vocab_size} rows; "
                "config.json or the tokenizer belongs to another model"
            )
    add_bos = spec.add_bos
    settings = tokenizer_file.with_name("tokenizer_config.json") if tokenizer_file else None
    stated = read_json(settings).get("add_bos_token") if settings and settings.exists() else None
    if isinstance(stated, bool):
        add_bos = stated
    elif _template_starts_with(tokenizer, ids["bos_token_id"]):
        add_bos = True
    return dataclasses.replace(
        spec,
        bos_token_id=ids["bos_token_id"],
        eos_token_id=ids["eos_token_id"],
        pad_token_id=ids["pad_token_id"],
        add_bos=add_bos and ids["bos_token_id"] is not None,
    )


def _first_id(value: Any, directory: Path) -> int | None:
    """generation_config.json may list several end ids; the first is the model's."""
    value = value[0] if isinstance(value, list) and value else value
    if value is not None and type(value) is not int:
        raise UserError(f"{directory / 'generation_config.json'}: {value!r} is not a token id")
    return value


def _end_of_text(tokenizer: Mapping[str, Any]) -> int | None:
    special = {t["content"]: t["id"] for t in tokenizer.get("added_tokens") or [] if t.get("special")}
    if END_OF_TEXT in special:
        return int(special[END_OF_TEXT])
    return int(next(iter(special.values()))) if len(special) == 1 else None


def _template_starts_with(tokenizer: Mapping[str, Any], bos: int | None) -> bool:
    """Whether the post-processor (alone or in a sequence) puts the token `bos` before a single text."""
    processor = tokenizer.get("post_processor") or {}
    for step in processor.get("processors") or [processor]:
        single = step.get("single") or []
        if step.get("type") == "TemplateProcessing" and single and "SpecialToken" in single[0]:
            ids = step.get("special_tokens", {}).get(single[0]["SpecialToken"].get("id"), {}).get("ids")
            return bos is not None and ids == [bos]
    return False


def token_ids(spec: ModelSpec) -> dict[str, int]:
    """The ids that a spec has, by transformers' keys."""
    ids = {key: getattr(spec, key) for key in ID_KEYS}
    return {key: value for key, value in ids.items() if value is not None}


def generation_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What generation_config.json says of `checkpoint`: its own settings (several end ids, say) and the spec's ids."""
    return token_ids(checkpoint.spec) | {k: v for k, v in checkpoint.generation.items() if v is not None}


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write `data` as indented JSON."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(checkpoint: Checkpoint, directory: Path) -> Path | None:
    """Copy tokenizer.json, and the tokenizer_config.json beside it, into `directory`."""
    if checkpoint.tokenizer_file is None:
        return None
    out = directory / "tokenizer.json"
    shutil.copyfile(checkpoint.tokenizer_file, out)
    settings = checkpoint.tokenizer_file.with_name("tokenizer_config.json")
    if settings.exists():
        shutil.copyfile(settings, directory / settings.name)
    return out
