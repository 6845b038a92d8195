"""The whole model through calibration, one layer in memory at a time, and the check against the float model.

    packed = calibrate(source, recipe, windows, device)        # every layer in every mode that it may have
    checkpoint = packed.checkpoint(teacher, chosen_modes)
    figures = compare(source, packed, chosen_modes, held_out)  # KL and perplexities on a few windows

Each layer is calibrated on what the quantised layers before it make of the windows. Legend: n windows, L length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from slimba.checkpoints.checkpoint import Checkpoint
from slimba.formats import Matrix
from slimba.formats.floats import DTYPES
from slimba.formats.presets import preset_dtypes
from slimba.methods.gptq import Grid, round_to_nearest
from slimba.methods.quamba2.clusters import ClusterOrder, cluster_order, scan_scales
from slimba.methods.quamba2.fold import Source, reordered
from slimba.methods.quamba2.layers import OUT_SCALE, Layer, Rounding, quantise
from slimba.methods.quamba2.recipe import QuambaRecipe, layer_layouts, table_layouts
from slimba.models.norms import rms_normalise
from slimba.models.spec import ModelSpec
from slimba.runtime.backends.reference import round_int8

__all__ = ["Fitness", "Packed", "calibrate", "compare", "features"]

PIECE = 256  # tokens whose logits are held at a time
Tensors = dict[str, torch.Tensor]


@dataclass(slots=True)
class Packed:
    """A model being quantised: matrices [layer][mode][short name], vectors [layer] by name within the layer."""

    spec: ModelSpec
    int8: bool
    tables: dict[str, Matrix]
    final_norm: torch.Tensor
    matrices: list[dict[str, dict[str, Matrix]]] = field(default_factory=list)
    vectors: list[Tensors] = field(default_factory=list)

    def layer(self, i: int, mode: str, device: torch.device) -> Layer:
        """Layer i as the engines compute it."""
        layer = Layer(self.spec, self.vectors[i], device, int8=self.int8)
        for short, matrix in self.matrices[i][mode].items():
            layer.use(short, matrix)
        return layer

    def checkpoint(self, teacher: Checkpoint, modes: Sequence[str], numerics: dict[str, str]) -> Checkpoint:
        """The packed model with layer i in modes[i]."""
        matrices = dict(self.tables)
        tensors: Tensors = {"backbone.norm_f.weight": self.final_norm}
        dtypes = preset_dtypes("dfssm")
        for i, mode in enumerate(modes):
            at = f"backbone.layers.{i}."
            matrices |= {f"{at}mixer.{short}": m for short, m in self.matrices[i][mode].items()}
            tensors |= {at + name: v for name, v in self.vectors[i].items()}
        arrays = {n: v.cpu().numpy() for n, v in tensors.items()}
        for name, (_, kind) in self.spec.vectors().items():
            arrays[name] = arrays[name].astype(DTYPES[dtypes[kind]])
        for name, matrix in matrices.items():
            arrays |= {f"{name}.{part}": a for part, a in matrix.arrays.items()}
        return Checkpoint(
            spec=self.spec,
            layouts={name: matrices[name].layout for name in self.spec.matrices()},
            tensors=arrays,
            tokenizer_file=teacher.tokenizer_file,
            numerics=numerics,
            generation=teacher.generation,
        )


def calibrate(
    source: Source,
    recipe: QuambaRecipe,
    windows: torch.Tensor,
    device: torch.device,
    progress: Callable[[int], object] = lambda layers: None,
) -> Packed:
    """Quantise every layer in each of the recipe's modes; windows int64 [n, L]. `progress` counts the layers."""
    spec = source.spec
    how = Rounding(recipe.rounding == "gptq", recipe.damping, recipe.int8_scale == "tensor", recipe.percentile)
    tables = {"backbone.embeddings": table(source.embedding(), "backbone.embeddings", spec, recipe)}
    packed = Packed(spec, recipe.activations == "int8", tables, half(source.final_norm()))
    streams = embed(packed, windows, recipe.micro_batch, device)
    scan = recipe.ssm_inputs if packed.int8 else "float32"
    for i in range(spec.n_layer):
        tensors, order = source.layer(i), None
        if scan == "cluster":
            tensors, order = clustered(tensors, spec, recipe, streams, device)
        vectors = {n: v if is_state(spec, n) else half(v) for n, v in tensors.items() if not is_matrix(spec, n)}
        packed.vectors.append(vectors)
        packed.matrices.append({})
        for mode in reversed(recipe.modes):  # the streams of the first one go on
            layer = Layer(spec, tensors | vectors, device, int8=packed.int8)
            made = packed.matrices[i][mode] = {}
            for short, layout in layer_layouts(spec, recipe, mode).items():
                inputs = layer.inputs(short, layout, streams)
                made[short] = quantise(layer, short, layout, inputs, how)
                layer.use(short, made[short])
                if short == "in_proj" and scan != "float32":
                    if OUT_SCALE not in vectors:
                        sizes, x_size = layer.channel_sizes(streams, recipe.percentile)
                        scale = scan_scales(sizes, spec, scan, order, x_size)
                        vectors[OUT_SCALE] = torch.from_numpy(scale).to(device)
                    layer.round_scan(vectors[OUT_SCALE])
        layer.finish(streams, inputs)
        progress(1)
    head = source.head()
    if head is not None:
        packed.tables["lm_head"] = table(head, "lm_head", spec, recipe)
    return packed


