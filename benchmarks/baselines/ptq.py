"""Post-training baselines: round-to-nearest and GPTQ, groups of 128 columns, on a float teacher. No training.

    python benchmarks/baselines/ptq.py --teacher MODEL --ids train.txt.zst --valid valid.txt.zst --test test.txt.zst \
        --out rows.jsonl [--arms rtn-int8,gptq-int3] [--windows 128] [--keep DIR] [--device auto]

in_proj and out_proj are quantised with all their rows; embedding int8 a row; norms, convolution and biases float16.
GPTQ reads `--windows` windows of 1024 tokens of the training text, spread evenly; each layer's inputs come from the
layers already quantised, out_proj's from the quantised in_proj. Symmetric, act-order off. int8 (a scale a row)
and int4 have packed formats, so those rows are measured from the packed file; 3 and 2 bits are simulated in float32,
their bytes counted as codes of b bits and a float16 scale a group, and both grids of `gptq.Grid` are run.

Tests: `pytest tests/benchmarks/test_ptq.py`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from counted import counted_size, grouped
from measure import figures, read_ids, read_split
from rows import Rows

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.packed import read_packed, write_packed
from slimba.checkpoints.reader import open_checkpoint
from slimba.errors import UserError
from slimba.formats import Matrix, MatrixLayout
from slimba.formats.floats import DTYPES
from slimba.formats.presets import preset_dtypes
from slimba.methods.gptq import Grid, gptq, round_to_nearest
from slimba.models.lm import SSMForCausalLM, load_weights
from slimba.training.loop import pick_device

__all__ = ["ARMS", "Ptq", "quantise"]

WINDOW = 1024


@dataclass(frozen=True, slots=True)
class Ptq:
    """`grid` None: int8 with a scale a row."""

    grid: Grid | None
    calibrated: bool


ARMS = {
    "rtn-int8": Ptq(None, False),
    "rtn-int4": Ptq(Grid(4), False),
    "rtn-int3": Ptq(Grid(3), False),
    "rtn-int3-half": Ptq(Grid(3, half=True), False),
    "gptq-int4": Ptq(Grid(4), True),
    "gptq-int3": Ptq(Grid(3), True),
    "gptq-int3-half": Ptq(Grid(3, half=True), True),
    "gptq-int2": Ptq(Grid(2), True),
    "gptq-int2-half": Ptq(Grid(2, half=True), True),
}


def quantise(teacher: Checkpoint, arm: Ptq, windows: torch.Tensor | None, device: torch.device) -> Checkpoint:
    """The quantised model, packed for 8 and 4 bits, float32 for the others. `windows` int64 [n, L] where calibrated."""
    network = SSMForCausalLM(teacher.spec)
    load_weights(network, teacher)
    network.requires_grad_(False).to(device)
    matrices = {"backbone.embeddings": plain(network.backbone.embeddings.weight, "int8")}
    if network.lm_head is not None:
        matrices["lm_head"] = plain(network.lm_head.weight, "int8")
    network.backbone.embeddings.weight.copy_(dequantised(matrices["backbone.embeddings"], device))
    with torch.inference_mode():
        for name, hessian in inputs_of_matrices(network, windows if arm.calibrated else None):
            weight = network.get_parameter(name + ".weight")
            matrices[name] = one_matrix(weight, arm, hessian)
            weight.copy_(dequantised(matrices[name], device))
    tensors = {f"{name}.{part}": a for name, m in matrices.items() for part, a in m.arrays.items()}
    dtypes = preset_dtypes("dfssm")
    tensors |= {n: teacher.vector(n).astype(DTYPES[dtypes[kind]]) for n, (_, kind) in teacher.spec.vectors().items()}
    layouts = {name: matrices[name].layout for name in teacher.spec.matrices()}
    return Checkpoint(teacher.spec, layouts, tensors, tokenizer_file=teacher.tokenizer_file)


def plain(weight: torch.Tensor, fmt: str) -> Matrix:
    return Matrix.quantize(weight.float().cpu().numpy(), MatrixLayout.plain(*weight.shape, fmt))


def dequantised(matrix: Matrix, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(matrix.dequantize()).to(device)


def one_matrix(weight: torch.Tensor, arm: Ptq, hessian: torch.Tensor | None) -> Matrix:
    if arm.grid is None:
        return plain(weight, "int8")
    w = weight.float()
    q = round_to_nearest(w, arm.grid) if hessian is None else gptq(w, hessian, arm.grid)
    if arm.grid.bits != 4:
        return plain(q.weight(), "float32")
    layout = MatrixLayout.plain(*weight.shape, "int4")
    return Matrix(layout, {layout.part_name(0, part): a for part, a in q.arrays("int4").items()})


def inputs_of_matrices(
    network: SSMForCausalLM, windows: torch.Tensor | None
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Every projection in order with sum x x^T of its inputs (None without windows).

    The caller replaces the weight before it asks for the next one, so the inputs are those of the quantised prefix.
    """
    streams: list[torch.Tensor] = []
    if windows is not None:
        streams = [network.backbone.embeddings(w).float() for w in windows.split(8)]
    for i, block in enumerate(network.backbone.layers):
        at = f"backbone.layers.{i}.mixer."
        names = [n for n in network.spec.layer_matrices() if n in ("in_proj", "out_proj")]
        if names != ["in_proj", "out_proj"] or network.spec.architecture != "mamba2":
            raise UserError("the post-training baselines are for Mamba-2 only")
        if windows is None:
            yield at + "in_proj", None
            yield at + "out_proj", None
            continue
        yield at + "in_proj", gram(block.norm(u) for u in streams)
        kept: list[torch.Tensor] = []
        hook = block.mixer.out_proj.register_forward_pre_hook(lambda _m, x, kept=kept: kept.append(x[0]))
        for u in streams:
            block(u)
        hook.remove()
        yield at + "out_proj", gram(kept)
        for u, x in zip(streams, kept, strict=True):
            u += block.mixer.out_proj(x).to(u.dtype)


