"""`convert` in all directions: bytes kept, refusals by name. Run: pytest tests/checkpoints/test_convert.py"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.convert import TARGETS, cast, convert_checkpoint
from slimba.checkpoints.packed import write_packed
from slimba.checkpoints.reader import open_checkpoint
from slimba.cli.convert import convert
from slimba.errors import UserError
from slimba.models.spec import ModelSpec

Make = Callable[..., Checkpoint]
Facts = Callable[..., Any]


@pytest.mark.parametrize("preset", ["float32", "float16", "bfloat16"])
def test_every_way_keeps_every_byte(
    tmp_path: Path, make: Make, facts: Facts, spec: ModelSpec, preset: str, tokenizer_file: Path
) -> None:
    spec = dataclasses.replace(spec, bos_token_id=0, eos_token_id=0, pad_token_id=None, add_bos=False)
    model = dataclasses.replace(make(spec, preset), tokenizer_file=tokenizer_file)
    for route in itertools.permutations(TARGETS):
        step, at = model, tmp_path / "-".join(route)
        for to in (*route, route[0]):
            at = at / to
            convert_checkpoint(step, at, to=to)
            step = open_checkpoint(at)
            assert step.kind == to
            assert facts(step.tensors) == facts(model.tensors)
            assert step.spec == spec
            assert step.tokenizer_file is not None
            assert step.tokenizer_file.read_bytes() == tokenizer_file.read_bytes()


def test_mixed_types_are_kept(tmp_path: Path, make: Make, facts: Facts, mamba2: ModelSpec) -> None:
    model = make(mamba2, "float16")
    tensors = {n: a.astype(np.float32) if "A_log" in n or "norm" in n else a for n, a in model.tensors.items()}
    model = dataclasses.replace(model, tensors=tensors)
    at = tmp_path
    for to in ("transformers", "slimba", "mamba-ssm", "slimba"):
        at = at / to
        convert_checkpoint(model, at, to=to)
        model = open_checkpoint(at)
        assert facts(model.tensors) == facts(tensors)


def test_packed_to_packed_keeps_the_formats(tmp_path: Path, make: Make, facts: Facts, mamba2: ModelSpec) -> None:
    model = make(mamba2, "dfssm")
    source = open_checkpoint(write_packed(model, tmp_path / "source", card="# How it was made\n\n---\n\nend"))
    assert convert_checkpoint(source, tmp_path / "out", to="slimba") == []
    for file in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "source" / file).read_bytes()
    back = open_checkpoint(tmp_path / "out")
    assert facts(back.tensors) == facts(model.tensors)
    assert back.provenance == model.provenance


@pytest.mark.parametrize("to", ["transformers", "mamba-ssm"])
def test_packed_weights_need_a_type(tmp_path: Path, make: Make, mamba2: ModelSpec, to: str) -> None:
    packed = open_checkpoint(write_packed(make(mamba2, "dfssm"), tmp_path / "packed"))
    with pytest.raises(UserError, match=r"cannot hold weights stored as sign, int4, int8; add --type"):
        convert_checkpoint(packed, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()
    notes = convert_checkpoint(packed, tmp_path / "out", to=to, dtype="float32")
    assert notes[0] == "dequantised weights were written, float32 values of what was sign, int4, int8"
    assert cast(packed, "float32").provenance["dequantised"] == "to float32 from sign, int4, int8"
    back = open_checkpoint(tmp_path / "out")
    for name in mamba2.matrices():
        np.testing.assert_array_equal(back.matrix(name).dequantize(), packed.matrix(name).dequantize())


def test_types(tmp_path: Path, make: Make, mamba2: ModelSpec) -> None:
    model = make(mamba2, "float32")
    notes = convert_checkpoint(model, tmp_path / "half", to="slimba", dtype="float16")
    assert notes == ["the weights were rounded to float16, as asked"]
    half = open_checkpoint(tmp_path / "half")
    assert {a.dtype.name for a in half.tensors.values()} == {"float16"}
    name = "backbone.layers.0.mixer.out_proj.weight"
    np.testing.assert_array_equal(half.tensors[name], model.tensors[name].astype(np.float16))
    assert convert_checkpoint(half, tmp_path / "full", to="slimba", dtype="float32") == []
    back = cast(open_checkpoint(tmp_path / "full"), "float16")
    assert {n: a.tobytes() for n, a in back.tensors.items()} == {n: a.tobytes() for n, a in half.tensors.items()}


def test_refusals(tmp_path: Path, make: Make, mamba2: ModelSpec) -> None:
    model = make(mamba2, "float32")

    def refused(message: str, source: Checkpoint = model, **kwargs: Any) -> None:
        with pytest.raises(UserError, match=message):
            convert_checkpoint(source, tmp_path / "out", **({"to": "slimba"} | kwargs))
        assert list(tmp_path.iterdir()) == []

    refused("unknown layout 'gguf', known are slimba, transformers, mamba-ssm", to="gguf")
    refused("unknown type 'int8'", dtype="int8")
    big = dict(model.tensors) | {"backbone.norm_f.weight": np.full(24, 1e6, np.float32)}
    too_big = dataclasses.replace(model, tensors=big)
    refused(r"norm_f\.weight holds values beyond the range of float16", too_big, dtype="float16")
    other = make(dataclasses.replace(mamba2, norm_eps=1e-6), "float32")
    refused("mamba_ssm cannot express norm_eps", other, to="mamba-ssm")
    other = make(dataclasses.replace(mamba2, norm_before_gate=True), "float32")
    refused("transformers cannot express norm_before_gate", other, to="transformers")


def test_verb(tmp_path: Path, make: Make, mamba2: ModelSpec, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_packed(make(mamba2, "dfssm"), tmp_path / "packed")
    out, record = tmp_path / "out", tmp_path / "record.json"
    convert(str(source), out, to="transformers", dtype="float16", json_file=record)
    printed = capsys.readouterr().out
    assert "note: dequantised weights were written" in printed
    assert "--tokenizer PATH adds one" in printed
    assert json.loads(record.read_text())["bytes"] == (out / "model.safetensors").stat().st_size
    with pytest.raises(UserError, match="--overwrite"):
        convert(str(source), out, to="slimba")
    convert(str(source), out, to="slimba", overwrite=True)
    assert open_checkpoint(out).kind == "slimba"


def test_converting_in_place(tmp_path: Path, make: Make, facts: Facts, mamba2: ModelSpec) -> None:
    """Source and target are one directory: the mapped source stays readable until the new one is complete."""
    model = make(mamba2, "float32")
    at = write_packed(model, tmp_path / "model")
    convert_checkpoint(open_checkpoint(at), at, to="transformers", overwrite=True)
    assert open_checkpoint(at).kind == "transformers"
    assert facts(open_checkpoint(at).tensors) == facts(model.tensors)


SLOW_DISK = """
    import sys, time
    import slimba.checkpoints.safetensors_io as io
    from slimba.checkpoints.convert import convert_checkpoint
    from slimba.checkpoints.reader import open_checkpoint
    checksum = io.crc32_of
    def slow(a):
        print("writing", flush=True)
        time.sleep(0.05)
        return checksum(a)
    model = open_checkpoint(sys.argv[1])
    io.crc32_of = slow
    convert_checkpoint(model, sys.argv[2], to="slimba", overwrite=True)