def clustered(
    tensors: Tensors, spec: ModelSpec, recipe: QuambaRecipe, streams: Sequence[torch.Tensor], device: torch.device
) -> tuple[Tensors, ClusterOrder]:
    """The layer with its heads and channels in the order of their clusters."""
    sizes, _ = Layer(spec, tensors, device, int8=False).channel_sizes(streams, 1.0)
    order = cluster_order(sizes, spec, recipe.clusters)
    places = (torch.from_numpy(order.channels).to(device), torch.from_numpy(order.heads).to(device))
    return reordered(tensors, spec, *places), order


def table(weight: torch.Tensor, name: str, spec: ModelSpec, recipe: QuambaRecipe) -> Matrix:
    """The embedding or an own head [V, D], rounded to nearest: each of its rows is looked up, or is one logit."""
    layout = table_layouts(spec, recipe)[name]
    (segment,) = layout.segments
    if segment.format == "int4":
        arrays = round_to_nearest(weight, Grid(4)).arrays("int4")
        return Matrix(layout, {layout.part_name(0, part): a for part, a in arrays.items()})
    return Matrix.quantize(weight.cpu().numpy(), layout)


def half(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


def is_matrix(spec: ModelSpec, name: str) -> bool:
    return name.removeprefix("mixer.").removesuffix(".weight") in spec.layer_matrices()


def is_state(spec: ModelSpec, name: str) -> bool:
    return spec.vectors()[f"backbone.layers.0.{name}"][1] == "ssm"


# ------------------------------------------------------------------------------------------------------- the check


def embed(packed: Packed, ids: torch.Tensor, micro_batch: int, device: torch.device) -> list[torch.Tensor]:
    """int64 [n, L] -> residual streams, float32 [<= micro_batch, L, D] each."""
    rows = packed.tables["backbone.embeddings"].rows_at(ids.numpy().reshape(-1))
    return list(torch.from_numpy(rows).view(*ids.shape, -1).to(device).split(micro_batch))


def features(
    layers: Iterator[Layer], streams: list[torch.Tensor], norm: torch.Tensor, eps: float
) -> list[torch.Tensor]:
    """Through all layers and the last norm."""
    for layer in layers:
        layer.advance(streams)
    return [rms_normalise(u, eps) * norm for u in streams]


class Fitness:
    """KL(float || quantised) a token on windows int64 [n, L + 1], for any modes of the layers."""

    def __init__(self, source: Source, packed: Packed, windows: torch.Tensor, device: torch.device) -> None:
        self._packed, self._windows, self._device = packed, windows, device
        self.want, self.head = float_features(source, windows[:, :-1], device)

    def __call__(self, modes: Sequence[str]) -> float:
        return self.figures(modes)[0]

    def figures(self, modes: Sequence[str]) -> tuple[float, float, float]:
        """KL and the cross-entropies of the float and the quantised model, means over the tokens."""
        packed, device, ids = self._packed, self._device, self._windows[:, :-1]
        ours = (packed.layer(i, mode, device) for i, mode in enumerate(modes))
        streams = embed(packed, ids, len(ids), device)
        got = features(ours, streams, packed.final_norm.to(device), packed.spec.norm_eps)
        head, int8 = packed_head(packed, device)
        return kl_and_losses(self.want, self.head, got[0], head, int8, self._windows[:, 1:].to(device))


def float_features(source: Source, ids: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What the float model's head takes [n, L, D], and that head [V, D]."""
    spec, table, head = source.spec, source.embedding(), source.head()
    floats = (Layer(spec, source.layer(i), device, int8=False) for i in range(spec.n_layer))
    out = features(floats, [table[ids.to(device)]], source.final_norm(), spec.norm_eps)
    return out[0], table if head is None else head


def compare(
    source: Source, packed: Packed, modes: Sequence[str], windows: torch.Tensor, device: torch.device
) -> dict[str, float]:
    """KL(float || quantised) a token and the two perplexities on windows int64 [n, L + 1] that were not calibrated
    on.
    """
    kl, float_loss, loss = Fitness(source, packed, windows, device).figures(modes)
    return {"kl": kl, "teacher_perplexity": math.exp(float_loss), "perplexity": math.exp(loss)}


def packed_head(packed: Packed, device: torch.device) -> tuple[torch.Tensor, bool]:
    """The head's weight [V, D], and whether its input is rounded to int8."""
    matrix = packed.tables.get("lm_head", packed.tables["backbone.embeddings"])
    return torch.from_numpy(matrix.dequantize()).to(device), packed.int8 and matrix.layout.takes_int8


def kl_and_losses(
    want: torch.Tensor, head: torch.Tensor, got: torch.Tensor, ours: torch.Tensor, int8: bool, targets: torch.Tensor
) -> tuple[float, float, float]:
    """Means over the tokens of KL(want || got) and of the two cross-entropies; features [B, L, D], targets [B, L]."""
    sums, count = [0.0, 0.0, 0.0], targets.numel()
    pieces: Any = zip(*(t.flatten(0, 1).split(PIECE) for t in (want, got, targets.unsqueeze(-1))), strict=True)
    for a, b, y in pieces:
        p = F.log_softmax(a @ head.T, dim=-1)
        q = F.log_softmax((round_int8(b) if int8 else b) @ ours.T, dim=-1)
        sums[0] += float(F.kl_div(q, p, reduction="sum", log_target=True))
        sums[1] -= float(p.gather(1, y).sum())
        sums[2] -= float(q.gather(1, y).sum())
    return sums[0] / count, sums[1] / count, sums[2] / count
