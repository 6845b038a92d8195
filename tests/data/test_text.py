"""Text sources and packing: every file type gives the same documents, bad files give one clear error."""

import gzip
import json
import subprocess
import sys

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from slimba.data import text as module
from slimba.data.text import documents, encode_documents
from slimba.errors import UserError

DOCS = ["first document\nwith two lines", "second – nicht ASCII", "third"]


class Bytes:
    """A tokenizer of bytes; the data room asks for nothing but encode_batch."""

    def encode_batch(self, texts):
        return [[b + 1 for b in t.encode()] for t in texts]


def write(path, kind):
    text = "\n\n".join(DOCS)
    if kind == "txt":
        path.write_text(text, "utf-8")
    elif kind == "zst":
        path.write_bytes(zstandard.compress(text.encode()))
    elif kind == "gz":
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": d}) for d in DOCS) + "\n", "utf-8")
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": DOCS}), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "zst", "gz", "jsonl", "parquet"])
def test_every_kind_gives_the_same_documents(tmp_path, kind):
    assert list(documents([write(tmp_path / f"a.{kind}", kind)])) == DOCS


def test_several_sources_come_in_order(tmp_path):
    files = [write(tmp_path / "a.txt", "txt"), write(tmp_path / "b.jsonl", "jsonl")]
    assert list(documents(files)) == DOCS + DOCS


def test_file_split_keeps_blank_lines(tmp_path):
    assert list(documents([write(tmp_path / "a.txt", "txt")], "file")) == ["\n\n".join(DOCS)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "no text"),
        ("blank.txt", b" \n\n \n", "no text"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("cut.zst", zstandard.compress(b"hello " * 1000)[:20], "Zstandard"),
        ("cut.gz", gzip.compress(b"hello " * 1000, mtime=0)[:20], "gzip"),
        ("no.gz", b"hello", "gzip"),
        ("ids.npy", b"", "token ids"),
        ("bad.jsonl", b'{"txt": 1}\n', "line 1"),
        ("bad.parquet", b"PAR1 not really", "Parquet"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(documents([path]))
    assert name in str(error.value)


def test_missing_file_and_no_file():
    with pytest.raises(UserError, match="nowhere"):
        list(documents(["nowhere.txt"]))
    with pytest.raises(UserError, match="no text given"):
        list(documents([]))


def test_bos_stands_before_every_document():
    ids = encode_documents(Bytes(), ["ab", "c"], bos_id=0)
    assert ids.tolist() == [0, 98, 99, 0, 100]
    assert encode_documents(Bytes(), ["ab", "c"], bos_id=None).tolist() == [98, 99, 100]


@given(st.lists(st.text(" \t\nab", max_size=6), max_size=8))
def test_a_text_in_pieces_splits_as_the_whole_text_does(pieces):
    whole = module.BLANK_LINE.split("".join(pieces).strip("\n"))
    assert list(module._split_at_blank_lines(pieces)) == whole


@given(st.lists(st.text(max_size=9), min_size=1, max_size=5), st.integers(1, 7))
def test_small_blocks_give_the_same_documents(tmp_path_factory, docs, block):
    """Characters and lines that go on in the next block; a line break inside JSON is no line break of the file."""
    folder = tmp_path_factory.mktemp("blocks")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": d}, ensure_ascii=False) + "\n" for d in docs), "utf-8")
    text = "\n\n".join(docs)
    (folder / "a.txt").write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        assert list(module._all_documents(str(folder / "a.jsonl"), "file")) == docs
        assert list(module._all_documents(str(folder / "a.txt"), "file")) == [text]
        assert list(module._all_documents(str(folder / "a.txt"), "blank-line")) == module.BLANK_LINE.split(
            text.strip("\n")
        )


def test_the_place_of_a_bad_byte_is_said_whatever_the_blocks(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes("aé".encode() * 10 + b"\xff" + b"b" * 9)
    for block in (1, 2, 5, 100):
        monkeypatch.setattr(module, "BLOCK", block)
        with pytest.raises(UserError, match=r"byte 30\)"):
            list(documents([tmp_path / "a.txt"]))


@pytest.mark.parametrize("kind", ["txt.zst", "jsonl.zst"])
def test_memory_does_not_grow_with_the_text(tmp_path, kind):
    """256 MB of text in a process that may grow by 48 MB."""
    line = "ten words of a text that is read in blocks\n"
    line = line * 20 + "\n" if kind == "txt.zst" else json.dumps({"text": line * 20}) + "\n"
    packer = zstandard.ZstdCompressor().compressobj()
    with open(tmp_path / ("a." + kind), "wb") as f:
        for _ in range(256):
            f.write(packer.compress((line * ((1 << 20) // len(line))).encode()))
        f.write(packer.flush())
    code = """
import resource, sys
from slimba.data.text import documents
import zstandard
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sum(len(d) for d in documents([sys.argv[1]])), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code, f.name], capture_output=True, text=True, timeout=100)
    characters, kilobytes = map(int, done.stdout.split())
    assert characters > 200_000_000
    assert kilobytes < 48 << 10
