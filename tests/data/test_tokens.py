"""Training tokens: made in the background and cached exactly, whoever is killed or joins; files of ids."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from helpers.tiny import TEXT, tiny_tokenizer
from slimba.data import cache, tokens
from slimba.data.batches import WindowBatches
from slimba.data.text import documents, encode_documents
from slimba.data.tokenizer import Tokenizer
from slimba.data.tokens import ArrayTokens, open_tokens
from slimba.errors import UserError


@pytest.fixture
def words(tmp_path):
    return Tokenizer.from_file(tiny_tokenizer(tmp_path))


@pytest.fixture
def text(tmp_path, monkeypatch):
    """Two files of several chunks, and a cache of their own."""
    monkeypatch.setenv("SLIMBA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 300)
    (tmp_path / "a.txt").write_text("\n\n".join(f"{i} {TEXT[i : i + 60]}".strip() for i in range(40)), "utf-8")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(30)))
    return [tmp_path / "a.txt", tmp_path / "b.jsonl"]


def opened(text, words, **changes):
    return open_tokens(text, words, **(dict(bos_id=0, n_vocab=words.n_vocab) | changes))


def whole(text, words):
    return encode_documents(words, documents(text), 0)


def entries(folder):
    return sorted(p for p in folder.glob("cache/tokens/*"))


# ------------------------------------------------------------------ a text


def test_the_ids_are_those_of_the_whole_text(text, words):
    want = whole(text, words)
    with opened(text, words) as ids:
        n = ids.wait(None)
        assert n == len(want) and ids.wait(10**9) == n
        assert ids.read(0, n).dtype == np.int32
        assert (ids.read(0, n) == want).all()
        assert (ids.read(7, 19) == want[7:19]).all()


def test_only_what_is_asked_for_and_a_little_more_is_made(text, words, monkeypatch):
    monkeypatch.setattr(tokens, "AHEAD", 100)
    with opened(text, words) as ids:
        assert ids.wait(50) >= 50
        time.sleep(0.3)
        made = ids.wait(0)
        assert 150 <= made < 600 < len(whole(text, words)), "the thread rests"
        assert ids.wait(700) >= 700


def test_a_second_run_finds_the_ids_and_needs_no_text(text, words, tmp_path):
    want = whole(text, words)
    with opened(text, words) as ids:
        ids.wait(None)
    (entry,) = entries(tmp_path)
    assert entry.stat().st_mode & 0o777 == 0o700
    with opened(text, words) as ids:
        text[0].unlink()
        assert (ids.read(0, ids.wait(None)) == want).all()
        assert ids._thread is None, "nothing was made"


def test_other_text_tokenizer_or_beginning_have_their_own_entries(text, words, tmp_path):
    for changes in ({}, {"bos_id": None}, {"split": "file"}):
        with opened(text, words, **changes) as ids:
            ids.wait(None)
    text[1].write_text(json.dumps({"text": "other"}) + "\n")
    with opened(text, words) as ids:
        assert (ids.read(0, ids.wait(None)) == whole(text, words)).all()
    assert len(entries(tmp_path)) == 4


@pytest.mark.parametrize("damage", ["ids", "progress", "nonsense"])
def test_a_damaged_entry_is_made_anew(text, words, tmp_path, damage):
    with opened(text, words) as ids:
        ids.wait(None)
    (entry,) = entries(tmp_path)
    if damage == "ids":
        os.truncate(entry / "ids.bin", 100)
    elif damage == "progress":
        (entry / "progress.json").unlink()
    else:
        (entry / "progress.json").write_text('{"ids"')
    with opened(text, words) as ids:
        assert (ids.read(0, ids.wait(None)) == whole(text, words)).all()


def test_an_interrupted_text_goes_on_where_it_stopped(text, words, monkeypatch):
    """The beginning is taken from the cache: a tokenizer that makes other ids shows which documents it got."""
    monkeypatch.setattr(tokens, "AHEAD", 0)
    want = whole(text, words)
    for n in (1, 300, 700, None):
        with opened(text, words) as ids:
            made = ids.wait(n)
            assert (ids.read(0, made) == want[:made]).all()
    assert made == len(want)


CHILD = """
import sys, time
from slimba.data import tokens
from slimba.data.tokenizer import Tokenizer
tokens.BATCH_CHARACTERS = 300
encode = Tokenizer.encode_batch
def slow(self, texts):
    time.sleep(0.02)
    return encode(self, texts)
Tokenizer.encode_batch = slow
words = Tokenizer.from_file(sys.argv[1])
with tokens.open_tokens(sys.argv[2:], words, bos_id=0, n_vocab=words.n_vocab) as ids:
    ids.read(0, ids.wait(None)).tofile(sys.stdout.buffer)
