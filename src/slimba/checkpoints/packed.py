"""Our packed directory: `write_packed` and `read_packed`. docs/file-format.md is the contract. No torch.

    write_packed(checkpoint, Path("model-1bit"), card="How it was made ...")
    checkpoint = read_packed(Path("model-1bit"))      # strict: every tensor, type, shape and checksum is checked

Run the tests: `pytest tests/checkpoints/test_packed.py`.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from slimba.checkpoints.atomic import atomic_directory
from slimba.checkpoints.checkpoint import Checkpoint, scan_scales
from slimba.checkpoints.common import (
    FLOATS,
    check_finite,
    check_tensors,
    checkpoint_entries,
    copy_tokenizer,
    find_tokenizer,
    generation_config,
    generation_of,
    with_text_policy,
    write_json,
)
from slimba.checkpoints.compressed_tensors import metadata
from slimba.checkpoints.safetensors_io import (
    SHARD_BYTES,
    Entries,
    TensorFiles,
    read_json,
    read_tensors,
    verify_checksums,
    write_tensors,
)
from slimba.errors import UserError
from slimba.formats import MatrixLayout
from slimba.models.configs import to_transformers_config
from slimba.models.spec import ModelSpec, VectorKind

__all__ = ["FORMAT_VERSION", "METADATA", "card_of", "is_packed", "read_packed", "spec_of", "write_packed"]

FORMAT_VERSION = 1
METADATA = {"format": "slimba"}
OPTIONAL = {"compressed_tensors"}
KEYS = {"quant_method", "format_version", "spec", "layers", "vectors", "numerics", "provenance", "checksums"}
TYPES: dict[str, tuple[type, ...]] = {  # annotations of ModelSpec's fields -> what JSON may hold
    "int": (int,),
    "bool": (bool,),
    "float": (int, float),
    "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
}


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a packed directory."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "slimba"


# ---------------------------------------------------------------------------------------------------------- writing


def write_packed(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    card: str = "",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write `checkpoint` as a packed directory, whole or not at all; `card` is the body of README.md.

    The same checkpoint gives the same bytes. UserError: a tensor that does not fit the spec, an existing `out`
    without `overwrite`, no space left.
    """
    _check_layouts(checkpoint.spec, checkpoint.layouts)
    entries = checkpoint_entries(checkpoint)
    config = _config(checkpoint, entries)
    with atomic_directory(out, overwrite=overwrite) as tmp:
        write_tensors(
            tmp, entries, checkpoint.tensors.__getitem__, metadata=METADATA, checksums=True, shard_bytes=shard_bytes
        )
        tokenizer = copy_tokenizer(checkpoint, tmp)
        if tokenizer:
            config["quantization_config"]["checksums"]["tokenizer.json"] = _crc32(tokenizer.read_bytes())
        write_json(tmp / "config.json", config)
        write_json(tmp / "generation_config.json", generation_of(checkpoint))
        (tmp / "README.md").write_text(_model_card(checkpoint, Path(out).name, card), encoding="utf-8")
    return Path(out)


def _config(checkpoint: Checkpoint, entries: Entries) -> dict[str, Any]:
    quantization: dict[str, Any] = {
        "quant_method": "slimba",
        "format_version": FORMAT_VERSION,
        "spec": checkpoint.spec.to_dict(),
        "layers": {name: checkpoint.layouts[name].to_json() for name in checkpoint.spec.matrices()},
        "vectors": _vector_dtypes(checkpoint.spec, entries),
        "numerics": dict(checkpoint.numerics),
        "provenance": checkpoint.provenance,
    }
    if described := metadata(checkpoint.layouts, checkpoint.numerics):
        quantization["compressed_tensors"] = described
    quantization = json.loads(json.dumps(quantization))  # as a reader sees it: lists for tuples, text keys
    quantization["checksums"] = {"quantization_config": _crc32(_canonical(quantization))}
    return _transformers_keys(checkpoint.spec) | {"quantization_config": quantization}


def _vector_dtypes(spec: ModelSpec, entries: Entries) -> dict[str, str]:
    """The usual dtype of each kind, and by full name the tensors that differ."""
    out: dict[str, str] = {}
    for kind in get_args(VectorKind):
        names = [n for n, (_, k) in spec.vectors().items() if k == kind]
        if names:
            out[kind] = usual = Counter(entries[n][0] for n in names).most_common(1)[0][0]
            out |= {n: entries[n][0] for n in names if entries[n][0] != usual}
    return out


