"""The recurrent state of a Mamba-2 in fewer bits: DF-SSM's binary field against int8 and bfloat16, on 4,096 tokens.

    python benchmarks/baselines/state_field.py --teacher MODEL --text test.txt.zst --sequences 4 --out state-field.json

The reference network in float32 reads each sequence in chunks of 64 tokens and its states are replaced between chunks,
where the published code applies its field; int8 and bfloat16 are also run as our engines round them, after every token.
What is measured: perplexity, the relative error of the final features ||f - f0|| / ||f0|| (first and last quarter of
the sequence too: does it grow?), and that of a state right after it was stored once.

field              published: for each row of N entries with mean m and deviation d, x = (S - m + 3 d) / 6 d cut to
                   0..1, count of 529 = 23 x 23 random thresholds below x; one of 256 banks of thresholds a chunk
field-sigma-delta  published: x first gets what the last chunk's count left over (first order, rounded to 1/128)
field-even         the field with evenly spaced thresholds instead of random ones (then the remainder rounded to
                   1/128 is always 0, so sigma-delta would change nothing)
int8               round(127 S / max|S|) of each row of N entries
int8-feedback      int8 of S plus what the last storing left over; the remainder is itself kept in int8
int8-stochastic    int8 rounded up or down at random
bfloat16           rounded to nearest
...-each-token     after every token instead of every chunk
...-every-K        after every K tokens

Rows that --out holds already are kept, so that cases can be added.

Tests: `pytest tests/benchmarks/test_state_field.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import read_split

from slimba.checkpoints.reader import open_checkpoint
from slimba.errors import UserError
from slimba.models.lm import SSMForCausalLM, load_weights
from slimba.runtime.backends.reference import round_bfloat16, round_int8

__all__ = ["CASES", "Feedback", "Field", "Stochastic", "run_case"]

CHUNK = 64
CELLS = 23 * 23
BANKS = 256
SIGMAS = 3.0
EVERY = (8, 16, 32)  # tokens between two storings, as our engines could keep them in a buffer


class Field:
    """DF-SSM's binary field of `CELLS` cells, section 2 of its code: count of thresholds below the normalised value.

    `spread`: random thresholds (published) or even ones. `sigma_delta`: the count's remainder, rounded to 1/128, is
    added to the next chunk's value of the same entry. One instance holds the remainders of one layer of one run.
    """

    def __init__(self, *, spread: str = "random", sigma_delta: bool = False, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        even = (torch.arange(CELLS) + 0.5) / CELLS
        random = torch.rand(BANKS, CELLS, generator=g).sort(dim=1).values
        self.banks = random if spread == "random" else even.expand(BANKS, CELLS)
        self.sigma_delta, self.chunk, self.left = sigma_delta, 0, None

    def __call__(self, state: torch.Tensor) -> torch.Tensor:
        """[..., N] -> the values that the next chunk starts from."""
        mean, sigma = state.mean(-1, keepdim=True), state.std(-1, keepdim=True).clamp_min(1e-8)
        low, span = mean - SIGMAS * sigma, 2 * SIGMAS * sigma
        x = ((state - low) / span).clamp(0, 1)
        if self.sigma_delta:
            x = x if self.left is None else (x + self.left).clamp(0, 1)
        bank = self.banks[self.chunk % BANKS].contiguous()
        value = torch.searchsorted(bank, x.contiguous()).float() / CELLS
        self.chunk += 1
        if self.sigma_delta:
            self.left = ((x - value).clamp(-1, 1) * 128).round() / 128
        return value * span + low


class Feedback:
    """int8 with error feedback: what rounding left over of an entry is added before it is stored the next time.

    The remainder is at most half a step, and is kept as int8 of the step it came from.
    """

    def __init__(self) -> None:
        self.left: torch.Tensor | None = None

    def __call__(self, state: torch.Tensor) -> torch.Tensor:
        wanted = state if self.left is None else state + self.left
        stored = round_int8(wanted)
        step = wanted.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        self.left = ((wanted - stored) / step * 254).round() / 254 * step
        return stored


class Stochastic:
    """int8 rounded up or down at random, so that the mean of what is stored is the state."""

    def __init__(self, seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, state: torch.Tensor) -> torch.Tensor:
        step = state.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return (state / step + torch.rand(state.shape, generator=self.random)).floor().clamp(-127, 127) * step


Rounding = Callable[[torch.Tensor], torch.Tensor]


def each(rounding: Rounding) -> Callable[[], Rounding]:
    return lambda: rounding


# name -> (tokens between storings, a maker of each layer's rounding, bits an entry of N = 128 takes)
CASES: dict[str, tuple[int, Callable[[], Rounding] | None, Callable[[int], float]]] = {
    "float32": (CHUNK, None, lambda n: 32.0),
    "bfloat16": (CHUNK, each(round_bfloat16), lambda n: 16.0),
    "int8": (CHUNK, each(round_int8), lambda n: 8 + 32 / n),
    "int8-feedback": (CHUNK, Feedback, lambda n: 16 + 32 / n),
    "field": (CHUNK, lambda: Field(), lambda n: math.log2(CELLS + 1) + 64 / n),
    "field-sigma-delta": (CHUNK, lambda: Field(sigma_delta=True), lambda n: math.log2(CELLS + 1) + 8 + 64 / n),
    "field-even": (CHUNK, lambda: Field(spread="even"), lambda n: math.log2(CELLS + 1) + 64 / n),
    "int8-each-token": (1, each(round_int8), lambda n: 8 + 32 / n),
    "int8-feedback-each-token": (1, Feedback, lambda n: 16 + 32 / n),
    "int8-stochastic-each-token": (1, lambda: Stochastic(), lambda n: 8 + 32 / n),
    "bfloat16-each-token": (1, each(round_bfloat16), lambda n: 16.0),
    **{f"bfloat16-every-{k}": (k, each(round_bfloat16), lambda n: 16.0) for k in EVERY},
    **{f"int8-every-{k}": (k, each(round_int8), lambda n: 8 + 32 / n) for k in EVERY},
}


@torch.inference_mode()
def run_case(
    network: SSMForCausalLM, ids: torch.Tensor, piece: int, make: Callable[[], Rounding] | None
) -> tuple[torch.Tensor, float]:
    """ids [B, L + 1] -> final features [B, L, D], and the mean relative error of a state after one storing."""
    state = network.new_state(len(ids))
    roundings = [make() for _ in state.layers] if make else []
    pieces, errors = [], []
    for at in range(0, ids.shape[1] - 1, piece):
        pieces.append(network.backbone(ids[:, at : min(at + piece, ids.shape[1] - 1)], state))
        for layer, rounding in zip(state.layers, roundings, strict=bool(roundings)) if roundings else ():
            before, layer.ssm = layer.ssm, rounding(layer.ssm)
            if at % CHUNK == 0:
                errors.append(float((layer.ssm - before).norm() / before.norm()))
    return torch.cat(pieces, 1), sum(errors) / len(errors) if errors else 0.0


@torch.inference_mode()
def figures_of(
    network: SSMForCausalLM, ids: torch.Tensor, features: torch.Tensor, exact: torch.Tensor
) -> dict[str, Any]:
    """Perplexity, and relative errors of the features over the whole sequence, its first and its last quarter."""
    nll = torch.stack(
        [
            F.cross_entropy(network.head(f).double(), t, reduction="sum")
            for f, t in zip(features, ids[:, 1:], strict=True)
        ]
    )
    length, quarter = features.shape[1], features.shape[1] // 4

    def error(part: slice) -> float:
        return float((features[:, part] - exact[:, part]).norm() / exact[:, part].norm())

    return {
        "perplexity": math.exp(float(nll.sum()) / (len(ids) * length)),
        "feature_error": error(slice(None)),
        "feature_error_first_quarter": error(slice(0, quarter)),
        "feature_error_last_quarter": error(slice(length - quarter, None)),
    }


def kept_rows(path: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run of the same study. UserError: another study is in the file."""
    if not path.is_file():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    if any(record.get(k) != v for k, v in about.items()):
        raise UserError(f"{path} holds another study; give another --out")
    return list(record["rows"])


