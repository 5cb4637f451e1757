"""What data-parallel training costs beyond one GPU's work, from published figures: nothing here was fitted to a measured scaling.

Times in seconds, sizes in bytes, bandwidths in bytes/s. On n ranks, of which `ranks_per_node` share a machine, an all-reduce of
S bytes costs the least of what NCCL's protocols cost (NCCL's tuning model, src/graph/tuning.cc, chooses so too):

    ring  start + 2 (n - nodes) hop + 2 nodes net_hop + 2 (n - 1) / n S / B      Patarasuk and Yuan 2009, section 3
    tree  start + 2 ((ranks_per_node - 1) hop + log2(nodes) net_hop) + 2 S / B   Thakur et al. 2005; Sanders et al. 2009

and an all-gather of S bytes a rank, which NCCL makes with rings only, start + (n - nodes) hop + (nodes - 1) net_hop + (n - 1) S / B.
B is the protocol's share of the bus, which is the slower of NVLink and, between nodes, all of a node's network cards together.

A step of weak scaling: work * (1 + s E_n) + batch norm + loss + flag + buffers + exposed gradients, where

    exposed gradients = last bucket + max(0, the other buckets - overlap * backward),  backward = 2/3 of the work

(Li et al. 2020, PyTorch Distributed: buckets of 25 MiB, the first of 1 MiB, are reduced while the backward pass goes on), and
s E_n is how much slower the slowest of n GPUs is: E_n the expected maximum of n normal deviates (Blom 1958), s their spread.
The host is not in it: data loading, kernel launches, torch's waits for the device in each synchronised batch norm. It shows: NVIDIA's
README of 2021 has 5.87 to 6.81 of 8 for mixed precision where this says 7.8, and the steps of 2022 lose about 2 ms whatever their batch,
where this says 2 %: the prediction is nearly flat, and does not follow the published trend with the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # torch's DistributedDataParallel


@dataclass(frozen=True)
class Protocol:
    shape: str  # ring or tree
    start: float  # seconds before the first byte moves
    hop: float  # seconds a step inside a node
    net_hop: float  # seconds a step between nodes
    share: float  # of the bus's bandwidth


@dataclass(frozen=True)
class Fabric:
    """What joins the ranks."""

    ranks_per_node: int
    bandwidth: float  # of the bus inside a node, one direction
    net_bandwidth: float  # of a node's network, one direction
    protocols: tuple[Protocol, ...]
    spread: float  # standard deviation of the ranks' speeds over their mean
    overlap: float  # share of the backward pass in which gradients can be reduced

    def all_reduce(self, size: float, n: int) -> float:
        nodes = self._nodes(n)
        costs = []
        for p in self.protocols:
            if p.shape == "ring":
                between = 2 * nodes if nodes > 1 else 0
                hops, copies = (2 * (n - 1) - between) * p.hop + between * p.net_hop, 2 * (n - 1) / n
            else:
                local = min(n, self.ranks_per_node)
                hops, copies = 2 * ((local - 1) * p.hop + math.log2(nodes) * p.net_hop), 2
            costs.append(p.start + hops + copies * size / (p.share * self._bus(n)))
        return min(costs) if n > 1 else 0.0

    def all_gather(self, size: float, n: int) -> float:
        nodes, rings = self._nodes(n), [p for p in self.protocols if p.shape == "ring"]
        costs = (
            p.start + (n - nodes) * p.hop + (nodes - 1) * p.net_hop + (n - 1) * size / (p.share * self._bus(n))
            for p in rings
        )
        return min(costs) if n > 1 else 0.0

    def _nodes(self, n: int) -> int:
        return math.ceil(n / self.ranks_per_node)

    def _bus(self, n: int) -> float:
        return self.bandwidth if self._nodes(n) == 1 else min(self.bandwidth, self.net_bandwidth)


@dataclass(frozen=True)
class Work:
    """What one rank does in a step."""

    seconds: float
    gradients: float  # bytes
    norm_channels: Sequence[int] = ()  # of each batch norm that is synchronised
    buffers: float = 0.0  # bytes that DistributedDataParallel broadcasts before a forward pass
    sums: int = 0  # small collectives besides: the loss's sums, a flag


def step_seconds(work: Work, fabric: Fabric, n: int) -> float:
    """Seconds of a step on n ranks, each with the work of one."""
    if n == 1:
        return work.seconds
    norms = sum(fabric.all_gather(4 * (2 * c + 1), n) + fabric.all_reduce(4 * 2 * c, n) for c in work.norm_channels)
    others = work.sums * fabric.all_reduce(64, n) + (fabric.all_reduce(work.buffers, n) if work.buffers else 0)
    return work.seconds * slowest(n, fabric.spread) + norms + others + exposed_gradients(work, fabric, n)


def efficiency(work: Work, fabric: Fabric, n: int) -> float:
    """Throughput on n ranks over n times that of one."""
    return work.seconds / step_seconds(work, fabric, n)


def exposed_gradients(work: Work, fabric: Fabric, n: int) -> float:
    """Seconds that the step waits for gradients."""
    full, rest = divmod(max(0.0, work.gradients - FIRST_BUCKET), BUCKET)
    sizes = [min(work.gradients, FIRST_BUCKET), *[BUCKET] * int(full), *([rest] if rest else [])]
    *hidden, last = (fabric.all_reduce(size, n) for size in sizes)
    return last + max(0.0, sum(hidden) - fabric.overlap * work.seconds * 2 / 3)


def slowest(n: int, spread: float) -> float:
    """Time of the slowest of n over the mean."""
    return 1 + spread * NormalDist().inv_cdf((n - 0.375) / (n + 0.25))


# DGX A100. The bus: what NCCL's model allows compute capability 8.0 (235 GB/s, commit 01afd20; NVLink itself is 300). The network:
# eight cards of 200 Gbit/s (datasheet). Latencies: NCCL's tables (commit b647562), with NVLink and network hops. The spread: the 8 %
# of Sinha et al. 2022 (SC22) for GPUs of one kind, taken to lie between the whiskers of a box plot, 5.4 standard deviations apart.
# The overlap is assumed: the gradients of half of the backward pass come late enough to be worth nothing.
DGX_A100 = Fabric(
    ranks_per_node=8,
    bandwidth=235e9,
    net_bandwidth=8 * 200e9 / 8,
    protocols=(
        Protocol("ring", 6.6e-6, 0.6e-6, 2.7e-6, 1 / 4),  # LL
        Protocol("ring", 14.0e-6, 1.9e-6, 4.0e-6, 0.92),  # LL128
        Protocol("ring", 8.4e-6, 3.4e-6, 14.0e-6, 1.0),  # Simple
        Protocol("tree", 6.8e-6, 0.6e-6, 5.0e-6, 0.92 / 3.8),  # LL
        Protocol("tree", 14.0e-6, 1.25e-6, 8.5e-6, 0.92 * 15 / 16),  # LL128
    ),
    spread=0.08 / 5.396,
    overlap=0.5,
)
