"""What is sent in a step, over which link, and how long it takes.

A ring collective over n GPUs sends a part (n - 1) / n of the bytes, twice for an all-reduce, and
waits for every hop. Bytes are those that one GPU sends.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def layer_collectives(model: Model, layout: Layout, network: Network) -> list[Collective]:
    """What one layer sends in one forward pass of one microbatch, besides parameters.

    The count is that of a forward pass. A backward pass sends as much.
    """
    activations = layout.tokens * model.hidden * 2.0
    found = []
    if layout.tensor > 1:
        # With sequence parallelism an all-gather and a reduce-scatter, which send as much.
        found.append(network.ring("tensor", activations, layout.tensor, 1, 2, 2.0))
    if layout.context > 1:
        width = 2 * max(model.kv_heads / layout.tensor, 1) * model.head_size
        keys = layout.tokens * layout.context * width * 2.0
        found.append(network.ring("context", keys, layout.context, layout.tensor, 1, 1.0))
    if layout.expert > 1:
        stride = layout.tensor * layout.context
        routed = activations * model.active / (layout.tensor if layout.sequence_parallel else 1)
        found.append(network.ring("expert", routed, layout.expert, stride, 1, 2.0))
    return found


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


def state_collectives(
    model: Model, layout: Layout, network: Network, shares: Shares
) -> list[Collective]:
    """What the replicas send in a step: gradients, and parameters where they are sharded."""
    stride = layout.tensor
    members = layout.data * layout.context
    if members == 1:
        return []
    gradients = shares.parameters * (4.0 if layout.float32_gradients else 2.0)
    weights = shares.parameters * 2.0
    shards = layout.shards
    if not layout.sharded:
        return [network.ring("gradients", gradients, members, stride, 2, 1.0)]
    found = []
    if layout.sharded < 3:
        # Once a step, ZeRO-2's gradients too: as if each virtual stage took all its microbatches in
        # a row, which it does where there are no more of them than stages.
        found.append(network.ring("gradients", gradients, shards, stride, 1, 1.0))
        found.append(network.ring("parameters", weights, shards, stride, 1, 1.0))
    else:
        # A unit is a layer: gathered before each of its passes, its gradients scattered after.
        units = max(shares.layers, 1)
        passes = layout.microbatches if layout.pipeline == 1 else 1
        gather, scatter = weights / units, gradients / units
        found.append(network.ring("parameters", gather, shards, stride, 1, 2.0 * passes * units))
        found.append(network.ring("gradients", scatter, shards, stride, 1, 1.0 * passes * units))
    copies = members // shards
    if copies > 1:
        part = gradients / shards
        found.append(network.ring("replicas", part, copies, stride * shards, 2, 1.0))
    return found
