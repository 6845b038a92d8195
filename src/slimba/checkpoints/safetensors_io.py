"""safetensors files: checked reading as memory-mapped NumPy views, deterministic streaming writes, checksums. No torch.

    files = read_tensors(Path("model-dir"))     # model.safetensors, or the shards that its index names
    files.tensors["backbone.norm_f.weight"]     # a read-only view: nothing is read from the disk until it is used
    verify_checksums(files)

The header is validated by the `safetensors` library (bounds, holes, overlaps); the views are made here because that
library would copy, and has no NumPy bfloat16. Files are written with the tensors ordered by item size and then by name,
so that every view is aligned, and the data starts at a multiple of 64 bytes.

Run the tests: `pytest tests/checkpoints/test_safetensors_io.py`.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from slimba.errors import UserError
from slimba.formats.floats import DTYPES

__all__ = [
    "SHARD_BYTES",
    "TensorFiles",
    "dtype_name",
    "file_bytes",
    "read_json",
    "read_safetensors",
    "read_tensors",
    "verify_checksums",
    "write_tensors",
]

SHARD_BYTES = 4_000_000_000
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8", "uint8": "U8", "int32": "I32"}
NAMES = {code: name for name, code in CODES.items()}
ALIGN = 64
AGAIN = "copy or download it again"

Entries = Mapping[str, tuple[str, tuple[int, ...]]]  # tensor name -> (dtype name, shape)


@dataclass(slots=True)
class TensorFiles:
    """The tensors of a directory with the metadata of its files."""

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    origin: dict[str, str] = field(default_factory=dict)  # tensor name -> file name, for messages


def dtype_name(a: np.ndarray) -> str:
    """`float16` etc.; UserError for a type that no Slimba tensor has."""
    name = a.dtype.name
    if name not in CODES:
        raise UserError(f"tensors of type {name} are not supported, only {', '.join(CODES)}")
    return name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError when it is missing or is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_hook=_special_float)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e}); {AGAIN}") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no JSON object; {AGAIN}")
    return data


def _special_float(obj: dict[str, Any]) -> Any:
    """transformers 5 writes an infinite number as {"__float__": "Infinity"}."""
    return float(obj["__float__"]) if set(obj) == {"__float__"} else obj


# ---------------------------------------------------------------------------------------------------------- reading


def read_tensors(directory: Path) -> TensorFiles:
    """Every tensor of `directory`: one file, or the shards of an index, which must hold exactly what it lists."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return read_safetensors(single)
    if not index.exists():
        raise UserError(f"{directory} holds no model.safetensors and no {index.name}")
    return merge_shards(index, read_safetensors)


def merge_shards(index: Path, read: Callable[[Path], TensorFiles]) -> TensorFiles:
    """The shards of an index file, each read by `read`; a tensor missing from its shard or not listed is an error."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index} has no weight_map; {AGAIN}")
    out = TensorFiles()
    for name in sorted(set(weight_map.values())):
        if name != Path(name).name or name in (".", ".."):
            raise UserError(f"{index} names {name!r}, which is not a file beside it")
        shard = read(index.parent / name)
        for tensor in shard.tensors:
            if weight_map.get(tensor) != name:
                raise UserError(f"{index.parent / name} holds {tensor}, which {index.name} does not place there")
        out.tensors |= shard.tensors
        out.metadata |= shard.metadata
        out.origin |= shard.origin
        out.files += shard.files
    for tensor, name in weight_map.items():
        if tensor not in out.tensors:
            raise UserError(f"{index.parent / name} lacks {tensor!r}, which {index.name} places there; {AGAIN}")
    return out


def read_safetensors(path: Path) -> TensorFiles:
    """One file: header validated, tensors as read-only views of the mapped file."""
    header, start = _read_header(path)
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path}: the header is damaged ({e}); {AGAIN}") from None
    with open(path, "rb") as f:
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    out = TensorFiles(metadata=header.pop("__metadata__", None) or {}, files=[path])
    for name, entry in header.items():
        out.tensors[name] = _view(mapped, path, name, entry, start)
        out.origin[name] = path.name
    return out


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """(parsed header, offset of the data)."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            (n,) = struct.unpack("<Q", f.read(8).ljust(8, b"\xff"))
            if n > size - 8:
                raise UserError(f"{path} is truncated or not a safetensors file ({size} bytes); {AGAIN}")
            header = json.loads(f.read(n).decode(), object_pairs_hook=_clean_names)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: the header is damaged ({e}); {AGAIN}") from None
    ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"] if _well_formed(header) else None
    if ends is None:
        raise UserError(f"{path}: the header is damaged (an entry is malformed); {AGAIN}")
    promised = 8 + n + max(ends, default=0)
    if size < promised:
        raise UserError(f"{path} is truncated: {size} bytes where its header promises {promised}; {AGAIN}")
    return header, 8 + n


def _well_formed(header: Any) -> bool:
    """The types that `_view` relies on; the ranges are the library's to check."""

    def ints(v: Any) -> bool:
        return isinstance(v, list) and all(type(x) is int and x >= 0 for x in v)

    return isinstance(header, dict) and all(
        isinstance(v, dict)
        and (
            all(isinstance(s, str) for s in v.values())
            if k == "__metadata__"
            else isinstance(v.get("dtype"), str)
            and ints(v.get("shape"))
            and ints(v.get("data_offsets"))
            and len(v["data_offsets"]) == 2
        )
        for k, v in header.items()
    )