def gram(inputs: Any) -> torch.Tensor:
    total: Any = 0
    for x in inputs:
        flat = x.float().flatten(0, 1)
        total = total + flat.T @ flat
    return total


def main() -> None:
    args = argparse.ArgumentParser(description="Round-to-nearest and GPTQ baselines.")
    for name in ("teacher", "ids", "valid", "test", "out"):
        args.add_argument("--" + name, required=True)
    args.add_argument("--arms", default=",".join(ARMS), help="separated by commas")
    args.add_argument("--windows", type=int, default=128, help="calibration windows of 1024 tokens")
    args.add_argument("--keep", type=Path, help="keep the packed models here")
    args.add_argument("--device", default="auto")
    a = args.parse_args()

    device, rows = pick_device(a.device), Rows(Path(a.out))
    names = a.arms.split(",")
    for name in names:
        if name not in ARMS:
            raise UserError(f"unknown arm {name!r}, known are {', '.join(ARMS)}")
    teacher = open_checkpoint(a.teacher)
    texts = {k: read_split(Path(getattr(a, k)), teacher) for k in ("valid", "test")}
    ids = read_ids(Path(a.ids), teacher)
    starts = np.linspace(0, len(ids) - WINDOW, a.windows).astype(int)
    windows = torch.from_numpy(np.stack([ids[s : s + WINDOW] for s in starts]).astype(np.int64)).to(device)
    for name in names:
        if rows.find(arm=name):
            continue
        begin = time.perf_counter()
        made = quantise(teacher, ARMS[name], windows, device)
        seconds = time.perf_counter() - begin
        row = describe(name, made, a.windows) | {"seconds": round(seconds, 1), "device": device_name(device)}
        rows.add(row | measured(made, name, texts, device, a.keep, row["simulated"]))
        print({k: rows.mine[-1][k] for k in ("arm", "file_bytes", "seconds")}, rows.mine[-1]["test"]["perplexity"])


def describe(name: str, made: Checkpoint, windows: int) -> dict[str, Any]:
    arm = ARMS[name]
    simulated = arm.grid is not None and arm.grid.bits != 4
    size = counted_size(made.spec, made.layouts, grouped(2**arm.grid.bits) if simulated and arm.grid else None)
    calibration = f"GPTQ on {windows} windows of {WINDOW} tokens" if arm.calibrated else "rounded to nearest"
    grid = "int8, a scale a row" if arm.grid is None else f"{arm.grid.bits} bits, groups of 128, symmetric"
    grid += ", odd halves" if arm.grid and arm.grid.half else ""
    return {
        "arm": name,
        "family": name.removesuffix("-half"),
        "kind": "post-training",
        "about": f"{grid}; {calibration}; embedding int8",
        "simulated": simulated,
        "file_bytes": size.file_bytes,
        "bits_per_projection_weight": size.bits_per_projection_weight,
        "tokens": windows * WINDOW if arm.calibrated else 0,
        "seed": 0,
    }


def measured(
    made: Checkpoint, name: str, texts: dict, device: torch.device, keep: Path | None, simulated: bool
) -> dict[str, Any]:
    """Figures from the packed file where there is one."""
    if simulated:
        return figures(made, texts, device)
    with tempfile.TemporaryDirectory() as scratch:
        path = write_packed(made, (keep or Path(scratch)) / name, overwrite=True)
        return figures(read_packed(path), texts, device)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
