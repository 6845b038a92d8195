"""Checkpoints of a run: complete or not there, damaged ones refused, weights and moments exact.

With several processes: tests/training/test_distributed.py. Run: `pytest tests/training/test_checkpointing.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from slimba.errors import UserError
from slimba.training import checkpointing
from slimba.training.sharding import Shards


def trained(steps: int, width: int = 3) -> tuple[nn.Module, list[torch.optim.Optimizer], Shards]:
    torch.manual_seed(0)
    model = nn.Linear(4, width)
    model.register_buffer("seen", torch.zeros(2))
    shards = Shards(model.parameters())
    optimizer = torch.optim.AdamW([{"params": shards.of(shards.params), "lr": torch.tensor(0.1)}], fused=True)
    for i in range(steps):
        shards.zero_grad()
        model(torch.full((2, 4), float(i + 1))).square().mean().backward()
        shards.reduce()
        optimizer.step()
        shards.gather()
        model.seen.add_(1)  # type: ignore[operator]
    return model, [optimizer], shards


def save(work: Path, steps: int) -> tuple[nn.Module, list[torch.optim.Optimizer], Shards]:
    run = trained(steps)
    checkpointing.save(work, *run, {"step": steps, "seconds": 1.5})
    return run


def test_weights_moments_and_progress_return_bit_for_bit(tmp_path: Path) -> None:
    model, (optimizer,), _ = save(tmp_path, 3)
    other, (fresh,), shards = trained(0)
    rate = fresh.param_groups[0]["lr"]
    assert checkpointing.load(tmp_path, other, [fresh], shards) == {"step": 3, "seconds": 1.5}
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[p].keys() == fresh.state[q].keys()
        assert all(torch.equal(v, fresh.state[q][k]) for k, v in optimizer.state[p].items())
    assert fresh.param_groups[0]["lr"] is rate, "the loop writes the learning rate into its own tensor"


def test_the_newest_complete_checkpoint_counts_and_older_ones_go(tmp_path: Path) -> None:
    assert checkpointing.latest(tmp_path) is None
    save(tmp_path, 2)
    save(tmp_path, 11)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000011"]
    (tmp_path / "checkpoint-00000020").mkdir()  # killed before its list of parts was written
    (tmp_path / "checkpoint.partial").mkdir()
    assert checkpointing.latest(tmp_path) == tmp_path / "checkpoint-00000011"
    save(tmp_path, 12)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000012"]


def test_no_checkpoint_is_no_progress(tmp_path: Path) -> None:
    assert checkpointing.load(tmp_path, *trained(0)) is None


@pytest.mark.parametrize("how", ["list", "parts", "missing", "shape"])
def test_what_cannot_be_continued_is_named(tmp_path: Path, how: str) -> None:
    save(tmp_path, 1)
    folder = tmp_path / "checkpoint-00000001"
    (parts,) = folder.glob("*.distcp")
    if how == "list":
        (folder / ".metadata").write_bytes(b"not this")
    elif how == "parts":
        parts.write_bytes(parts.read_bytes()[: parts.stat().st_size // 2])
    elif how == "missing":
        parts.unlink()
    with pytest.raises(UserError, match=r"checkpoint-00000001 cannot be continued .*start again without --resume"):
        checkpointing.load(tmp_path, *trained(0, width=5 if how == "shape" else 3))


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        save(tmp_path / "file", 1)
