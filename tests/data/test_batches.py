"""Batches are a function of tokens, seed and step, over any number of shards, whether the text has ended or not."""

from __future__ import annotations

import numpy as np
import pytest

from slimba.data import batches as module
from slimba.data.batches import WindowBatches
from slimba.errors import UserError


class Arriving:
    """A text that is as long as was asked for, and says how much that was."""

    def __init__(self, ids):
        self.ids, self.asked, self.origin = ids, 0, {}

    def wait(self, n):
        self.asked = max(self.asked, len(self.ids) if n is None else min(n, len(self.ids)))
        return self.asked

    def read(self, start, stop):
        assert stop <= self.asked, "what was not waited for"
        return self.ids[start:stop]


def test_windows_cover_the_text_once_a_pass_and_depend_only_on_the_step():
    ids = np.arange(1001, dtype=np.int32)
    batches = WindowBatches(ids, window=10, batch=4, seed=3)
    one_pass = np.concatenate([batches[i] for i in range(25)])
    assert one_pass.dtype == np.int32
    assert sorted(one_pass[:, 0].tolist()) == list(range(0, 1000, 10))
    assert (one_pass[:, 1:] == one_pass[:, :-1] + 1).all()
    again = WindowBatches(ids, window=10, batch=4, seed=3)
    assert (again[17] == batches[17]).all()
    assert (WindowBatches(ids, 10, 4, seed=4)[0] != batches[0]).any()
    assert (batches[25] != batches[0]).any(), "the second pass has its own order"


def test_the_order_of_a_text_of_one_shard_is_that_of_earlier_releases():
    """Runs that were begun with them, and figures that were measured with them, stay what they are."""
    ids = np.arange(401, dtype=np.int32)
    batches = WindowBatches(ids, window=10, batch=8, seed=5)
    for epoch in (0, 1):
        order = np.random.default_rng([5, epoch]).permutation(40) * 10
        assert [batches[5 * epoch + i][:, 0].tolist() for i in range(5)] == order.reshape(5, 8).tolist()


def test_shards_come_in_order_and_every_pass_covers_all(monkeypatch):
    monkeypatch.setattr(module, "SHARD", 105)  # ten windows of ten
    ids = np.arange(348, dtype=np.int32)  # three shards and four windows
    batches = WindowBatches(ids, window=10, batch=1, seed=3)
    starts = [int(batches[i][0, 0]) // 10 for i in range(68)]
    for a_pass in (starts[:34], starts[34:]):
        for shard in range(4):
            windows = range(shard * 10, min(shard * 10 + 10, 34))
            assert sorted(a_pass[shard * 10 : shard * 10 + 10]) == list(windows)
    assert starts[:10] != [s - 10 for s in starts[10:20]], "shards have their own orders"
    assert starts[:34] != starts[34:]


def test_a_step_asks_for_its_shard_only_and_gets_what_the_whole_text_would_give(monkeypatch):
    monkeypatch.setattr(module, "SHARD", 100)
    ids = np.arange(1001, dtype=np.int32)
    whole, arriving = WindowBatches(ids, 10, 5), Arriving(ids)
    stream = WindowBatches(arriving, 10, 5)
    assert arriving.asked == 11
    assert (stream.first(3)[:, 0] == whole.first(3)[:, 0]).all()
    for step in (0, 1):
        assert (stream[step] == whole[step]).all()
    assert arriving.asked == 101, "one shard and the target of its last token"
    assert stream.steps_for(500) == 10 and arriving.asked == 101
    for step in (7, 19, 20, 33):
        assert (stream[step] == whole[step]).all()
    assert stream.steps_for(None) == 20


def test_first_windows_are_distinct_and_no_more_than_there_are():
    batches = WindowBatches(np.arange(45, dtype=np.int32), window=10, batch=3)
    assert sorted(batches.first(9)[:, 0].tolist()) == [0, 10, 20, 30]
    assert batches.first(2).shape == (2, 11)


def test_too_little_text_for_a_window():
    with pytest.raises(UserError, match="fewer than one window"):
        WindowBatches(np.arange(10, dtype=np.int32), window=10, batch=1)