"""


def child(text, words, **more):
    line = [sys.executable, "-c", CHILD, str(words.path), *map(str, text)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, **more)


def test_a_killed_process_leaves_ids_that_count(text, words, tmp_path):
    with child(text, words) as process:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not list(tmp_path.glob("cache/tokens/*/progress.json")):
            time.sleep(0.01)
        time.sleep(0.07)
        process.send_signal(signal.SIGKILL)
    (entry,) = entries(tmp_path)
    before = json.loads((entry / "progress.json").read_text())
    assert before["ids"] > 0 and not before["ended"]
    with opened(text, words) as ids:
        assert (ids.read(0, ids.wait(None)) == whole(text, words)).all()


def test_processes_that_share_an_entry_all_get_the_text(text, words):
    want = whole(text, words)
    with child(text, words) as one, child(text, words) as two, opened(text, words) as ids:
        assert (ids.read(0, ids.wait(None)) == want).all()
        for process in (one, two):
            assert (np.frombuffer(process.communicate(timeout=30)[0], np.int32) == want).all()


def test_errors_of_the_thread_reach_who_waits(text, words):
    text[1].write_text("{}\n")
    with opened(text, words) as ids:
        assert ids.wait(5) >= 5, "the first file is good"
        with pytest.raises(UserError, match=r"b\.jsonl, line 1"):
            ids.wait(None)


def test_ids_that_the_model_does_not_have_are_refused_from_the_cache_too(text, words):
    for _ in range(2):
        with (
            opened(text, words, n_vocab=50) as ids,
            pytest.raises(UserError, match="outside the model's vocabulary of 50"),
        ):
            ids.wait(None)
    with opened(text, words) as ids:
        ids.wait(None)


def test_no_tokenizer_and_no_cache_are_named(text, words, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--tokenizer"):
        open_tokens(text, None, bos_id=0, n_vocab=10)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLIMBA_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set SLIMBA_CACHE_DIR"):
        opened(text, words)


def test_the_cache_is_in_the_users_cache_directory(monkeypatch):
    monkeypatch.delenv("SLIMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(cache.cache_directory()) == "/xdg/slimba"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(cache.cache_directory()).endswith("/.cache/slimba")


def test_the_origin_knows_the_content_and_not_the_place(text, words, tmp_path):
    with opened(text, words) as ids:
        first = ids.origin
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    with opened([f.rename(moved / f.name) for f in text], words) as ids:
        assert ids.origin == first
    (moved / "a.txt").write_text("other", "utf-8")
    with opened([moved / f.name for f in text], words) as ids:
        assert ids.origin != first


# ------------------------------------------------------------------ files of ids


@pytest.mark.parametrize("kind", ["npy16", "npy32", "npy64", "bin"])
def test_files_of_ids_need_no_tokenizer(tmp_path, kind):
    values = np.arange(90) % 50
    path = tmp_path / ("ids.bin" if kind == "bin" else "ids.npy")
    if kind == "bin":
        values.astype("<u2").tofile(path)
    else:
        np.save(path, values.astype({"npy16": np.uint16, "npy32": np.int32, "npy64": np.int64}[kind]))
    with open_tokens([path, path], None, bos_id=None, n_vocab=50) as ids:
        assert ids.wait(None) == 180
        assert ids.read(85, 95).tolist() == [35, 36, 37, 38, 39, 0, 1, 2, 3, 4]
        assert ids.read(0, 5).dtype == ids.read(88, 93).dtype == np.int32
        batches = WindowBatches(ids, 8, 2)
        assert batches.n_windows == 22 and batches[0].shape == (2, 9)
        assert ids.origin["ids"][0]["bytes"] == path.stat().st_size


def test_a_large_vocabulary_has_wider_ids_in_bin(tmp_path):
    np.array([1, 99_999], "<u4").tofile(tmp_path / "ids.bin")
    with open_tokens([tmp_path / "ids.bin"], None, bos_id=None, n_vocab=100_000) as ids:
        assert ids.read(0, 2).tolist() == [1, 99_999]


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        (
            "out.npy",
            lambda p: np.save(p, np.array([1, 2, 50])),
            r"holds id 50 \(number 2\), outside .* vocabulary of 50",
        ),
        ("neg.npy", lambda p: np.save(p, np.array([1, -2, 5])), r"holds id -2 \(number 1\)"),
        ("float.npy", lambda p: np.save(p, np.ones(5)), r"holds float64 \[5\]"),
        ("two.npy", lambda p: np.save(p, np.ones((5, 2), int)), r"holds int64 \[5, 2\]"),
        ("object.npy", lambda p: np.save(p, np.array([None]), allow_pickle=True), "not a whole .npy file"),
        ("cut.npy", lambda p: (np.save(p, np.ones(50, int)), os.truncate(p, 200)), "not a whole .npy file"),
        ("bad.npy", lambda p: p.write_bytes(b"hello"), "not a whole .npy file"),
        ("empty.npy", lambda p: np.save(p, np.ones(0, int)), "holds no ids"),
        ("empty.bin", lambda p: p.write_bytes(b""), "holds no ids"),
        ("cut.bin", lambda p: p.write_bytes(b"abc"), "cut short or of another type: 3 bytes"),
        ("none.npy", lambda p: None, "is not a file"),
    ],
)
def test_bad_files_of_ids_are_named(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(UserError, match=message) as error:
        open_tokens([tmp_path / name], None, bos_id=None, n_vocab=50)
    assert name in str(error.value)


def test_ids_and_text_do_not_mix(tmp_path):
    with pytest.raises(UserError, match=r"a.npy holds token ids and .*b.txt text"):
        open_tokens([tmp_path / "a.npy", tmp_path / "b.txt"], None, bos_id=None, n_vocab=50)


def test_arrays_say_their_hash():
    a, b = np.arange(5, dtype=np.int32), np.arange(5, dtype=np.uint16)
    assert ArrayTokens(a).origin == ArrayTokens(b).origin == ArrayTokens(b[:2], b[2:]).origin
    assert ArrayTokens(a).origin != ArrayTokens(a[1:]).origin
