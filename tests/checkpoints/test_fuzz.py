"""Random damage to a packed directory: an error that is the user's to read, or the same model; never another one.

Run: pytest tests/checkpoints/test_fuzz.py
"""

from __future__ import annotations

import dataclasses
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.packed import write_packed
from slimba.checkpoints.reader import open_checkpoint
from slimba.errors import UserError
from slimba.models.spec import ModelSpec

Make = Callable[..., Checkpoint]
FILES = ("model.safetensors", "config.json", "tokenizer.json")


def flip_bit(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def change_byte(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] = rng.randrange(256)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def drop_piece(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.randrange(1, 20)]


def double_piece(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = data[at : at + rng.randrange(1, 20)]


@pytest.mark.parametrize("damage", [flip_bit, change_byte, cut, drop_piece, double_piece])
@pytest.mark.parametrize("preset", ["dfssm", "float16"])
def test_damage(
    tmp_path: Path,
    make: Make,
    facts: Callable[..., Any],
    mamba2: ModelSpec,
    tokenizer_file: Path,
    damage: Callable[[bytearray, random.Random], None],
    preset: str,
) -> None:
    out = write_packed(
        dataclasses.replace(make(dataclasses.replace(mamba2, n_layer=1), preset), tokenizer_file=tokenizer_file),
        tmp_path / "model",
    )
    whole = {name: (out / name).read_bytes() for name in FILES}
    good = open_checkpoint(out)
    expected = (good.spec, good.layouts, facts(good.tensors), good.provenance, good.numerics)
    header = int.from_bytes(whole["model.safetensors"][:8], "little") + 8
    rng = random.Random(f"{preset} {damage.__name__}")
    caught = 0
    for i in range(150):
        name = FILES[i % 3]
        data = bytearray(whole[name])
        if name == "model.safetensors" and i % 2:  # half of the hits on the header, which is the smaller part
            head = data[:header]
            damage(head, rng)
            data[:header] = head
        else:
            damage(data, rng)
        (out / name).write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model = open_checkpoint(out)
        except UserError as e:
            assert str(e).strip()
            assert "\n" not in str(e)
            caught += 1
        else:
            # what the weights, the config or the tokenizer hold is as it was: the hit was on white space or on a key
            # of transformers that the spec does not repeat
            found = (model.spec, model.layouts, facts(model.tensors), model.provenance, model.numerics)
            assert found == expected, f"silently wrong after damage {i} to {name}"
            assert name != "tokenizer.json" or data == whole[name]
        (out / name).write_bytes(whole[name])
    assert caught > 100
    assert open_checkpoint(out).spec == good.spec
