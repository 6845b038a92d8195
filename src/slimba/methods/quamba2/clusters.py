"""Scales of x, B and C between convolution and scan: sort-and-cluster (Quamba2, section 4.2) and its simpler relatives.

    order = cluster_order(sizes, spec, 4)         # Mamba-2: heads by cluster, channels by size; folded into the weights
    scale = scan_scales(sizes, spec, "cluster", order)

`sizes` [channels] is the largest |value| of every channel of the convolution's output on the calibration windows.
Heads of one group whose channels, sorted by size, look alike form a cluster (Ward); the ranks of a cluster are cut
into runs that share a scale, by dynamic programming instead of k-means: exact, and no run is empty. What is stored is
a scale a channel, so no engine needs to know of clusters; in the new order equal scales lie side by side. Legend: H
heads, P headdim, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slimba.errors import UserError
from slimba.models.spec import ModelSpec

__all__ = ["ClusterOrder", "cluster_order", "contiguous_parts", "scan_scales", "ward"]


@dataclass(frozen=True, slots=True)
class ClusterOrder:
    """channels int64 [I] and heads int64 [H]: new position -> old one; cluster int64 [I]: of every new channel."""

    channels: np.ndarray
    heads: np.ndarray
    cluster: np.ndarray


def cluster_order(sizes: np.ndarray, spec: ModelSpec, clusters: int) -> ClusterOrder:
    """At most `clusters` clusters of heads in a group and as many runs of channels in each. UserError for a Mamba-1."""
    _need_groups(spec, "cluster")
    per_group, p = spec.n_heads // spec.n_groups, spec.headdim
    table = sizes[: spec.d_inner].reshape(spec.n_heads, p)
    rank = np.argsort(table, axis=1, kind="stable")  # [H, P]: channels of a head, smallest first
    ordered = np.take_along_axis(table, rank, axis=1)
    heads, cluster, count = [], [], 0
    for group in range(spec.n_groups):
        first = group * per_group
        here = ordered[first : first + per_group]
        labels = ward(here / np.maximum(np.linalg.norm(here, axis=1, keepdims=True), 1e-30), clusters)
        for label in range(labels.max() + 1):
            members = np.flatnonzero(labels == label)
            part = contiguous_parts(here[members].max(axis=0), clusters)
            heads += (first + members).tolist()
            cluster += [part + count] * len(members)
            count += clusters
    chosen = np.array(heads)
    channels = (chosen[:, None] * p + rank[chosen]).reshape(-1)
    return ClusterOrder(channels, chosen, np.concatenate(cluster))


def _need_groups(spec: ModelSpec, kind: str) -> None:
    if spec.architecture != "mamba2":
        raise UserError(f"recipe: ssm_inputs {kind} is for Mamba-2; a Mamba-1 takes float32, tensor or channel")


def ward(points: np.ndarray, clusters: int) -> np.ndarray:
    """Agglomerative clustering by Ward's rule: points [n, d] -> labels 0.. [n], numbered by first member."""
    members = [[i] for i in range(len(points))]
    centres = [p.astype(np.float64) for p in points]
    while len(members) > clusters:
        best, pair = np.inf, (0, 1)
        for i in range(len(members)):
            for j in range(i + 1, len(members)):
                a, b = len(members[i]), len(members[j])
                cost = a * b / (a + b) * float(np.square(centres[i] - centres[j]).sum())  # growth of the squared error
                if cost < best:
                    best, pair = cost, (i, j)
        i, j = pair
        a, b = len(members[i]), len(members[j])
        centres[i] = (a * centres[i] + b * centres[j]) / (a + b)
        members[i] += members[j]
        del members[j], centres[j]
    labels = np.empty(len(points), np.int64)
    for label, group in enumerate(sorted(members, key=min)):
        labels[group] = label
    return labels


def contiguous_parts(sizes: np.ndarray, parts: int) -> np.ndarray:
    """Ascending sizes [n] -> labels [n] of at most `parts` runs with the least sum of squared steps.

    A run's step is that of its largest member, so a run i..j costs (j - i) sizes[j - 1]^2.
    """
    n, square = len(sizes), np.square(sizes.astype(np.float64))
    parts = min(parts, n)
    cost = np.full((parts + 1, n + 1), np.inf)
    start = np.zeros((parts + 1, n + 1), np.int64)
    cost[0, 0] = 0
    for k in range(1, parts + 1):
        for j in range(k, n + 1):
            options = cost[k - 1, :j] + (j - np.arange(j)) * square[j - 1]
            start[k, j] = options.argmin()
            cost[k, j] = options[start[k, j]]
    labels, end = np.empty(n, np.int64), n
    for k in range(parts, 0, -1):
        labels[start[k, end] : end] = k - 1
        end = start[k, end]
    return labels


def scan_scales(
    sizes: np.ndarray, spec: ModelSpec, kind: str, order: ClusterOrder | None = None, x_size: float | None = None
) -> np.ndarray:
    """float32 [channels] in the model's (new) order; `x_size`: what a single scale of x covers, if not its maximum.

    UserError for `group` and `cluster` of a Mamba-1, whose B and C come from x_proj.
    """
    if kind in ("group", "cluster"):
        _need_groups(spec, kind)
    inner, out = spec.d_inner, sizes.astype(np.float64).copy()
    if kind != "channel":
        out[:inner] = sizes[:inner].max() if x_size is None else x_size
        if kind == "cluster":
            assert order is not None
            for label in np.unique(order.cluster):
                where = np.flatnonzero(order.cluster == label)
                out[where] = sizes[where].max()
        if len(out) > inner:  # B and C, of all groups or of each
            rest = out[inner:].reshape(2 if kind == "tensor" else 2 * spec.n_groups, -1)
            rest[:] = rest.max(axis=1, keepdims=True)
    return (np.maximum(out, 1e-20) / 127).astype(np.float32)
