"""Kernels of one model: descriptions become constants, so that the compiler removes every case that does not occur.

    baked = Baked()
    name = baked.product(fields, tokens=1)      # "slimba_product_1_0"; equal shapes share a kernel
    gpu.launch(name, ..., module="decode", extra=baked.source)

A kernel copies its struct and overwrites all fields but pointers, and what differs between launches, with numbers.
Without this the arithmetic of indices takes longer than the products.
"""

from __future__ import annotations

import re

import numpy as np

from slimba.runtime.backends.cuda_codes import Codes
from slimba.runtime.backends.cuda_lean import Dot, Lean
from slimba.runtime.backends.cuda_stream import Stream

__all__ = ["KEYS", "QUICK", "QUICK_THREADS", "Baked"]

QUICK, QUICK_THREADS = "quick", 288  # the kernel of kernels/cuda/quick.cuh, threads of its block
# Bounds of the recurrence beside one.cuh: with 80 registers a thread, three of its nine warps and four of out_proj's
# sixteen fit the 16,384 of a quarter of a multiprocessor (docs/log.md)
BESIDE_THREADS = 384

MATRIX = 82  # fields of struct Matrix in kernels/cuda/matrix.cuh, whose pointers follow the numbers
SEGMENT0, SEGMENT, SEGMENTS = 18, 9, 6
POINTERS = {
    *(SEGMENT0 + SEGMENT * k + i for k in range(SEGMENTS) for i in (5, 8)), *range(MATRIX - 10, MATRIX),
    *(MATRIX + i for i in (0, 2, 4)), *(MATRIX + 7 + i for i in (1, 5)), MATRIX + 17, MATRIX + 18, MATRIX + 23,
}  # fmt: skip
VARYING = {MATRIX + 19, MATRIX + 22}  # layer, batch
HEAD = MATRIX + 24  # fields of struct Product, which struct Head in kernels/cuda/choice.cuh begins with
KEYS = HEAD + 13  # 0 where nothing is chosen
RECURRENCE_POINTERS = {0, 1, 15, 16, 17, 18, 19, 20, 22, 24}
RECURRENCE_VARYING = {2, 5}
BATCH, FEW = 5, 16  # field of struct Recurrence; sequences of which a block a multiprocessor is enough

# Kernels for many sequences: struct, bounds, arguments, fields that differ between launches. Fields of 2^32 and more
# are pointers.
MANY = {
    "mid_norm": ("MidNorm", "THREADS", "s", {MATRIX + 9}),
    "mid": ("Mid", "THREADS, 2", "s", {MATRIX + 12, MATRIX + 15, MATRIX + 20}),
    "still": ("Mid", "", "s", {MATRIX + 12, MATRIX + 15, MATRIX + 20}),
    "few": ("Mid", "", "s", {MATRIX + 12, MATRIX + 15, MATRIX + 20}),
    "broad": ("Broad", "", "s", {MATRIX + 12, MATRIX + 15, MATRIX + 18, MATRIX + 20}),
    "broad_codes": ("Broad", "THREADS", "s", {MATRIX + 12, MATRIX + 15, MATRIX + 18, MATRIX + 20}),
    "broad_norm": ("BroadNorm", "THREADS", "s", {MATRIX + 9, MATRIX + 13, MATRIX + 26}),
    "eight": ("Eight", "", "s", {MATRIX + 12}),
    "eight_embed": ("EightEmbed", "THREADS", "s", set()),
    "one": ("One", "", "s", {MATRIX + 12}),
    "leaving": ("Leaving", "", "s", {MATRIX + 19, MATRIX + 22}),
    "one_recur": ("Recurrence", f"{BESIDE_THREADS}, 2", "s", RECURRENCE_VARYING),
    "steps": ("Steps", "THREADS, ", "s", RECURRENCE_VARYING),
    "flow": ("Steps", "THREADS, 2", "s", RECURRENCE_VARYING),
    "prepare": ("BatchRecurrence", "THREADS", "s", RECURRENCE_VARYING),
    "states": ("BatchRecurrence", "THREADS, ", "s", RECURRENCE_VARYING),
}