def main() -> None:
    args = argparse.ArgumentParser(description="The state of a Mamba-2 in fewer bits.")
    args.add_argument("--teacher", required=True)
    args.add_argument("--text", required=True)
    args.add_argument("--length", type=int, default=4096)
    args.add_argument("--sequences", type=int, default=4)
    args.add_argument("--cases", default=",".join(CASES))
    args.add_argument("--out", type=Path, required=True)
    a = args.parse_args()
    teacher = open_checkpoint(a.teacher)
    if teacher.spec.architecture != "mamba2":
        raise UserError(f"{a.teacher} is a {teacher.spec.architecture}; the binary field is defined for Mamba-2")
    text = read_split(Path(a.text), teacher)
    network = SSMForCausalLM(teacher.spec)
    load_weights(network, teacher)
    network.requires_grad_(False).eval()
    if len(text.ids) < a.sequences * a.length + 1:
        raise UserError(f"the text has {len(text.ids)} tokens, fewer than {a.sequences} x {a.length}; ask for less")
    stride = (len(text.ids) - 1) // a.sequences
    ids = torch.stack([torch.from_numpy(text.ids[i * stride :][: a.length + 1]).long() for i in range(a.sequences)])
    protocol = f"{text.protocol}; {a.sequences} evenly spaced sequences from empty states"
    about = {"teacher": Path(a.teacher).name, "text": Path(a.text).name, "sequences": a.sequences, "length": a.length}
    record: dict[str, Any] = about | {"protocol": protocol, "rows": kept_rows(a.out, about)}
    exact = None
    for name in ["float32", *(c for c in a.cases.split(",") if c != "float32")]:
        if name not in CASES:
            raise UserError(f"unknown case {name!r}, known are {', '.join(CASES)}")
        done = [r["case"] for r in record["rows"]]
        if name in done and (name != "float32" or set(a.cases.split(",")) <= set(done)):
            continue
        piece, make, bits = CASES[name]
        begin = time.perf_counter()
        features, state_error = run_case(network, ids, piece, make)
        exact = features if exact is None else exact
        row = {"case": name, "tokens_between_storings": piece, "bits_per_entry": bits(teacher.spec.d_state)}
        row |= figures_of(network, ids, features, exact) | {"state_error": state_error}
        if name in done:
            continue
        record["rows"].append(row | {"seconds": round(time.perf_counter() - begin, 1)})
        print(record["rows"][-1], flush=True)
        a.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
