"""Rung 5 of the correctness ladder: every engine measures the same perplexity on the same file, within 0.5 %.

`pytest tests/evaluation/test_engines_agree.py`
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny import TEXT, tiny_directory
from slimba import evaluate, load
from slimba.evaluation.compare import compare
from slimba.evaluation.perplexity import read_text

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("slimba._core") and importlib.util.find_spec("torch")), reason="needs both engines"
)

TINY: dict[str, dict[str, Any]] = {
    "mamba2 float16": {"preset": "float16"},
    "mamba2 dfssm, 2 groups, headdim 32": {
        "preset": "dfssm",
        "n_groups": 2,
        "headdim": 32,
        "d_inner": 128,
        "norm_group_size": 64,
    },
    "mamba2 published, state 64, untied": {"preset": "dfssm-published", "d_state": 64, "tie_embeddings": False},
    "mamba1 dfssm": {"architecture": "mamba1", "preset": "dfssm"},
    "mamba1 int4, norms on B, C and dt": {"architecture": "mamba1", "preset": "int4", "bcdt_norm_eps": 1e-6},
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 4, encoding="utf-8")
    return file


@pytest.mark.parametrize("case", TINY)
def test_tiny_models(case: str, tmp_path: Path, text: Path) -> None:
    model = tiny_directory(tmp_path / "tiny", **TINY[case])
    cpu, reference = (
        evaluate(load(model, backend=b, threads=1), [text], window=100, stride=37) for b in ("cpu", "reference")
    )
    assert cpu.tokens == reference.tokens > 300 and cpu.bytes == reference.bytes
    assert cpu.perplexity == pytest.approx(reference.perplexity, rel=1e-4)
    assert cpu.bits_per_byte == pytest.approx(reference.bits_per_byte, rel=1e-4)


def test_bundled_teacher(tmp_path: Path) -> None:
    """Real weights on English text: the engines agree in every figure of a comparison."""
    cpu, reference = (load("demo-teacher", backend=b, threads=1) for b in ("cpu", "reference"))
    file = tmp_path / "text.txt"
    file.write_text(
        "To be, or not to be, that is the question: whether it is nobler in the mind to suffer the arrows of fortune.\n"
        "And God said, Let there be light: and there was light. And God saw the light, that it was good.\n" * 4
    )
    result = compare(reference, cpu, read_text(cpu, [file]), window=128)
    assert result.ratio == pytest.approx(1, rel=5e-3)
    assert result.kl < 1e-5 and result.agreement >= 0.99
