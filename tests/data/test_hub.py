"""`datasets:NAME`: local folders and saved data sets stream like files; what is wrong is named.

Run: `pytest tests/data/test_hub.py`; without the library `datasets` only the errors are tested.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from helpers.tiny import tiny_tokenizer
from slimba.data.hub import DatasetSource, local_files
from slimba.data.text import documents
from slimba.data.tokenizer import Tokenizer
from slimba.data.tokens import open_tokens
from slimba.errors import UserError

DOCS = ["first document\n\nwith a blank line", "second – nicht ASCII", "third"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    path = tmp_path / "corpus"
    path.mkdir()
    rows = [{"text": d, "content": d.upper(), "n": i} for i, d in enumerate(DOCS)]
    (path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    (path / "validation.jsonl").write_text(json.dumps(rows[2]) + "\n", "utf-8")
    return path


def test_a_folder_is_streamed_row_by_row(folder):
    pytest.importorskip("datasets")
    assert list(documents([f"datasets:{folder}"])) == DOCS
    assert list(documents([f"datasets:{folder},column=content"])) == [d.upper() for d in DOCS]
    assert list(documents([f"datasets:{folder},split=validation"])) == DOCS[2:]


def test_a_saved_data_set_is_read(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_dict({"text": DOCS})
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(str(tmp_path / "both"))
    assert list(documents([f"datasets:{tmp_path / 'saved'}"])) == DOCS
    assert list(documents([f"datasets:{tmp_path / 'both'},split=test"])) == DOCS[1:2]


def test_a_changed_folder_is_tokenised_anew(folder, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("SLIMBA_CACHE_DIR", str(tmp_path / "cache"))
    words = Tokenizer.from_file(tiny_tokenizer(tmp_path))

    def text():
        with open_tokens([f"datasets:{folder}"], words, bos_id=None, n_vocab=300) as ids:
            return words.decode(ids.read(0, ids.wait(None)).tolist())

    assert text() == "".join(DOCS)
    with open(folder / "train.jsonl", "a") as f:
        f.write(json.dumps({"text": "more", "content": "", "n": 3}) + "\n")
    assert text() == "".join([*DOCS, "more"])
    assert [name for name, _, _ in local_files(f"datasets:{folder}")] == ["train.jsonl", "validation.jsonl"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (",column=words", "has no column 'words', its columns are text, content, n"),
        (",column=n", "column 'n' holds int, not text"),
        (",split=nowhere", "cannot be read .*nowhere"),
        ("-that-is-not-there", "cannot be read"),
        (",page=3", "'page=3' is none of config=, split=, column= and revision="),
    ],
)
def test_what_is_wrong_is_named(folder, more, message):
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=message):
        list(documents([f"datasets:{folder}{more}"]))


def test_a_source_is_taken_apart():
    got = DatasetSource.parse("datasets:HuggingFaceFW/fineweb-edu,config=sample-10BT,revision=v1,column=c")
    assert got == DatasetSource("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", "c", "v1")
    with pytest.raises(UserError, match="names no data set"):
        DatasetSource.parse("datasets:")


def test_without_the_library_one_line_says_so():
    code = """
import sys
sys.modules["datasets"] = None  # what Python does for a package that is not there
from slimba.data.text import documents
from slimba.errors import UserError
try:
    list(documents(["datasets:x/y"]))
except UserError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == 'datasets:x/y: needs the library `datasets`; pip install "slimba[datasets]"', (
        done.stderr
    )