class Baked:
    """Collects kernels; `source` is their text."""

    ORDER = "AtOnce()"  # of the kernels for one vector: when they let the next one begin
    QUICK_RESIDENT = 2  # blocks for which a multiprocessor should have registers

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], str] = {}

    @property
    def source(self) -> str:
        return "\n".join(text.replace("NAME", name) for (_, text), name in self._names.items())

    def product(self, fields: np.ndarray, tokens: int, lean: Codes | Dot | Lean | Stream | None = None) -> str:
        """The kernel for a struct Product and 1 or 8 tokens a block, or for one token that of dot.cuh, lean.cuh,
        codes.cuh or stream.cuh."""
        sets = constants(fields, POINTERS, VARYING)
        if lean is not None:
            kind = type(lean).__name__.lower() if isinstance(lean, Codes | Stream) else "lean"
            call = f"{self._first()}{lean.name}(s, smem, {self.ORDER});"
            return self._add(f"slimba_{kind}", kernel("Product", f"{lean.threads}, {lean.resident}", sets, call))
        bounds = "THREADS, 2" if tokens == 1 else "THREADS"
        first = "0" if tokens == 1 else f"{tokens} * blockIdx.y"
        call = f"product<{tokens}>(s, smem, {first}, blockIdx.x, gridDim.x, InOrder());"
        return self._add(f"slimba_product_{tokens}", kernel("Product", bounds, sets, call))

    def head(self, fields: np.ndarray, lean: Codes | Stream) -> str:
        """The kernel for a struct Head that chooses or not: the last product of a step of one sequence."""
        sets = constants(fields[:HEAD], POINTERS, VARYING)
        further = enumerate(fields[HEAD:].tolist(), HEAD)
        sets += " ".join(f" f[{i}] = {v};" for i, v in further if 0 <= v < 1 << 32 and i != KEYS)
        call = (
            f"Choosing c{{*(const i32*)s.choice.n_valid}}; {lean.name}(s.p, smem, HeadOrder{{s}}, c);"
            f" if (s.choice.keys) choose<{lean.threads // 32}>(s, c.key, (u64*)smem);"
        )
        return self._add("slimba_head", kernel("Head", f"{lean.threads}, {lean.resident}", sets, call))

    def recurrence(self, fields: np.ndarray, instance: str) -> str:
        """The kernel for a struct Recurrence; `instance` are the arguments of the template recur, or QUICK."""
        sets = constants(fields, RECURRENCE_POINTERS, RECURRENCE_VARYING)
        if instance == QUICK:
            call = f"quick_recur<false>(s, smem, {self.ORDER});"
            bounds = f"{QUICK_THREADS}, {self.QUICK_RESIDENT}"
            return self._add("slimba_quick", kernel("Recurrence", bounds, sets, self._first() + call))
        call = f"recur<{instance}>(s, smem, blockIdx.x, gridDim.x, InOrder());"
        return self._add("slimba_recur", kernel("Recurrence", "THREADS, 2", sets, call))

    def of_many(self, name: str, fields: np.ndarray) -> str | None:
        """The kernel for a launch of `name`, one of kernels/cuda/many.cu; None where it is none of those."""
        kind, numbers = re.match(r"slimba_([a-z_]*[a-z])_?((?:\d_?)*)", name).groups()  # type: ignore[union-attr]
        if kind not in MANY:
            return None
        struct, bounds, call, varying = MANY[kind]
        arguments = numbers.split("_") if numbers else []
        if kind in ("states", "steps"):
            # A block a multiprocessor, with a product's beside it
            alone = kind == "steps" and fields[-1] != 0 and fields[BATCH] <= FEW
            bounds += {"states": "3", "steps": "4"}[kind] if arguments[0] == "2" and not alone else "2"
            shape = arguments[1] if kind == "states" else ", ".join(arguments)
            call += f", *({kind.title()}Shared<{shape}>*)smem"
        elif kind == "flow":
            call += f", *(FlowShared<{arguments[0]}>*)smem"
        else:
            call += ", smem"
        if kind in ("still", "few", "eight", "one", "leaving"):
            resident = 1 if kind in ("still", "few") else arguments.pop()
            bounds = f"{32 * int(arguments[kind == 'few'])}, {resident}"
        if kind == "broad":
            bounds = f"{128 * int(arguments[1]) * int(arguments[2])}, 1"
        template = f"<{', '.join(arguments)}>" if arguments else ""
        fixed = [(i, v) for i, v in enumerate(fields.tolist()) if 0 <= v < 1 << 32 and i not in varying]
        sets = " ".join(f"f[{i}] = {v};" for i, v in fixed)
        text = kernel(struct, bounds, sets, f"{kind}{template}({call});")
        return self._add(f"slimba_{kind}", text)

    def _first(self) -> str:
        return "release_next(); " if self.ORDER == "AtOnce()" else ""

    def _add(self, name: str, text: str) -> str:
        return self._names.setdefault((name, text), f"{name}_{len(self._names)}")


def constants(fields: np.ndarray, pointers: set[int], varying: set[int]) -> str:
    """Assignments of what is the same in every launch; a pointer only where it is null."""
    fixed = [
        (i, int(v)) for i, v in enumerate(fields.tolist()) if i not in varying and (i not in pointers or v == 0)
    ]  # fmt: skip
    return " ".join(f"f[{i}] = {v};" for i, v in fixed)


def kernel(struct: str, bounds: str, sets: str, call: str) -> str:
    return f"KERNEL(NAME, {struct}, {bounds}) {{ SHARED(smem); {struct} s = p; i64* f = (i64*)&s; {sets} {call} }}"
