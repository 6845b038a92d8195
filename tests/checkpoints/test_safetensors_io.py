"""safetensors reading and writing against the library, and damaged files.

Run: pytest tests/checkpoints/test_safetensors_io.py
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from slimba.checkpoints.safetensors_io import (
    TensorFiles,
    dtype_name,
    file_bytes,
    read_json,
    read_safetensors,
    read_tensors,
    verify_checksums,
    write_tensors,
)
from slimba.errors import UserError


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "b.odd": rng.integers(0, 256, (3, 5), dtype=np.uint8),
        "a.codes": rng.integers(-127, 128, (7, 3), dtype=np.int8),
        "half": rng.standard_normal((5, 3)).astype(np.float16),
        "brain": rng.standard_normal((4, 1, 3)).astype(ml_dtypes.bfloat16),
        "full": rng.standard_normal(11).astype(np.float32),
        "none": np.empty((0, 4), np.float32),
    }


def write(directory: Path, tensors: dict[str, np.ndarray], **kwargs: Any) -> None:
    directory.mkdir(exist_ok=True)
    entries = {n: (dtype_name(a), a.shape) for n, a in tensors.items()}
    settings: dict[str, Any] = {"metadata": {"format": "slimba"}, "checksums": True} | kwargs
    write_tensors(directory, entries, tensors.__getitem__, **settings)


def same(files: TensorFiles, tensors: dict[str, np.ndarray]) -> bool:
    def facts(a: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
        return a.dtype.name, a.shape, a.tobytes()

    return {n: facts(a) for n, a in files.tensors.items()} == {n: facts(a) for n, a in tensors.items()}


def test_round_trip(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path, tensors)
    files = read_tensors(tmp_path)
    assert same(files, tensors)
    assert verify_checksums(files) == len(tensors)
    assert all(a.flags.aligned and not a.flags.owndata for n, a in files.tensors.items() if n != "none")
    with pytest.raises(ValueError, match="read-only"):
        files.tensors["full"][0] = 1
    write(tmp_path / "again", dict(reversed(tensors.items())))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_the_library_reads_ours(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path, tensors)
    with safe_open(tmp_path / "model.safetensors", framework="np") as f:
        assert set(f.keys()) == set(tensors)
        assert f.metadata()["format"] == "slimba"
        np.testing.assert_array_equal(f.get_tensor("half"), tensors["half"])
        np.testing.assert_array_equal(f.get_tensor("a.codes"), tensors["a.codes"])


def test_file_bytes_is_exact(tmp_path: Path) -> None:
    tensors = some_tensors()
    entries = {n: (dtype_name(a), a.shape) for n, a in tensors.items()}
    write(tmp_path, tensors)
    header, data = file_bytes(entries, metadata={"format": "slimba"}, checksums=True)
    assert data == sum(a.nbytes for a in tensors.values())
    assert header % 64 == 0
    assert header + data == (tmp_path / "model.safetensors").stat().st_size


def test_shards(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path, tensors, shard_bytes=50)
    shards = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    files = read_tensors(tmp_path)
    assert same(files, tensors)
    assert verify_checksums(files) == len(tensors)
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())


def test_broken_shards(tmp_path: Path) -> None:
    write(tmp_path, some_tensors(), shard_bytes=50)
    path = tmp_path / "model.safetensors.index.json"
    good = read_json(path)

    def with_map(changes: dict[str, str | None]) -> None:
        weight_map = {k: v for k, v in (good["weight_map"] | changes).items() if v is not None}
        path.write_text(json.dumps({"weight_map": weight_map}))

    with_map({"extra": good["weight_map"]["half"]})
    with pytest.raises(UserError, match="lacks 'extra'"):
        read_tensors(tmp_path)
    with_map({"b.odd": None})
    with pytest.raises(UserError, match=r"holds b\.odd"):
        read_tensors(tmp_path)
    with_map({"half": "../model.safetensors"})
    with pytest.raises(UserError, match="not a file beside it"):
        read_tensors(tmp_path)
    path.write_text("{}")
    with pytest.raises(UserError, match="weight_map"):
        read_tensors(tmp_path)
    path.write_text(json.dumps(good))
    (tmp_path / good["weight_map"]["half"]).unlink()
    with pytest.raises(UserError, match=r"model-0000.*is missing"):
        read_tensors(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        read_tensors(tmp_path)
    with pytest.raises(UserError, match="is missing"):
        read_safetensors(tmp_path / "model.safetensors")


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"abc", "truncated"),
        (struct.pack("<Q", 2**62) + b"{}", "truncated"),
        (raw(b"{nonsense"), "header is damaged"),
        (raw(b"\xff\xfe{}"), "header is damaged"),
        (raw([1]), "header is damaged"),
        (raw({"a": 1}), "header is damaged"),
        (raw({"a": {"dtype": "F32"}}), "header is damaged"),
        (raw({"a": F32 | {"shape": [-2]}}, b"x" * 8), "header is damaged"),
        (raw({"a": F32 | {"shape": [3]}}, b"x" * 8), "header is damaged"),
        (raw({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, b"x" * 12), "header is damaged"),
        (raw({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, b"x" * 20), "header is damaged"),
        (raw(b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), b"x" * 8), "twice"),
        (raw({"a": F32}, b"x" * 7), "truncated"),
        (raw({"a": F32}, b"x" * 9), "header is damaged"),
        (raw({"a": F32 | {"dtype": "F64", "shape": [1]}}, b"x" * 8), "a has type 'F64'"),
        (raw({"__metadata__": {"a": 1}}), "header is damaged"),
        (raw({"a\nb": F32}, b"x" * 8), "control characters"),
        (raw({"__metadata__": {"a\x1b[2J": "1"}}), "control characters"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as e:
        read_safetensors(path)
    assert str(path) in str(e.value)


def test_checksums_name_the_tensor(tmp_path: Path) -> None:
    write(tmp_path, some_tensors())
    path = tmp_path / "model.safetensors"
    good = bytearray(path.read_bytes())
    good[-1] ^= 4  # the last byte belongs to the last one-byte tensor by name
    path.write_bytes(good)
    with pytest.raises(UserError, match=r"b\.odd does not agree"):
        verify_checksums(read_tensors(tmp_path))
    write(tmp_path / "plain", some_tensors(), checksums=False)
    with pytest.raises(UserError, match="has no checksum"):
        verify_checksums(read_tensors(tmp_path / "plain"))


def test_unaligned_tensors_of_others_are_copied(tmp_path: Path) -> None:
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "b": F32 | {"data_offsets": [1, 9]}}
    values = np.array([1.5, -2.5], np.float32)
    (tmp_path / "model.safetensors").write_bytes(raw(header, b"x" + values.tobytes()))
    b = read_tensors(tmp_path).tensors["b"]
    assert b.flags.aligned
    np.testing.assert_array_equal(b, values)


def test_writer_refuses_what_the_layout_does_not_say(tmp_path: Path) -> None:
    entries: dict[str, tuple[str, tuple[int, ...]]] = {"a": ("float32", (3,))}
    for wrong in (np.zeros(4, np.float32), np.zeros(3, np.float16)):
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        with pytest.raises(UserError, match="but the layout says"):
            write_tensors(tmp_path, entries, lambda name, a=wrong: a, metadata={}, checksums=False)
    with pytest.raises(UserError, match="float64"):
        dtype_name(np.zeros(1))


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"time_step_limit": [0.0, {"__float__": "Infinity"}], "b": Infinity}')
    assert read_json(path) == {"time_step_limit": [0.0, float("inf")], "b": float("inf")}
    for bad in ("[1]", "{", "[" * 100_000, '{"__float__": []}', "\ud800"):
        path.write_text(bad, errors="surrogatepass")
        with pytest.raises(UserError, match=r"config\.json"):
            read_json(path)
