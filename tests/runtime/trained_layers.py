"""Int8 activations of an engine on a trained model, layer by layer: a comparison with the reference that sees.

    found = compare_layers(checkpoint, ids, lambda layer, exact: CudaEngine(layer, activations="int8", exact=exact))

Which code an entry takes may be decided by a difference in the last place, and in a whole model every code that flips
moves what follows: two right engines differ by as much as int8 moves the logits. So each layer is a model of its own
here, whose embedding holds what enters the layer in the reference and whose head is the identity: what enters is the
same to the bit, few codes flip, and those move one layer only. The measure is the root mean square of an engine's
difference from the reference, as a share of what int8 moves in that layer: 1 if an engine did not round at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.formats import FORMATS, MatrixLayout, Segment
from slimba.runtime.backends.reference import ReferenceEngine

__all__ = ["LayerFound", "compare_layers", "one_layer", "streams"]


BATCH = 9  # sequences of the steps of many, each three tokens further in the text
FEWEST = 3 * BATCH + 16  # tokens of a text
# Of LayerFound; 1 is an engine that does not round. Float16 inputs, as of "bulk" and "many", flip codes: the reference
# is off by 0.25 to 0.7 when its input is shaken by 2^-11, by up to 0.05 when by 2^-20.
ALLOWED = {"exact": 0.1, "bulk": 0.8, "steps": 0.1, "many": 0.5}


@dataclass(frozen=True, slots=True)
class LayerFound:
    """Of one layer: how far int8 moves its output (as a share of that), and the engine's difference as a share of what
    int8 moves: of the bulk pass in float32 and in float16, of steps of one sequence, of steps of BATCH."""

    layer: int
    moved: float
    exact: float
    bulk: float
    steps: float
    many: float

    @property
    def right(self) -> bool:
        return all(getattr(self, name) <= most for name, most in ALLOWED.items())


def streams(checkpoint: Checkpoint, ids: np.ndarray, device: str = "cpu") -> list[np.ndarray]:
    """What enters each layer [L, D] in the reference, int32 ids [L], with int8 activations."""
    import torch

    reference = ReferenceEngine(checkpoint, activations="int8", device=device)
    model, entered = reference.model, []
    for block in model.backbone.layers:
        block.register_forward_pre_hook(lambda _, args: entered.append(args[0][0].float().cpu().numpy()))
    with torch.inference_mode():
        model.backbone(torch.from_numpy(ids.astype(np.int64))[None].to(device))
    return entered


def one_layer(checkpoint: Checkpoint, i: int, entering: np.ndarray) -> Checkpoint:
    """A model of layer i alone: token t's embedding is row t of `entering`, its logits the normed output [D]."""
    count, width = entering.shape
    vocab = max(count, width)
    spec = replace(checkpoint.spec, n_layer=1, vocab_size=vocab, tie_embeddings=False)
    ours, theirs = "backbone.layers.0.", f"backbone.layers.{i}."
    layouts = {ours + n[len(theirs) :]: v for n, v in checkpoint.layouts.items() if n.startswith(theirs)}
    tensors = {ours + n[len(theirs) :]: v for n, v in checkpoint.tensors.items() if n.startswith(theirs)}
    layouts["backbone.embeddings"] = MatrixLayout.plain(vocab, width, "float32")
    layouts["lm_head"] = head = MatrixLayout(width, (Segment(vocab, "int8"),), activations="float32")
    parts = FORMATS["int8"].pack(np.eye(vocab, width, dtype=np.float32))
    tensors |= {f"lm_head.{head.part_name(0, part)}": array for part, array in parts.items()}
    tensors["backbone.embeddings.weight"] = np.pad(entering, ((0, vocab - count), (0, 0)))
    tensors["backbone.norm_f.weight"] = np.ones(width, np.float32)
    return Checkpoint(spec, layouts, tensors)


EngineOf = Callable[[Checkpoint, bool], Any]


def compare_layers(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    engine_of: EngineOf,
    *,
    layers: Iterable[int] | None = None,
    device: str = "cpu",
) -> list[LayerFound]:
    """ids: int32 [L], a text of at least FEWEST tokens; engine_of: of a model and whether exact; layers: or all."""
    entering = streams(checkpoint, ids, device)
    chosen = range(checkpoint.spec.n_layer) if layers is None else layers
    return [_compare(one_layer(checkpoint, i, entering[i]), i, len(ids), engine_of, device) for i in chosen]


def _compare(layer: Checkpoint, i: int, count: int, engine_of: EngineOf, device: str) -> LayerFound:
    width = layer.spec.d_model
    references = [ReferenceEngine(layer, activations=a, device=device) for a in ("int8", "float32")]

    def outputs(ids: np.ndarray) -> list[np.ndarray]:
        return [r.forward(ids, r.new_state(len(ids)))[..., :width] for r in references]

    whole = np.arange(count, dtype=np.int32)[None]
    want, plain = outputs(whole)
    found = {"moved": rms(want - plain) / rms(want)}
    for name, exact in ("exact", True), ("bulk", False):
        engine = engine_of(layer, exact)
        got = engine.forward(whole, engine.new_state())[..., :width]
        found[name] = rms(got - want) / rms(want - plain)
    for name, batch in ("steps", 1), ("many", BATCH):
        ids = whole[:, :16] + 3 * np.arange(batch, dtype=np.int32)[:, None]
        want, plain = outputs(ids)
        state = engine.new_state(batch)
        got = np.stack([engine.step(t, state).cpu().numpy()[:, :width].copy() for t in ids.T], axis=1)
        found[name] = rms(got - want) / rms(want - plain)
    return LayerFound(i, **found)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt((x.astype(np.float64) ** 2).mean()))
