"""Clusters of heads and channels, and the int8 x, B and C that they are for.

Run: `pytest tests/methods/test_quamba2_clusters.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.tiny import tiny_checkpoint, tiny_spec
from methods.test_quamba2 import CPU, IDS, float_logits, model, recipe, windows_of
from slimba.checkpoints.checkpoint import Checkpoint
from slimba.checkpoints.convert import cast
from slimba.checkpoints.inventory import inventory_of
from slimba.checkpoints.packed import read_packed, write_packed
from slimba.errors import UserError
from slimba.methods.quamba2.clusters import cluster_order, contiguous_parts, scan_scales, ward
from slimba.methods.quamba2.run import quantised
from slimba.runtime.backends.cpu import CpuEngine
from slimba.runtime.backends.reference import ReferenceEngine

SPEC = tiny_spec("mamba2", n_groups=2, d_inner=192, headdim=16, norm_group_size=96)  # 12 heads, 6 in a group


def test_ward_finds_the_clusters_that_are_there() -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3, 5)) * 10
    which = np.array([0, 1, 2, 2, 1, 0, 0, 1, 2])
    labels = ward(centres[which] + 0.1 * rng.standard_normal((9, 5)), 3)
    assert np.array_equal(labels, which)
    assert np.array_equal(ward(rng.standard_normal((2, 4)), 4), [0, 1])
    assert np.array_equal(ward(rng.standard_normal((5, 4)), 1), [0] * 5)


@pytest.mark.parametrize(("n", "parts"), [(1, 4), (4, 4), (7, 2), (9, 3), (10, 4)])
def test_runs_have_the_least_squared_step(n: int, parts: int) -> None:
    sizes = np.sort(np.random.default_rng(n).exponential(size=n))
    labels = contiguous_parts(sizes, parts)
    assert (np.diff(labels) >= 0).all() and set(labels.tolist()) == set(range(min(n, parts)))

    def cost(cuts: tuple[int, ...]) -> float:
        return sum((j - i) * sizes[j - 1] ** 2 for i, j in itertools.pairwise((0, *cuts, n)))

    best = min(cost(cuts) for cuts in itertools.combinations(range(1, n), min(n, parts) - 1))
    ours = cost(tuple(np.flatnonzero(np.diff(labels)) + 1))
    assert ours == pytest.approx(best)


def test_the_order_keeps_heads_in_their_group_and_channels_in_their_head() -> None:
    sizes = np.random.default_rng(3).exponential(size=SPEC.d_conv_channels)
    order = cluster_order(sizes, SPEC, 3)
    assert sorted(order.heads[:6]) == list(range(6)) and sorted(order.heads[6:]) == list(range(6, 12))
    assert sorted(order.channels) == list(range(192))
    assert np.array_equal(order.channels.reshape(12, 16) // 16, np.repeat(order.heads[:, None], 16, 1))
    assert (np.diff(sizes[order.channels].reshape(12, 16), axis=1) >= 0).all(), "ascending in each head"
    assert len(np.unique(order.cluster)) == 2 * 3 * 3
    heads = order.cluster.reshape(12, 16)
    assert len(np.unique(heads, axis=0)) == 2 * 3
    for g in range(2):  # heads of a cluster are neighbours
        same = (heads[g * 6 + 1 : g * 6 + 6] == heads[g * 6 : g * 6 + 5]).all(axis=1)
        assert same.sum() == 6 - 3


def test_scales_by_their_definition() -> None:
    sizes = np.random.default_rng(4).exponential(size=SPEC.d_conv_channels).astype(np.float32)
    x, B, C = sizes[:192], sizes[192:224], sizes[224:]
    each = scan_scales(sizes, SPEC, "channel") * 127
    np.testing.assert_allclose(each, sizes, rtol=1e-6)
    whole = scan_scales(sizes, SPEC, "tensor") * 127
    np.testing.assert_allclose(whole, np.repeat([x.max(), B.max(), C.max()], [192, 32, 32]), rtol=1e-6)
    group = scan_scales(sizes, SPEC, "group", x_size=0.5) * 127
    parts = [0.5, B[:16].max(), B[16:].max(), C[:16].max(), C[16:].max()]
    np.testing.assert_allclose(group, np.repeat(parts, [192, 16, 16, 16, 16]), rtol=1e-6)
    order = cluster_order(sizes, SPEC, 3)
    sizes[:192] = sizes[order.channels]
    scale = scan_scales(sizes, SPEC, "cluster", order) * 127
    for label in np.unique(order.cluster):
        where = order.cluster == label
        np.testing.assert_allclose(scale[:192][where], sizes[:192][where].max(), rtol=1e-6)
    np.testing.assert_allclose(scale[192:], group[192:], rtol=1e-6)
    with pytest.raises(UserError, match="Mamba-2"):
        scan_scales(np.ones(64), tiny_spec("mamba1"), "cluster")


@pytest.mark.parametrize("kind", ["tensor", "group", "cluster", "channel"])
@pytest.mark.parametrize("name", ["two-groups", "mamba1", "untied"])
def test_engines_round_what_the_file_says(name: str, kind: str, tmp_path: Path) -> None:
    teacher = model(name)
    chosen = recipe(mode="w8a8", ssm_inputs=kind, clusters=2, input_scale="static", percentile=0.999)
    if name == "mamba1" and kind in ("group", "cluster"):
        with pytest.raises(UserError, match="Mamba-2"):
            quantised(teacher, chosen, windows_of(name), CPU)
        return
    made, _ = quantised(teacher, chosen, windows_of(name), CPU)
    packed = read_packed(write_packed(made, tmp_path / "packed"))
    assert packed.numerics["ssm_inputs"] == "int8"
    assert inventory_of(packed).file_bytes == (tmp_path / "packed" / "model.safetensors").stat().st_size
    got = [e.forward(IDS, e.new_state(3)) for e in (ReferenceEngine(packed), CpuEngine(packed, threads=1))]  # type: ignore
    floats = [
        e.forward(IDS, e.new_state(3))  # type: ignore
        for e in (ReferenceEngine(packed, activations="float32"), CpuEngine(packed, threads=1, activations="float32"))
    ]
    np.testing.assert_allclose(floats[0], floats[1], atol=2e-5)
    want = float_logits(teacher)
    np.testing.assert_allclose(got[0], got[1], atol=0.1 * np.abs(want).max())
    assert np.isclose(got[0], got[1], rtol=0, atol=2e-5).mean() > 0.2
    assert np.abs(got[0] - floats[0]).max() > 1e-4
    assert np.square(got[0] - want).mean() < 0.01 * np.square(want).mean()
    again = cast(packed, "float32")  # a float model has no scales of x, B and C
    assert "ssm_inputs" not in again.numerics and write_packed(again, tmp_path / "floats")


def uneven(teacher: Checkpoint) -> Checkpoint:
    """Channels of x of very different sizes in every head, made good by the scan's linearity: out_proj divides."""
    tensors = {k: np.array(v) for k, v in teacher.tensors.items()}
    size = np.exp(np.random.default_rng(5).uniform(-3, 3, teacher.spec.d_inner)).astype(np.float32)
    for i in range(teacher.spec.n_layer):
        at = f"backbone.layers.{i}.mixer."
        tensors[at + "conv1d.weight"][: teacher.spec.d_inner] *= size[:, None, None]
        tensors[at + "conv1d.bias"][: teacher.spec.d_inner] *= size
    return dataclasses.replace(teacher, tensors=tensors)


def test_finer_scales_are_better() -> None:
    teacher = uneven(tiny_checkpoint("mamba2", n_groups=2, d_inner=96, headdim=12, norm_group_size=96))

    def kl(kind: str) -> float:
        chosen: Any = recipe(mode="w8a8", ssm_inputs=kind)
        return float(quantised(teacher, chosen, windows_of("", 40), CPU)[1]["kl"])

    floats, tensor, group, cluster, channel = (kl(k) for k in ("float32", "tensor", "group", "cluster", "channel"))
    assert group < tensor and cluster < 0.5 * group and channel < 0.6 * group
    assert floats < 0.5 * min(cluster, channel)
