"""Tiny random models for the checkpoint tests: `make(spec, preset)` gives a Checkpoint in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.formats import Matrix
from slimba.formats.floats import DTYPES
from slimba.formats.presets import preset_dtypes, preset_layouts
from slimba.models.spec import ModelSpec

Make = Callable[..., Checkpoint]

MAMBA2 = ModelSpec(
    architecture="mamba2",
    n_layer=2,
    d_model=24,
    d_inner=48,
    d_state=8,
    vocab_size=40,
    headdim=16,
    n_groups=1,
    norm_group_size=48,
    bos_token_id=0,
    eos_token_id=0,
)
MAMBA1 = ModelSpec(
    architecture="mamba1",
    n_layer=2,
    d_model=24,
    d_inner=48,
    d_state=4,
    vocab_size=40,
    dt_rank=3,
    tie_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=3,
    add_bos=True,
)


def random_checkpoint(spec: ModelSpec, preset: str = "dfssm", *, seed: int = 0, rank: int = 2) -> Checkpoint:
    """Random weights of `spec` rounded to a preset."""
    rng = np.random.default_rng(seed)
    layouts, dtypes = preset_layouts(spec, preset, rank=rank), preset_dtypes(preset)
    tensors: dict[str, np.ndarray] = {}
    for name, layout in layouts.items():
        w = rng.standard_normal((layout.rows, layout.cols)).astype(np.float32)
        factors = None
        if layout.lowrank:
            n = layout.lowrank.stop - layout.lowrank.start
            factors = (rng.standard_normal((n, rank)), rng.standard_normal((rank, layout.cols)))
        for part, a in Matrix.quantize(w, layout, factors).arrays.items():
            tensors[f"{name}.{part}"] = a
    for name, (shape, kind) in spec.vectors().items():
        tensors[name] = rng.uniform(0.1, 1.0, shape).astype(DTYPES[dtypes[kind]])
    return Checkpoint(spec=spec, layouts=layouts, tensors=tensors, provenance={"method": preset, "seed": seed})


@pytest.fixture
def make() -> Make:
    return random_checkpoint


@pytest.fixture(params=["mamba1", "mamba2"])
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    return MAMBA1 if request.param == "mamba1" else MAMBA2


@pytest.fixture
def mamba1() -> ModelSpec:
    return MAMBA1


@pytest.fixture
def mamba2() -> ModelSpec:
    return MAMBA2


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """A byte-level tokenizer of a few tokens with `<|endoftext|>` as id 0."""
    path = tmp_path / "tokenizer-source" / "tokenizer.json"
    path.parent.mkdir()
    special = {"id": 0, "content": "<|endoftext|>", "special": True}
    special |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    vocab = {"<|endoftext|>": 0} | {chr(ord("a") + i): i + 1 for i in range(26)}
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    path.write_text(json.dumps(data))
    return path


def facts(tensors: dict[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every tensor: equal facts mean equal models."""
    return {n: (tensors[n].dtype.name, tensors[n].shape, tensors[n].tobytes()) for n in tensors}


@pytest.fixture(name="facts")
def facts_fixture() -> Callable[..., dict[str, tuple[str, tuple[int, ...], bytes]]]:
    return facts