def _clean_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the header; its names must differ, and be fit to print in a message."""
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name occurs twice")
    if not all(name.isprintable() for name in out):
        raise ValueError("a name holds control characters")
    return out


def _view(mapped: mmap.mmap, path: Path, name: str, entry: dict[str, Any], start: int) -> np.ndarray:
    if entry["dtype"] not in NAMES:
        raise UserError(f"{path}: {name} has type {entry['dtype']!r}; only {', '.join(NAMES)} are supported")
    dtype, shape = DTYPES[NAMES[entry["dtype"]]], tuple(entry["shape"])
    low, high = entry["data_offsets"]
    if low == high:
        return np.empty(shape, dtype)
    a = np.frombuffer(mapped, dtype, (high - low) // dtype.itemsize, start + low).reshape(shape)
    return a if a.flags.aligned else a.copy()  # engines need aligned data; files of ours always are


# -------------------------------------------------------------------------------------------------------- checksums


def crc32_of(a: np.ndarray) -> str:
    """Eight hex digits of the CRC-32 of the bytes of `a`."""
    return f"{zlib.crc32(np.ascontiguousarray(a).reshape(-1).view(np.uint8).data):08x}"


def verify_checksums(files: TensorFiles) -> int:
    """Check every tensor against its `crc32.<name>` in the metadata, in threads; returns how many agree.

    UserError naming the first tensor whose checksum is missing or disagrees, or a checksum without a tensor.
    """
    prefix = "crc32."
    for key in files.metadata:
        name = key.removeprefix(prefix)
        if name != key and name not in files.tensors:
            raise UserError(f"{files.files[0]} has a checksum for {name}, but no such tensor; {AGAIN}")

    def check(name: str) -> str | None:
        stored = files.metadata.get(prefix + name)
        if stored is None:
            return "has no checksum"
        agrees = crc32_of(files.tensors[name]) == stored
        return None if agrees else "does not agree with its checksum: the file is damaged"

    names = sorted(files.tensors, key=lambda n: -files.tensors[n].nbytes)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, problem in zip(names, pool.map(check, names), strict=True):
            if problem:
                raise UserError(f"{files.files[0].parent / files.origin[name]}: {name} {problem}; {AGAIN}")
    return len(names)


# ---------------------------------------------------------------------------------------------------------- writing


def write_tensors(
    directory: Path,
    entries: Entries,
    get: Callable[[str], np.ndarray],
    *,
    metadata: Mapping[str, str],
    checksums: bool,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model.safetensors`, or shards with their index when the tensors exceed `shard_bytes`.

    `get` is called once a tensor, just before it is written, so a whole model is never in memory; what it returns must
    have the type and shape that `entries` promises. The bytes depend on nothing but the arguments.
    """
    shards = _plan_shards(entries, shard_bytes)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        with open(directory / file, "xb") as f:
            _write_file(f, {n: entries[n] for n in names}, get, metadata, checksums)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": _nbytes(entries.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def file_bytes(entries: Entries, *, metadata: Mapping[str, str], checksums: bool) -> tuple[int, int]:
    """(bytes of the header with its length field, bytes of the tensors) of the one file `write_tensors` would write."""
    crcs = dict.fromkeys(entries, "0" * 8) if checksums else {}
    return len(_header(entries, metadata, crcs)), _nbytes(entries.values())


def _plan_shards(entries: Entries, shard_bytes: int) -> list[list[str]]:
    """Tensors in their given order, a new shard when the next one would not fit."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        n = _nbytes([entry])
        if shards[-1] and size + n > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n
    return shards


def _nbytes(entries: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    return sum(DTYPES[dtype].itemsize * int(np.prod(shape, dtype=np.int64)) for dtype, shape in entries)


def _order(entries: Entries) -> list[str]:
    return sorted(entries, key=lambda n: (-DTYPES[entries[n][0]].itemsize, n))


def _header(entries: Entries, metadata: Mapping[str, str], crcs: Mapping[str, str]) -> bytes:
    """Length field and JSON header, padded with spaces so that the data starts at a multiple of 64 bytes."""
    all_metadata = dict(metadata) | {f"crc32.{name}": crc for name, crc in crcs.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted(all_metadata.items()))}
    at = 0
    for name in _order(entries):
        dtype, shape = entries[name]
        end = at + _nbytes([entries[name]])
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    return struct.pack("<Q", len(text)) + text


def _write_file(
    f: BinaryIO, entries: Entries, get: Callable[[str], np.ndarray], metadata: Mapping[str, str], checksums: bool
) -> None:
    """Header with zero checksums, tensors, then the header again with the real ones, which are as long."""
    crcs = dict.fromkeys(entries, "0" * 8) if checksums else {}
    f.write(_header(entries, metadata, crcs))
    for name in _order(entries):
        a = np.ascontiguousarray(get(name))
        dtype, shape = entries[name]
        if (dtype_name(a), a.shape) != (dtype, shape):
            raise UserError(f"{name} is {dtype_name(a)} {a.shape}, but the layout says {dtype} {shape}")
        f.write(a.reshape(-1).view(np.uint8).data)
        if checksums:
            crcs[name] = crc32_of(a)
    if checksums:
        f.seek(0)
        f.write(_header(entries, metadata, crcs))
