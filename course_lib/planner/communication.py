"""What is sent in a step, over which link, and how long it takes.

A ring collective over n GPUs sends a part (n - 1) / n of the bytes, twice for an all-reduce, and
waits for every hop. Bytes are those that one GPU sends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from course_lib.planner.clusters import Cluster
from course_lib.planner.constants import Constants
from course_lib.planner.layouts import Layout
from course_lib.planner.memory import Shares
from course_lib.planner.models import Model


@dataclass(frozen=True)
class Collective:
    """One kind of message, as often as it is sent in a step.

    Attributes:
        name: what travels.
        link: over what: ``"NVLink"`` or ``"network"``.
        count: how often in a step, on one GPU.
        bytes: sent by one GPU each time.
        seconds: each time.
    """

    name: str
    link: str
    count: float
    bytes: float
    seconds: float

    @property
    def total(self) -> float:
        """Seconds in a step, hidden or not."""
        return self.count * self.seconds


class Network:
    """Times of collectives on a cluster."""

    def __init__(self, cluster: Cluster, constants: Constants) -> None:
        self.cluster, self.constants = cluster, constants

    def ring(
        self, name: str, size: float, members: int, stride: int, rounds: int, count: float
    ) -> Collective:
        """A ring over ``members`` GPUs, each ``stride`` apart, with a tensor of ``size`` bytes.

        Args:
            rounds: 1 for all-gather, reduce-scatter and all-to-all, 2 for all-reduce.
        """
        sent = rounds * size * (members - 1) / members
        link = self.cluster.link(members, stride)
        between = rounds * (link.nodes - 1) if link.nodes > 1 else 0
        within = rounds * (members - 1) - between
        seconds = sent / self._rate(link.name, link.bandwidth) + self._waits(within, between)
        return Collective(name, link.name, count, sent, seconds)

    def copy(self, name: str, size: float, stride: int, count: float) -> Collective:
        """A copy from one GPU to another, ``stride`` GPUs further."""
        near = 2 * stride <= self.cluster.node_size
        link = "NVLink" if near else "network"
        bandwidth = self.cluster.gpu.link_bandwidth if near else self.cluster.network
        seconds = size / self._rate(link, bandwidth) + self._waits(int(near), int(not near))
        return Collective(name, link, count, size, seconds)

    def of_states(self, layout: Layout) -> Network:
        """The same links, as fast as they are for what replicas send of their sharded state."""
        if layout.libraries != "2021":
            return self
        part = self.constants.network_part * self.constants.exchange_2021
        return Network(self.cluster, replace(self.constants, network_part=part))

    def _rate(self, link: str, bandwidth: float) -> float:
        constants = self.constants
        return bandwidth * (constants.nvlink_part if link == "NVLink" else constants.network_part)

    def _waits(self, within: int, between: int) -> float:
        constants = self.constants
        return (
            constants.nvlink_base
            + within * constants.nvlink_hop
            + (between * constants.network_hop)
        )


def layer_collectives(
    model: Model, layout: Layout, network: Network, backward: bool = False
) -> list[Collective]:
    """What one layer sends in one pass of one microbatch, besides parameters.

    The counts are those of a forward pass. A backward pass sends as much; but under context
    parallelism keys and values go round once more, and their gradients as well (lesson 07).
    """
    activations = layout.tokens * model.hidden * 2.0
    found = []
    if layout.tensor > 1:
        # With sequence parallelism an all-gather and a reduce-scatter, which send as much.
        found.append(network.ring("tensor", activations, layout.tensor, 1, 2, 2.0))
    if layout.context > 1:
        width = 2 * max(model.kv_heads / layout.tensor, 1) * model.head_size
        keys = layout.tokens * layout.context * width * 2.0
        rounds = 2.0 if backward else 1.0
        found.append(network.ring("context", keys, layout.context, layout.tensor, 1, rounds))
    if layout.expert > 1:
        stride = layout.tensor * layout.context
        routed = activations * model.active / (layout.tensor if layout.sequence_parallel else 1)
        found.append(network.ring("expert", routed, layout.expert, stride, 1, 2.0))
    return found


def end_collectives(model: Model, layout: Layout, network: Network) -> list[Collective]:
    """What embedding, head and loss send over tensor-parallel GPUs for one microbatch.

    The embedding's rows are summed forward and the head's gradients backward, or scattered and
    gathered (arXiv:1909.08053, section 3). The loss sums two numbers a token, and gathers one. In
    a pipeline these are the last stage's, which has no embedding.
    """
    if layout.tensor == 1:
        return []
    sums = 2.0 if layout.pipeline == 1 else 1.0
    activations, number = layout.tokens * model.hidden * 2.0, layout.tokens * 4.0
    return [
        network.ring("embedding and head", activations, layout.tensor, 1, 2, sums),
        network.ring("loss", 2 * number, layout.tensor, 1, 2, 1.0),
        network.ring("loss", number * layout.tensor, layout.tensor, 1, 1, 1.0),
    ]


def shared_collectives(layout: Layout, network: Network, shares: Shares) -> list[Collective]:
    """What sequence parallelism sums once a step: gradients of what all its GPUs have alike.

    Norms, biases of the products that end a region, learned positions: each GPU has the gradient of
    its own tokens alone (arXiv:2205.05198, section 4.2.2).
    """
    if not layout.sequence_parallel:
        return []
    size = shares.alike * (4.0 if layout.float32_gradients else 2.0)
    return [network.ring("shared gradients", size, layout.tensor, 1, 2, 1.0)]


def together(collectives: list[Collective]) -> list[Collective]:
    """The same, with those of one kind as one that is sent more often."""
    found: dict[tuple[str, float], Collective] = {}
    for each in collectives:
        key = each.name, each.bytes
        count = each.count + (found[key].count if key in found else 0.0)
        found[key] = replace(each, count=count)
    return list(found.values())


def stage_sends(model: Model, layout: Layout, network: Network) -> list[Collective]:
    """Activations to the next stage, once for a microbatch and a virtual stage, one way.

    Sent in parts, they are put together again by an all-gather, unless sequence parallelism wants
    no more than a part anyway.
    """
    if layout.pipeline == 1:
        return []
    whole = layout.tokens * model.hidden * 2.0
    in_parts = layout.scattered_sends and layout.tensor > 1
    stride = layout.tensor * layout.context * layout.data
    part = whole / layout.tensor if in_parts else whole
    sends = [network.copy("pipeline", part, stride, 1.0)]
    if in_parts and not layout.sequence_parallel:
        sends.append(network.ring("put together", whole, layout.tensor, 1, 1, 1.0))
    return sends


def state_collectives(layout: Layout, network: Network, shares: Shares) -> list[Collective]:
    """What the replicas send in a step: gradients, and parameters where they are sharded.

    Experts that are split are on fewer GPUs: those that have the same ones exchange them.
    """
    stride, members = layout.tensor, layout.data * layout.context
    dense = replace(shares, parameters=shares.parameters - shares.experts)
    found = _exchange(layout, network, dense, members, layout.shards, stride)
    if shares.experts:
        own, fewer = replace(shares, parameters=shares.experts), members // layout.expert
        of_experts = _exchange(
            layout, network, own, fewer, layout.expert_shards, stride * layout.expert
        )
        found += [replace(each, name="experts' " + each.name) for each in of_experts]
    return found


def _exchange(
    layout: Layout, network: Network, shares: Shares, members: int, shards: int, stride: int
) -> list[Collective]:
    """The same for parameters that ``members`` GPUs have, ``stride`` apart."""
    if members == 1:
        return []
    gradients = shares.parameters * (4.0 if layout.float32_gradients else 2.0)
    weights = shares.parameters * 2.0
    if not layout.sharded:
        return [network.ring("gradients", gradients, members, stride, 2, 1.0)]
    rounds = float(layout.rounds)
    network = network.of_states(layout)
    if layout.sharded < 3:
        scatters = rounds if layout.sharded == 2 else 1.0
        found = [
            network.ring("gradients", gradients, shards, stride, 1, scatters),
            network.ring("parameters", weights, shards, stride, 1, 1.0),
        ]
    else:
        # A unit is a layer.
        units = max(shares.layers, 1)
        passes = 2.0 if layout.pipeline == 1 else 1.0
        gather, scatter = weights / units, gradients / units
        found = [
            network.ring("parameters", gather, shards, stride, 1, passes * rounds * units),
            network.ring("gradients", scatter, shards, stride, 1, rounds * units),
        ]
    copies = members // shards
    if copies > 1:
        part = gradients / shards
        found.append(network.ring("replicas", part, copies, stride * shards, 2, rounds))
    return found
