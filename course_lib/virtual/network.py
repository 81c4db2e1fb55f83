"""What joins machines: network cards, as data, and which GPU uses which of them.

A *node* is a machine with some GPUs in it. Inside, GPUs send over their own links (NVLink, or
PCIe); to another node they send through a network card of theirs to one of the other node's. Cards
are few: a node may have one for each GPU, or one for all, and what shares a card takes turns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real

WITHIN, NETWORK = "within a node", "network"  # the links between GPUs


def is_finite(number: object) -> bool:
    """Whether it is a number, and neither infinite nor NaN nor a truth value."""
    return isinstance(number, Real) and not isinstance(number, bool) and math.isfinite(number)


@dataclass(frozen=True)
class Network:
    """Network cards, all alike. Divide it as a Spec is divided: ``INFINIBAND / 1000``.

    Attributes:
        name: what to call it, for example ``"InfiniBand HDR"``.
        bandwidth: bytes a second of one card, in one direction.
        cards: how many a node has; 0 stands for one a GPU.
        latency: seconds from the start of a copy until its first byte arrives.
        source: where the numbers come from.

    Raises:
        ValueError: ``bandwidth`` is not finite and above zero, ``latency`` is below zero, or
            ``cards`` is not a whole number from 0 on.
    """

    name: str
    bandwidth: float
    source: str
    cards: int = 0
    latency: float = 5e-6

    def __post_init__(self) -> None:
        if not (is_finite(self.bandwidth) and self.bandwidth > 0):
            raise ValueError(
                f"bandwidth of a Network is a finite number above 0, not {self.bandwidth!r}"
            )
        if not (is_finite(self.latency) and self.latency >= 0):
            raise ValueError(
                f"latency of a Network is a finite number, 0 or above, not {self.latency!r}"
            )
        if isinstance(self.cards, bool) or not isinstance(self.cards, int) or self.cards < 0:
            raise ValueError(f"cards of a Network is a whole number from 0 on, not {self.cards!r}")

    def __truediv__(self, factor: float) -> Network:
        """A network ``factor`` times slower; its latency stays."""
        if not (is_finite(factor) and factor > 0):
            raise ValueError(f"a Network can only be divided by a positive number, not by {factor}")
        return replace(self, name=f"{self.name} / {factor:g}", bandwidth=self.bandwidth / factor)


# Latency is in no data sheet. Between nodes NCCL's own tuner counts 2.7 us for its quickest way of
# sending and 14 us for the one that it uses for large messages, where it counts 0.5 and 3.4 us over
# NVLink (hwLat in src/graph/tuning.cc of github.com/NVIDIA/nccl): 5 us is an estimate in between,
# twice a Spec's 2.5 us. For Ethernet without RDMA, through the kernel of the host, 25 us is one.

INFINIBAND_HDR = Network(
    name="InfiniBand HDR",
    bandwidth=200e9 / 8,
    source="NVIDIA DGX A100 data sheet: 8 single-port ConnectX-6 cards of 200 Gb/s for 8 GPUs",
)
INFINIBAND_NDR = Network(
    name="InfiniBand NDR",
    bandwidth=400e9 / 8,
    source="NVIDIA DGX H100 data sheet: ConnectX-7 cards of 400 Gb/s, one a GPU",
)
ETHERNET = Network(
    name="100 Gb/s Ethernet",
    bandwidth=100e9 / 8,
    cards=1,
    latency=25e-6,
    source="one card of 100 Gb/s a node, the rate in its name",
)


@dataclass(frozen=True)
class Nodes:
    """Which node each GPU is in: the first ones in node 0, as many in the next, and so on.

    Attributes:
        count: how many nodes.
        size: GPUs in each.
        cards: network cards of each.
    """

    count: int
    size: int
    cards: int

    @classmethod
    def of(cls, device_count: int, count: int, network: Network) -> Nodes:
        """``count`` nodes with the same number of GPUs each.

        Raises:
            ValueError: the GPUs do not divide among the nodes, or there are more cards in a node
                than GPUs.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"nodes is a whole number from 1 on, not {count!r}")
        if device_count % count:
            raise ValueError(f"{device_count} GPUs do not divide among {count} nodes")
        size = device_count // count
        if count > 1 and network.cards > size:
            raise ValueError(
                f"a node of {size} GPU{'s' if size > 1 else ''} has no use for {network.cards} "
                f"network cards: take network.cards=0, which is one a GPU"
            )
        return cls(count, size, network.cards or size)

    def node_of(self, device: int) -> int:
        """The node that GPU ``device`` is in."""
        return device // self.size if self.size else 0

    def card_of(self, device: int) -> int:
        """The card that it sends and receives through, counted over all nodes."""
        place = device % self.size
        return self.node_of(device) * self.cards + place * self.cards // self.size

    def network_joins(self, source: int, destination: int) -> bool:
        """Whether what the one sends to the other crosses the network."""
        return self.count > 1 and self.node_of(source) != self.node_of(destination)


ONE_NODE = Nodes(count=1, size=0, cards=0)  # however many GPUs there are
