"""llama.cpp at the same shape and threads: what `slimba bench` compares with where llama-cpp-python is installed.

    rows = llama_cpp_speeds(named_spec("mamba2-1.3b"), threads=2, prompt_len=512, new_tokens=32)
    python -m slimba.runtime.peers FILE TYPE THREADS PROMPT NEW     # one measurement as JSON, in its own process

The weights are random: a GGUF file is written for each type (`write_gguf`), measured in a process of its own, removed.
Types below 4 bits get an embedding (and so a head, it is tied) of Q4_0, the others of their own type. The layout of
GGUF version 3 and of its blocks follows the published format. Run the tests: `pytest tests/runtime/test_peers.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from slimba.errors import UserError
from slimba.models.spec import ModelSpec

__all__ = ["GGML_TYPES", "PEER_TYPES", "has_llama_cpp", "llama_cpp_speeds", "write_gguf"]

# name: (number in GGUF, weights a block, bytes a block, bytes of float16 scale at the start; negative: at the end)
GGML_TYPES = {
    "F32": (0, 1, 4, 0),
    "F16": (1, 1, 2, 0),
    "Q4_0": (2, 32, 18, 2),
    "Q8_0": (8, 32, 34, 2),
    "TQ2_0": (35, 256, 66, -2),
    "Q1_0": (41, 128, 18, 2),
}
PEER_TYPES = ("TQ2_0", "Q1_0", "Q4_0", "Q8_0")
ALIGN = 32
REPEATS = 5


def has_llama_cpp() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def llama_cpp_speeds(
    spec: ModelSpec,
    threads: int,
    prompt_len: int,
    new_tokens: int,
    types: tuple[str, ...] = PEER_TYPES,
    python: str = sys.executable,
) -> list[dict[str, Any]]:
    """One record a type: file bytes, decode and prefill in tokens/s, times in seconds, and the instruction sets that
    llama.cpp was built for. `python` is an interpreter that has llama-cpp-python. UserError when it fails."""
    out = []
    # Another interpreter needs no slimba of its own
    found = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for name in types:
        with tempfile.TemporaryDirectory(prefix="slimba-gguf-") as folder:
            path = Path(folder) / f"{name}.gguf"
            write_gguf(path, spec, name)
            command = [python, "-m", "slimba.runtime.peers", str(path), name]
            numbers = [str(threads), str(prompt_len), str(new_tokens)]
            done = subprocess.run([*command, *numbers], capture_output=True, text=True, env=found)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise UserError(f"llama.cpp could not run the {name} file: {last}; --llama-cpp none leaves it out")
            out.append(json.loads(done.stdout.splitlines()[-1]))
    return out


def write_gguf(path: Path, spec: ModelSpec, type: str, seed: int = 0) -> None:
    """A Mamba-2 of random weights in GGUF's `type`. UserError for another architecture or widths it cannot hold."""
    if spec.architecture != "mamba2":
        raise UserError(f"a random GGUF file is made of a mamba2, not of a {spec.architecture}")
    tensors = _tensors(spec, type)
    rng = np.random.default_rng(seed)
    with path.open("wb") as f:
        f.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(_keys(spec))))
        for key, value in _keys(spec).items():
            _write_key(f, key, value)
        offset = 0
        for name, (kind, shape) in tensors.items():
            number, per_block, size, _ = GGML_TYPES[kind]
            if shape[0] % per_block:
                raise UserError(f"GGUF type {kind} needs rows of a multiple of {per_block}; {name} has {shape[0]}")
            f.write(_text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape))
            f.write(struct.pack("<IQ", number, offset))
            offset += -(-int(np.prod(shape)) // per_block * size // ALIGN) * ALIGN
        for name, (kind, shape) in tensors.items():
            f.write(bytes(-f.tell() % ALIGN))
            _write_random(f, rng, name, kind, shape)
        f.write(bytes(-f.tell() % ALIGN))


def _keys(spec: ModelSpec) -> dict[str, str | int | float]:
    return {
        "general.architecture": "mamba2",
        "mamba2.context_length": 1 << 20,
        "mamba2.embedding_length": spec.d_model,
        "mamba2.feed_forward_length": 0,
        "mamba2.attention.head_count": 0,
        "mamba2.attention.layer_norm_rms_epsilon": float(spec.norm_eps),
        "mamba2.block_count": spec.n_layer,
        "mamba2.vocab_size": spec.vocab_size,
        "mamba2.ssm.conv_kernel": spec.d_conv,
        "mamba2.ssm.inner_size": spec.d_inner,
        "mamba2.ssm.state_size": spec.d_state,
        "mamba2.ssm.time_step_rank": spec.n_heads,
        "mamba2.ssm.group_count": spec.n_groups,
        "tokenizer.ggml.model": "none",
    }


def _tensors(spec: ModelSpec, type: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (type, shape with the innermost dimension first)."""
    inner, heads, channels = spec.d_inner, spec.n_heads, spec.d_conv_channels
    table = type if type in ("F16", "Q8_0", "Q4_0") else "Q4_0"
    out: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": (table, (spec.d_model, spec.vocab_size)),
        "output_norm.weight": ("F32", (spec.d_model,)),
    }
    for i in range(spec.n_layer):
        at = f"blk.{i}."
        out[at + "attn_norm.weight"] = ("F32", (spec.d_model,))
        out[at + "ssm_in.weight"] = (type, (spec.d_model, inner + channels + heads))
        out[at + "ssm_conv1d.weight"] = ("F32", (spec.d_conv, channels))
        out[at + "ssm_conv1d.bias"] = ("F32", (channels,))
        out[at + "ssm_dt.bias"] = ("F32", (heads,))
        out[at + "ssm_a"] = ("F32", (1, heads))
        out[at + "ssm_d"] = ("F32", (1, heads))
        out[at + "ssm_norm.weight"] = ("F32", (inner // spec.n_groups, spec.n_groups))
        out[at + "ssm_out.weight"] = (type, (inner, spec.d_model))
    return out


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _write_key(f: BinaryIO, key: str, value: str | int | float) -> None:
    f.write(_text(key))
    if isinstance(value, str):
        f.write(struct.pack("<I", 8) + _text(value))
    elif isinstance(value, float):
        f.write(struct.pack("<If", 6, value))
    else:
        f.write(struct.pack("<II", 4, value))


def _write_random(f: BinaryIO, rng: np.random.Generator, name: str, kind: str, shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape))
    if kind == "F32":
        values = {"ssm_a": -rng.uniform(1, 16, count), "dt.bias": rng.uniform(-5, -2, count)}
        found = [v for part, v in values.items() if part in name]
        f.write((found[0] if found else np.ones(count)).astype("<f4").tobytes())
        return
    _, per_block, size, scale = GGML_TYPES[kind]
    typical = np.float16(0.5 / np.sqrt(shape[0]))
    if not scale:
        block = (rng.standard_normal(1 << 16) * typical).astype("<f2")
        f.write(np.resize(block, count).tobytes())
        return
    rows = count // per_block
    for first in range(0, rows, 1 << 20):
        n = min(1 << 20, rows - first)
        blocks = np.frombuffer(rng.bytes(n * size), np.uint8).reshape(n, size).copy()
        where = slice(0, 2) if scale > 0 else slice(size - 2, size)
        code = {"Q4_0": 4.6, "Q8_0": 74.0}.get(kind, 1.0)
        blocks[:, where] = np.frombuffer(np.float16(typical / code).tobytes(), np.uint8)
        f.write(blocks.tobytes())


def _measure(path: str, type: str, threads: int, prompt_len: int, new_tokens: int) -> dict[str, Any]:
    """Median of REPEATS prompts and of REPEATS pieces of the new tokens, after a warm-up of each."""
    api: Any = importlib.import_module("llama_cpp")
    quiet = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(quiet, None)
    api.llama_backend_init()
    model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
    if not model:
        raise UserError(f"llama.cpp does not open {path}")
    params = api.llama_context_default_params()
    params.n_ctx = prompt_len + 64 + 8 * new_tokens
    params.n_batch = params.n_ubatch = prompt_len
    params.n_threads = params.n_threads_batch = threads
    context = api.llama_init_from_model(model, params)

    def run(ids: list[int]) -> None:
        tokens = (api.llama_token * len(ids))(*ids)
        if api.llama_decode(context, api.llama_batch_get_one(tokens, len(ids))):
            raise UserError("llama.cpp failed to decode")
        api.llama_get_logits_ith(context, -1)

    def timed(ids: list[int], times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            run(ids)
        return (time.perf_counter() - start) / times

    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    prompt = [i * 7919 % vocabulary for i in range(prompt_len)]
    prefill = []
    for _ in range(REPEATS + 1):
        api.llama_memory_clear(api.llama_get_memory(context), True)
        prefill.append(timed(prompt, 1))
    piece = max(1, new_tokens // REPEATS)
    decode = [timed([1], piece) for _ in range(REPEATS + 1)]
    one, whole = statistics.median(decode[1:]), statistics.median(prefill[1:])
    return {
        "type": type,
        "bytes": Path(path).stat().st_size,
        "version": api.__version__,
        "built_for": re.findall(r"(\w+) = 1", api.llama_print_system_info().decode()),
        "decode_times": decode[1:],
        "prefill_times": prefill[1:],
        "decode_tokens_per_second": 1 / one,
        "prefill_tokens_per_second": prompt_len / whole,
    }


if __name__ == "__main__":
    file, name, *rest = sys.argv[1:]
    print(json.dumps(_measure(file, name, *map(int, rest))))
