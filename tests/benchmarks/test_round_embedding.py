"""The embedding rounded afterwards: only it changes, and to what rounding a float embedding gives.

Run: `pytest tests/benchmarks/test_round_embedding.py`.
"""

from pathlib import Path

import numpy as np
from round_embedding import NAME, rounded

from helpers.tiny import tiny_checkpoint
from slimba.checkpoints.packed import read_packed, write_packed


def test_only_the_embedding_changes(tmp_path: Path) -> None:
    before = tiny_checkpoint(preset="dfssm-published")
    after = read_packed(write_packed(rounded(before), tmp_path / "m"))
    assert (before.layouts[NAME].describe(), after.layouts[NAME].describe()) == ("int8", "int4")
    for name in before.layouts:
        if name != NAME:
            assert np.array_equal(before.matrix(name).dequantize(), after.matrix(name).dequantize())
    old, new = before.matrix(NAME).dequantize(), after.matrix(NAME).dequantize()
    step = np.abs(old).max(1, keepdims=True) / 7
    assert np.abs(old - new).max() > 0 and (np.abs(old - new) <= step).all()
    assert after.provenance["afterwards"] == "embedding rounded to int4"
