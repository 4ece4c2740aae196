"""Cost model of collectives on a torus: the mesh axes they join, the links they use, the seconds they take.

Follows the scaling book (jax-ml.github.io/scaling-book/sharding). Data flow both ways along an axis that
wraps around, and one way along one that does not. Latency is one hop time for every hop of the longest route.
Groups that take every k-th chip of an axis share its links with k - 1 other groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxseek.hardware import HOP_SECONDS, Topology
from jaxseek.lab.hlo import Op

Coords = tuple[tuple[int, ...], ...]  # torus coordinates of every partition, in mesh order


@dataclass(frozen=True)
class Cost:
    """Seconds of one execution of a collective: at link bandwidth, and of latency."""

    bandwidth: float
    latency: float

    @property
    def seconds(self) -> float:
        return self.bandwidth + self.latency


def mesh_axes(groups: tuple[tuple[int, ...], ...], sizes: tuple[tuple[str, int], ...]) -> str:
    """Name the mesh axes that groups of partitions (or pairs) join, such as "expert+tensor", or "?"."""
    names = [a for a, n in sizes if n > 1]
    dims = [n for _, n in sizes if n > 1]
    if not groups:
        return "+".join(names)

    def index(p: int) -> tuple[int, ...]:
        return tuple(p // math.prod(dims[i + 1 :]) % dims[i] for i in range(len(dims)))

    varying = {i for g in groups for p in g for i, (a, b) in enumerate(zip(index(g[0]), index(p))) if a != b}
    whole = len(groups[0]) == math.prod(dims[i] for i in varying)
    pairs = all(len(g) == 2 for g in groups)
    return "+".join(names[i] for i in sorted(varying)) if whole or pairs else "?"


def cost(op: Op, topology: Topology, coords: Coords) -> Cost:
    """Return the cost of one execution of a collective; `op.bytes` is the operand size on one device."""
    everyone = (tuple(range(len(coords))),)
    group = (op.groups or everyone)[0]
    n, link = len(group), topology.chip.link_bandwidth
    if op.opcode in ("collective-permute", "collective-broadcast"):
        ways = [_distance(coords[g[0]], coords[p], topology) for g in op.groups for p in g[1:]]
        hops = max(1, *ways, 0)
        return Cost(op.bytes / link * hops, hops * HOP_SECONDS)
    axes = _axes(group, topology, coords)
    if not axes:
        return Cost(0.0, 0.0)
    hops, share = sum(h for _, h in axes), (n - 1) / n
    speed = link * sum(ways for ways, _ in axes)
    latency = hops * HOP_SECONDS
    if op.opcode == "all-gather":
        return Cost(op.bytes * n * share / speed, latency)
    if op.opcode == "reduce-scatter":
        return Cost(op.bytes * share / speed, latency)
    if op.opcode == "all-reduce":
        two = Cost(2 * op.bytes * share / speed, 2 * latency)
        one = Cost(op.bytes * (n - 1) / speed, latency)  # every operand is passed round the whole ring
        return min(two, one, key=lambda c: c.seconds)
    # all-to-all: the middle links of the longest axis limit it, by a quarter of the axis's length
    return Cost(op.bytes * max(1.0, max(h for _, h in axes) / 4) / link, latency)


def _axes(group: tuple[int, ...], topology: Topology, coords: Coords) -> list[tuple[float, int]]:
    """Return (links that a member can send on, hops of the longest route) for each torus axis spanned."""
    found = []
    for axis, size in enumerate(topology.dims):
        at = sorted({coords[p][axis] for p in group})
        if len(at) < 2:
            continue
        span = at[-1] - at[0] + 1
        ring = topology.wraps(axis) and span + at[1] - at[0] > size
        ways = (2 if ring else 1) * len(at) / span  # interleaved groups use the same links
        found.append((ways, span // 2 if ring else span - 1))
    return found


def _distance(a: tuple[int, ...], b: tuple[int, ...], topology: Topology) -> int:
    hops = 0
    for axis, size in enumerate(topology.dims):
        way = abs(a[axis] - b[axis])
        hops += min(way, size - way) if topology.wraps(axis) else way
    return hops
