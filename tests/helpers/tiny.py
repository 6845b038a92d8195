"""Tiny random models and tokenizers for tests, built in milliseconds. No torch.

    from helpers.tiny import tiny_checkpoint, tiny_directory, tiny_tokenizer
    ckpt = tiny_checkpoint("mamba2", preset="dfssm", n_groups=2)        # in memory
    path = tiny_directory(tmp_path / "m", preset="dfssm")               # written with write_packed, tokenizer included

The tokenizer is a byte-level BPE of 300 entries, `<|endoftext|>` = 0; the specs' `vocab_size` of 304 leaves four
padding rows in the embedding.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.formats import Matrix
from slimba.formats.floats import DTYPES
from slimba.formats.presets import preset_dtypes, preset_layouts
from slimba.models.spec import ModelSpec

VOCAB = 300
TEXT = """The sea was calm, and the ship lay at anchor in the bay; the men sang on the deck.
In the morning the wind came from the north, and they set the sails for the islands.
"Where are we going?" said the boy. "To the end of the world," said the captain, "and back again before winter."
Grüße aus Köln, Zürich und Łódź: été, naïve, façade. 你好，世界！今天天气很好。 🙂🚀🎉 12345 67890 3.14159
"""


def tiny_spec(architecture: str = "mamba2", **changes: Any) -> ModelSpec:
    """A model of about 30k parameters; keyword arguments replace fields of the spec."""
    fields: dict[str, Any] = dict(
        architecture=architecture, n_layer=2, d_model=32, d_inner=64, d_state=16, vocab_size=304, eos_token_id=0
    )
    fields |= dict(headdim=16, norm_group_size=64, chunk_size=8) if architecture == "mamba2" else dict(dt_rank=2)
    if "d_inner" in changes and architecture == "mamba2":
        fields["norm_group_size"] = changes["d_inner"]
    return ModelSpec(**(fields | changes))


def tiny_checkpoint(
    architecture: str = "mamba2",
    *,
    preset: str = "float32",
    rank: int = 4,
    seed: int = 0,
    tokenizer: Path | None = None,
    **changes: Any,
) -> Checkpoint:
    """Random weights with the statistics of an initialised model, in the formats of `preset`."""
    spec = tiny_spec(architecture, **changes)
    rng = np.random.default_rng(seed)
    layouts = preset_layouts(spec, preset, rank=rank)
    dtypes = preset_dtypes(preset)
    tensors: dict[str, np.ndarray] = {}
    for name, (rows, cols) in spec.matrices().items():
        scale = 0.3 if name in ("backbone.embeddings", "lm_head") else cols**-0.5
        w = (scale * rng.standard_normal((rows, cols))).astype(np.float32)
        layout = layouts[name]
        factors = None
        if layout.lowrank:
            n, r = layout.lowrank.stop - layout.lowrank.start, layout.lowrank.rank
            a, b = 0.3 * scale * rng.standard_normal((n, r)), rng.standard_normal((r, cols))
            factors = (a.astype(np.float32), b.astype(np.float32))
        for part, array in Matrix.quantize(w, layout, factors).arrays.items():
            tensors[f"{name}.{part}"] = array
    for name, (shape, kind) in spec.vectors().items():
        tensors[name] = _vector(name, shape, rng).astype(DTYPES[dtypes[kind]])
    return Checkpoint(spec, layouts, tensors, tokenizer_file=tokenizer)


def _vector(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Step sizes softplus(dt_bias) in 0.01..0.3 and decays A in -1..-8, so that the state forgets within the test."""
    if name.endswith("A_log"):
        return np.log(rng.uniform(1.0, 8.0, shape))
    if name.endswith(("dt_bias", "dt_proj.bias")):
        return np.log(np.expm1(rng.uniform(0.01, 0.3, shape)))
    if name.endswith((".D", "norm.weight", "norm_f.weight")):
        return 1.0 + 0.1 * rng.standard_normal(shape)
    return 0.4 * rng.standard_normal(shape)


@cache
def _tokenizer_json() -> str:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([TEXT], trainer)
    return str(inner.to_str())


def tiny_tokenizer(path: Path) -> Path:
    """Write the tokenizer to `path` (a file, or a directory for `tokenizer.json`) and return the file."""
    path = path / "tokenizer.json" if path.is_dir() else path
    path.write_text(_tokenizer_json(), encoding="utf-8")
    return path


def tiny_directory(out: Path, architecture: str = "mamba2", *, with_tokenizer: bool = True, **changes: Any) -> Path:
    """A tiny random model as a packed directory; the keyword arguments are `tiny_checkpoint`'s."""
    from slimba.checkpoints.packed import write_packed

    ckpt = tiny_checkpoint(architecture, **changes)
    if with_tokenizer:
        ckpt.tokenizer_file = tiny_tokenizer(out.parent / f"{out.name}-tokenizer.json")
    write_packed(ckpt, out)
    if ckpt.tokenizer_file:
        ckpt.tokenizer_file.unlink()
    return out