def _transformers_keys(spec: ModelSpec) -> dict[str, Any]:
    """transformers' keys for the architecture; for a model it cannot express, those that still mean the same."""
    try:
        keys = to_transformers_config(spec)
    except UserError:
        keys = {
            "model_type": {"mamba1": "mamba", "mamba2": "mamba2"}[spec.architecture],
            "hidden_size": spec.d_model,
            "num_hidden_layers": spec.n_layer,
            "state_size": spec.d_state,
            "conv_kernel": spec.d_conv,
            "vocab_size": spec.vocab_size,
            "layer_norm_epsilon": spec.norm_eps,
            "tie_word_embeddings": spec.tie_embeddings,
        }
    return dict(json.loads(json.dumps(keys)))


def card_of(checkpoint: Checkpoint) -> str:
    """The body of a packed directory's README.md, to be kept when it is written anew; "" where there is none."""
    path = checkpoint.path / "README.md" if checkpoint.path and checkpoint.kind == "slimba" else None
    if path is None or not path.exists():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    return text.split("\n---\n", 1)[-1] if text.startswith("---\n") else text


def _model_card(checkpoint: Checkpoint, name: str, card: str) -> str:
    """Front matter that the Hugging Face hub reads, then `card`."""
    tags = ["slimba", checkpoint.spec.architecture]
    if any(s.format == "sign" for layout in checkpoint.layouts.values() for s in layout.segments):
        tags.append("1-bit")
    lines = ["---", "library_name: slimba", "pipeline_tag: text-generation", "tags:", *(f"- {t}" for t in tags), "---"]
    body = card.strip() or (
        f"# {name}\n\nA {checkpoint.spec.architecture} language model of {checkpoint.spec.n_params():,} parameters in "
        "Slimba's packed format.\n\n    slimba inspect DIRECTORY\n    slimba generate DIRECTORY --prompt TEXT"
    )
    return "\n".join(lines) + "\n\n" + body + "\n"


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def _crc32(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


# ---------------------------------------------------------------------------------------------------------- reading


def read_packed(path: str | Path, *, verify: bool = True, tokenizer: str | Path | None = None) -> Checkpoint:
    """Read a packed directory strictly; the arrays are views of the mapped file.

    `verify=False` skips the checksums, nothing else. `tokenizer` replaces the directory's own. UserError naming the
    tensor or key that is missing, unknown, of the wrong type or shape, damaged, or NaN (scales and small tensors).
    """
    path = Path(path)
    config = read_json(path / "config.json")
    spec = spec_of(config, where=path, verify=verify)
    quantization = config["quantization_config"]
    files = read_tensors(path)
    if files.metadata.get("format") != METADATA["format"]:
        raise UserError(f"{files.files[0]} is not Slimba's, but config.json says so; get both from one source")
    if spec.n_layer > len(files.tensors):  # before anything is listed for so many layers
        raise UserError(f"{path}: config.json says {spec.n_layer} layers, but there are {len(files.tensors)} tensors")
    layouts = _layouts(quantization["layers"], path)
    _check_layouts(spec, layouts)
    _check_description(quantization, spec, layouts, path)
    expected = _expected(spec, layouts, quantization["vectors"], path)
    expected |= {name: ("float32", shape) for name, (shape, _) in scan_scales(spec, quantization["numerics"]).items()}
    check_tensors(files.tensors, expected, path)
    if verify:
        verify_checksums(files)
    _check_small_tensors(spec, files, path)
    tokenizer_file = find_tokenizer(path, tokenizer)
    if tokenizer and spec.bos_token_id is None and spec.eos_token_id is None:
        spec = with_text_policy(spec, path, tokenizer_file)
    elif tokenizer_file and not tokenizer and verify:
        _check_tokenizer(tokenizer_file, quantization["checksums"].get("tokenizer.json"))
    return Checkpoint(
        spec=spec,
        layouts={name: layouts[name] for name in spec.matrices()},
        tensors=files.tensors,
        path=path,
        kind="slimba",
        tokenizer_file=tokenizer_file,
        numerics=quantization["numerics"],
        provenance=quantization["provenance"],
        generation=generation_config(path),
    )


def spec_of(config: Mapping[str, Any], *, where: str | Path = "config.json", verify: bool = True) -> ModelSpec:
    """The ModelSpec of a packed directory's config.json, after checking the whole of `quantization_config`."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "slimba":
        raise UserError(f"{where}: config.json has no quantization_config of Slimba")
    version = quantization.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{where}: format_version is {version!r}, not {FORMAT_VERSION}; use a Slimba that reads it")
    for key in sorted(set(quantization) - OPTIONAL ^ KEYS):
        problem = "an unknown" if key in quantization else "no"
        raise UserError(f"{where}: quantization_config has {problem} key {key!r}")
    for key in KEYS - {"quant_method", "format_version"}:
        if not isinstance(quantization[key], dict):
            raise UserError(f"{where}: {key} in quantization_config is not a JSON object")
    if verify:
        stored = quantization["checksums"].get("quantization_config")
        if stored != _crc32(_canonical({k: v for k, v in quantization.items() if k != "checksums"})):
            raise UserError(
                f"{where}: quantization_config in config.json does not agree with its checksum: it was damaged or "
                "edited; copy it again, or pass --no-verify if you edited it"
            )
    for key, value in quantization["numerics"].items():
        if key not in ("activations", "state", "ssm_inputs") or not isinstance(value, str):
            raise UserError(f"{where}: numerics in quantization_config has an unknown entry {key!r}: {value!r}")
    spec = _spec(quantization["spec"], where)
    for key, value in _transformers_keys(spec).items():
        if key in config and config[key] != value:
            raise UserError(
                f"{where}: {key} in config.json is {config[key]!r}, but quantization_config.spec implies {value!r}"
            )
    return spec


def _spec(data: Mapping[str, Any], where: str | Path) -> ModelSpec:
    annotations = ModelSpec.__annotations__
    for key, value in data.items():
        allowed = TYPES.get(str(annotations.get(key)))
        if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)):
            raise UserError(f"{where}: {key} in quantization_config.spec is {value!r}, not of type {annotations[key]}")
    limit = data.get("dt_limit", [0.0, None])
    if not (isinstance(limit, list) and len(limit) == 2 and all(isinstance(v, int | float | None) for v in limit)):
        raise UserError(f"{where}: dt_limit in quantization_config.spec is {limit!r}, not a pair of numbers")
    return ModelSpec.from_dict(data)


def _layouts(layers: Mapping[str, Any], where: Path) -> dict[str, MatrixLayout]:
    out = {}
    for name, data in layers.items():
        if not isinstance(data, dict):
            raise UserError(f"{where}: the format of {name!r} in quantization_config is not a JSON object")
        try:
            out[name] = MatrixLayout.from_json(data)
        except (UserError, OverflowError) as e:  # the latter from a number such as 1e999
            raise UserError(f"{where}: {name!r}: {e}") from None
    return out


def _check_layouts(spec: ModelSpec, layouts: Mapping[str, MatrixLayout]) -> None:
    """One layout of the right size for every matrix of the spec, and none besides."""
    shapes = spec.matrices()
    for name, shape in shapes.items():
        if name not in layouts:
            raise UserError(f"no format is given for {name}")
        given = (layouts[name].rows, layouts[name].cols)
        if given != shape:
            raise UserError(f"the format of {name} is for a matrix of {given}, but the model's is {shape}")
    for name in layouts:
        if name not in shapes:
            raise UserError(f"a format is given for {name!r}, which the model does not have")
    table = layouts["backbone.embeddings"]
    if len(table.segments) > 1 or table.lowrank or table.plane or table.col_scale or table.hadamard:
        raise UserError(f"backbone.embeddings is {table.describe()}; an embedding is one segment without corrections")


def _expected(
    spec: ModelSpec, layouts: Mapping[str, MatrixLayout], vectors: Mapping[str, Any], where: Path
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor with its type and shape, from the config alone."""
    shapes = spec.vectors()
    for key, dtype in vectors.items():
        if dtype not in FLOATS:
            raise UserError(f"{where}: vectors in quantization_config gives {key!r} the type {dtype!r}")
        if key not in shapes and key not in get_args(VectorKind):
            raise UserError(f"{where}: vectors in quantization_config names {key!r}, which the model does not have")
    out: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in spec.matrices():
        out |= layouts[name].tensors(name)
    for name, (shape, kind) in shapes.items():
        dtype = vectors.get(name, vectors.get(kind))
        if dtype is None:
            raise UserError(f"{where}: vectors in quantization_config gives no type for {name}")
        out[name] = (dtype, shape)
    return out


def _check_description(
    quantization: Mapping[str, Any], spec: ModelSpec, layouts: Mapping[str, MatrixLayout], where: Path
) -> None:
    """The description for other programs, where there is one, must be that of the layouts."""
    ordered = {name: layouts[name] for name in spec.matrices()}
    given, ours = quantization.get("compressed_tensors"), metadata(ordered, quantization["numerics"])
    if given is not None and given != ours:
        raise UserError(f"{where}: compressed_tensors in quantization_config does not describe its layers")


def _check_tokenizer(file: Path, stored: str | None) -> None:
    """The tokenizer that came with the model must be undamaged; one that was added later has no checksum."""
    if stored is not None and _crc32(file.read_bytes()) != stored:
        raise UserError(f"{file} does not agree with its checksum; copy it again (--no-verify if you changed it)")


def _check_small_tensors(spec: ModelSpec, files: TensorFiles, path: Path) -> None:
    """Scales and vectors must be finite; the bulk (signs, codes) cannot be anything else."""
    vectors = spec.vectors()
    for name, a in files.tensors.items():
        if name in vectors or name.endswith("scale"):
            check_finite(name, a, path)