"""


def run(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.parametrize("old_exists", [True, False])
def test_kill_during_writing(tmp_path: Path, make: Make, facts: Facts, mamba2: ModelSpec, old_exists: bool) -> None:
    source = write_packed(make(mamba2, "float32", seed=1), tmp_path / "source")
    out, old = tmp_path / "out", make(mamba2, "dfssm")
    if old_exists:
        write_packed(old, out)
    child = run(SLOW_DISK, source, out)
    assert child.stdout is not None
    for _ in range(3):
        assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    (left,) = tmp_path.glob(".out.tmp-*")
    with pytest.raises(UserError):
        open_checkpoint(left)  # half-written, and not taken for a model
    if old_exists:
        assert facts(open_checkpoint(out).tensors) == facts(old.tensors)
    else:
        assert not out.exists()
    convert_checkpoint(open_checkpoint(source), out, to="slimba", overwrite=True)
    assert not left.exists()
    assert facts(open_checkpoint(out).tensors) == facts(open_checkpoint(source).tensors)


def test_full_disk(tmp_path: Path, make: Make, facts: Facts, mamba2: ModelSpec) -> None:
    """A limit on file sizes stops the write in the middle of model.safetensors."""
    source = write_packed(make(mamba2, "float32", seed=1), tmp_path / "source")
    old = make(mamba2, "dfssm")
    out = write_packed(old, tmp_path / "out")
    child = run(
        """
        import resource, sys
        from slimba.checkpoints.convert import convert_checkpoint
        from slimba.checkpoints.reader import open_checkpoint
        from slimba.errors import UserError
        model = open_checkpoint(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        try:
            convert_checkpoint(model, sys.argv[2], to="transformers", overwrite=True)
        except UserError as e:
            print(e)
        """,
        source,
        out,
    )
    assert "no space left" in child.communicate()[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    assert facts(open_checkpoint(out).tensors) == facts(old.tensors)
