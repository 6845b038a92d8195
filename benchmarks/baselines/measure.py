"""Perplexity and bits per byte of a baseline, by the protocol of `slimba eval`, on a GPU or a CPU.

    texts = {"test": read_split("test", Path("test.txt.zst"), teacher)}
    figures(checkpoint, texts, device)["test"]["perplexity"]

On a GPU the reference engine computes in float32; on a CPU the C++ engine does. Tests:
`pytest tests/benchmarks/test_run_baselines.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.data.text import documents, encode_documents
from slimba.data.tokenizer import Tokenizer
from slimba.errors import UserError
from slimba.evaluation.perplexity import TextIds, byte_lengths
from slimba.runtime.scoring import score

__all__ = ["document_start", "figures", "read_ids", "read_split"]

WINDOW = 1024
BATCH = {"cuda": 32, "cpu": 8}


def document_start(teacher: Checkpoint, words: Tokenizer) -> int | None:
    """The id put before every document: as `LoadedModel.document_start` and `compress` choose it."""
    starts = (teacher.spec.bos_token_id, teacher.spec.eos_token_id, words.eot_id)
    return next((i for i in starts if i is not None), None)


def words_of(teacher: Checkpoint) -> Tokenizer:
    if teacher.tokenizer_file is None:
        raise UserError("the teacher has no tokenizer, which the bytes of every token come from")
    return Tokenizer.from_file(teacher.tokenizer_file)


def read_ids(path: Path, teacher: Checkpoint) -> np.ndarray:
    """int32 ids of a text, or of an .npy file that already holds them (documents split at blank lines)."""
    if path.suffix == ".npy":
        ids = np.load(path)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"{path} must hold one row of token ids, not {ids.dtype} {list(ids.shape)}")
        return ids.astype(np.int32)
    words = words_of(teacher)
    return encode_documents(words, documents([path], "blank-line"), document_start(teacher, words))


def read_split(path: Path, teacher: Checkpoint, max_tokens: int | None = None) -> TextIds:
    """A text to measure, tokenised as `slimba eval --split-documents blank-line` does."""
    words = words_of(teacher)
    start = document_start(teacher, words)
    protocol = f"documents split by blank-line, {'nothing' if start is None else f'id {start}'} before each"
    protocol += ", concatenated" + ("" if max_tokens is None else f", the first {max_tokens} tokens")
    lengths = byte_lengths(words, teacher.spec.vocab_size, start)
    return TextIds(read_ids(path, teacher)[:max_tokens], lengths, protocol)


def figures(
    checkpoint: Checkpoint, texts: Mapping[str, TextIds], device: torch.device, window: int = WINDOW
) -> dict[str, dict[str, Any]]:
    """Perplexity, bits per byte, nll, tokens and bytes for every text."""
    engine: Any
    if device.type == "cuda":
        from slimba.runtime.backends.reference import ReferenceEngine

        torch.backends.cuda.matmul.allow_tf32 = False
        engine = ReferenceEngine(checkpoint, device=str(device))
    else:
        from slimba.runtime.backends.cpu import CpuEngine

        engine = CpuEngine(checkpoint, threads=torch.get_num_threads())
    out: dict[str, dict[str, Any]] = {}
    for name, text in texts.items():
        nll = score(engine, text.ids, window=window, batch=BATCH[device.type])
        total, size = float(nll.sum()), int(text.lengths[text.ids[1 : len(nll) + 1]].sum())
        out[name] = {"perplexity": math.exp(total / len(nll)), "bits_per_byte": total / math.log(2) / size}
        out[name] |= {"nll": total, "tokens": len(nll), "bytes": size, "window": window, "stride": window}
        out[name] |= {"protocol": text.protocol, "backend": engine.name}
    return out
