"""Text sources and packing: every file type gives the same documents, bad files give one clear error."""

import json

import numpy as np
import pytest
import zstandard

from slimba.data.batches import WindowBatches
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
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": d}) for d in DOCS) + "\n", "utf-8")
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": DOCS}), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "zst", "jsonl", "parquet"])
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


def test_windows_cover_the_text_once_a_pass_and_depend_only_on_the_step():
    ids = np.arange(1001, dtype=np.int32)
    batches = WindowBatches(ids, window=10, batch=4, seed=3)
    one_pass = np.concatenate([batches[i] for i in range(25)])
    assert sorted(one_pass[:, 0].tolist()) == list(range(0, 1000, 10))
    assert (one_pass[:, 1:] == one_pass[:, :-1] + 1).all()
    again = WindowBatches(ids, window=10, batch=4, seed=3)
    assert (again[17] == batches[17]).all()
    assert (WindowBatches(ids, 10, 4, seed=4)[0] != batches[0]).any()
    assert (batches[25] != batches[0]).any(), "the second pass has its own order"


def test_too_little_text_for_a_window():
    with pytest.raises(UserError, match="fewer than one window"):
        WindowBatches(np.arange(10, dtype=np.int32), window=10, batch=1)
