"""The GGUF files that llama.cpp is measured with: layout, sizes, and that it runs them where it is installed.

Run: `pytest tests/runtime/test_peers.py`.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from runtime.numpy_reference import mamba1_spec, mamba2_spec
from slimba.errors import UserError
from slimba.runtime.peers import GGML_TYPES, PEER_TYPES, has_llama_cpp, llama_cpp_speeds, write_gguf

SPEC = mamba2_spec(d_model=256, d_inner=512, headdim=64, d_state=32, vocab_size=320)


@pytest.mark.parametrize("type", ["F16", *PEER_TYPES])
def test_the_file_holds_what_its_header_says(tmp_path: Path, type: str) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, SPEC, type)
    raw = path.read_bytes()
    assert raw[:4] == b"GGUF"
    version, tensors, keys = struct.unpack_from("<IQQ", raw, 4)
    assert (version, tensors, keys) == (3, 2 + 9 * SPEC.n_layer, 14)
    _, per_block, size, _ = GGML_TYPES[type]
    projections = SPEC.n_layer * (512 * 256 + (512 + SPEC.d_conv_channels + SPEC.n_heads) * 256)
    assert projections // per_block * size < len(raw) < projections // per_block * size + 320 * 256 * 2 + 200_000
    assert b"blk.1.ssm_out.weight" in raw


def test_what_gguf_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mamba1"):
        write_gguf(tmp_path / "m.gguf", mamba1_spec(), "Q8_0")
    with pytest.raises(UserError, match="multiple of 256"):
        write_gguf(tmp_path / "m.gguf", mamba2_spec(d_model=128, d_inner=256), "TQ2_0")


@pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python is not installed")
def test_llama_cpp_runs_the_files() -> None:
    rows = llama_cpp_speeds(SPEC, threads=1, prompt_len=8, new_tokens=5)
    assert [row["type"] for row in rows] == list(PEER_TYPES)
    for row in rows:
        assert row["decode_tokens_per_second"] > 0 and row["prefill_tokens_per_second"] > 0
        assert row["built_for"]  # the instruction sets, as llama.cpp names them


def test_another_interpreter_measures(tmp_path: Path) -> None:
    """What it is called with and what it says; one that fails is named by its last line."""
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh\necho "{\\"module\\": \\"$2\\", \\"path\\": \\"$PYTHONPATH\\"}"\n""")
    python.chmod(0o755)
    (row,) = llama_cpp_speeds(SPEC, 1, 8, 5, ("F16",), python=str(python))
    assert row["module"] == "slimba.runtime.peers" and (Path(row["path"]) / "slimba").is_dir()
    python.write_text("#!/bin/sh\necho no such module >&2; exit 1\n")
    with pytest.raises(UserError, match="no such module"):
        llama_cpp_speeds(SPEC, 1, 8, 5, ("F16",), python=str(python))
