"""The trained baselines: screened over learning rates at a quarter of the tokens, the best at all of them, seeds.

    python benchmarks/baselines/run_baselines.py --teacher MODEL --ids train.npy --valid valid.txt.zst \
        --test test.txt.zst --tokens 33000000 --out rows.jsonl
    ... --shard 0/2 & ... --shard 1/2    # two processes, each with CUDA_VISIBLE_DEVICES; rows-0.jsonl, rows-1.jsonl

Every finished arm is a row; started again, what is there is not done again. Without `--lrs` each arm's own grid of
three is screened on `valid` with the first seed, then trained at `--tokens` with the best rate; the best one-bit
baseline is trained with the other seeds too. With `--lrs` just those runs are made, at `--tokens`, for every seed. One
process serves all its arms. Arms and their departures from what was published: `arms.py`.
Tests: `pytest tests/benchmarks/test_run_baselines.py`.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arms import ARMS
from harness import Bench
from measure import read_ids, read_split
from rows import Rows

from slimba.checkpoints.reader import open_checkpoint
from slimba.errors import UserError
from slimba.training.loop import pick_device
from slimba.training.recipes import parse_overrides

__all__ = ["Job", "main", "plan"]

SCREEN = 4  # screens see one part in four of the tokens
ONE_BIT = 2.0  # bits per projection weight up to which a baseline may be the one that gets more seeds
PATIENCE_S = 240.0  # how long a shard waits for the next row of the others: a waiting GPU is a wasted one


@dataclass(frozen=True, slots=True)
class Job:
    arm: str
    lr: float
    seed: int
    tokens: int
    splits: tuple[str, ...]

    def key(self) -> dict[str, Any]:
        return {"arm": self.arm, "lr": self.lr, "seed": self.seed, "budget": self.tokens}


def plan(rows: Rows, arms: list[str], seeds: list[int], tokens: int, shard: tuple[int, int]) -> Iterator[Job]:
    """The jobs of this shard, in order; each is asked for when the rows of those before are there."""
    i, n = shard
    mine, screen = arms[i::n], tokens // SCREEN
    for arm in mine:
        for lr in ARMS[arm].lrs:
            yield Job(arm, lr, seeds[0], screen, ("valid",))
        yield Job(arm, best_rate(rows, arm, seeds[0], screen), seeds[0], tokens, ("valid", "test"))
    wait_for(rows, arms, seeds[0], tokens)
    arm, lr = best_baseline(rows, arms, seeds[0], tokens)
    for seed in seeds[1:][i::n]:
        yield Job(arm, lr, seed, tokens, ("valid", "test"))


def best_rate(rows: Rows, arm: str, seed: int, tokens: int) -> float:
    """By `valid`, of what the arm is first exported as."""
    first = ARMS[arm].variants[0].name
    found = rows.find(arm=arm, seed=seed, budget=tokens, variant=first)
    return float(min((r for r in found if r["lr"] in ARMS[arm].lrs), key=lambda r: r["valid"]["perplexity"])["lr"])


def best_baseline(rows: Rows, arms: list[str], seed: int, tokens: int) -> tuple[str, float]:
    """The arm with the lowest perplexity on `valid` among those of at most two bits, else among all."""
    found = [r for r in rows.find(seed=seed, budget=tokens) if r["arm"] in arms]
    small = [r for r in found if r["bits_per_projection_weight"] <= ONE_BIT] or found
    best = min(small, key=lambda r: r["valid"]["perplexity"])
    return str(best["arm"]), float(best["lr"])


def wait_for(rows: Rows, arms: list[str], seed: int, tokens: int) -> None:
    """Until every arm has its row at all tokens, from whichever shard. UserError when nothing new comes."""
    known, since = 0, time.monotonic()
    while missing := [a for a in arms if not rows.find(arm=a, seed=seed, budget=tokens)]:
        if (found := len(rows.find())) > known:
            known, since = found, time.monotonic()
        if time.monotonic() - since > PATIENCE_S:
            raise UserError(f"no row of {missing[0]} and nothing new; run the other shard, then this one again")
        time.sleep(1.0)


def parse() -> argparse.Namespace:
    args = argparse.ArgumentParser(description="Trained baselines: screens, full runs, seeds.")
    for name in ("teacher", "ids", "valid", "test", "out"):
        args.add_argument("--" + name, required=True)
    args.add_argument("--tokens", type=int, required=True)
    args.add_argument("--arms", default=",".join(ARMS))
    args.add_argument("--lrs", help="only these rates, at all tokens, for every seed")
    args.add_argument("--seeds", default="0,1,2")
    args.add_argument("--shard", default="0/1")
    args.add_argument("--embedding", choices=("int4", "int8"), default="int8")
    args.add_argument("--set", action="append", default=[], help="key=value of the recipe, for every stage of all arms")
    args.add_argument("--keep", type=Path, help="keep the packed models here")
    args.add_argument("--device", default="auto")
    args.add_argument("--seconds", type=float, default=math.inf, help="begin no run after this time")
    args.add_argument("--eval-window", type=int, default=1024)
    args.add_argument("--eval-tokens", type=int, help="measure on the first so many tokens of each text")
    return args.parse_args()


def main() -> None:
    a = parse()
    arms = a.arms.split(",")
    for arm in arms:
        if arm not in ARMS:
            raise UserError(f"unknown arm {arm!r}, known are {', '.join(ARMS)}")
    i, n = (int(x) for x in a.shard.split("/"))
    seeds, out = [int(s) for s in a.seeds.split(",")], Path(a.out)
    files = [out.with_name(f"{out.stem}-{k}{out.suffix}") for k in range(n)] if n > 1 else [out]
    rows = Rows(files[i], files)
    device, begin = pick_device(a.device), time.perf_counter()
    teacher = open_checkpoint(a.teacher)
    texts = {k: read_split(Path(getattr(a, k)), teacher, a.eval_tokens) for k in ("valid", "test")}
    ids = read_ids(Path(a.ids), teacher)
    bench = Bench(
        teacher,
        ids,
        texts,
        device,
        embedding=a.embedding,
        settings=parse_overrides(a.set),
        keep=a.keep,
        eval_window=a.eval_window,
    )
    print(f"shard {i}/{n} on {device}: ready after {time.perf_counter() - begin:.1f} s", flush=True)
    if a.lrs:
        both = ("valid", "test")
        rates = [float(x) for x in a.lrs.split(",")]
        listed = [Job(arm, lr, s, a.tokens, both) for s in seeds for arm in arms for lr in rates]
        jobs: Iterator[Job] = iter(listed[i::n])
    else:
        jobs = plan(rows, arms, seeds, a.tokens, (i, n))
    for job in jobs:
        if rows.find(**job.key(), embedding=a.embedding):
            continue
        if time.perf_counter() - begin > a.seconds:
            print(f"time is up before {job}", flush=True)
            break
        made = bench.run(job.arm, job.lr, job.seed, job.tokens, job.splits)
        rows.add(*(row | {"screen": "test" not in job.splits} for row in made))
        for row in made:
            say(row)


def say(row: dict[str, Any]) -> None:
    shown = {k: f"{row[k]['perplexity']:.3f}" for k in ("valid", "test") if k in row}
    size = f"{row['bits_per_projection_weight']:.3f} bits {row['file_bytes']:,} bytes"
    took = f"{row['tokens']:,} tokens {row['seconds']:.1f} s (with fit and evaluation {row['wall_seconds']:.1f} s)"
    print(f"{row['variant']} lr {row['lr']:g} seed {row['seed']}: {shown} {size} {took}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()
