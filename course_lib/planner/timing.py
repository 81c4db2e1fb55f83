"""Seconds of a step, by parts."""

from __future__ import annotations

from dataclasses import dataclass, field

from course_lib.planner.clusters import Cluster
from course_lib.planner.communication import (
    Collective,
    Network,
    end_collectives,
    layer_collectives,
    shared_collectives,
    stage_sends,
    state_collectives,
    together,
)
from course_lib.planner.constants import Constants
from course_lib.planner.layer_work import LayerTimes, Seconds
from course_lib.planner.layouts import Layout
from course_lib.planner.memory import stage_shares
from course_lib.planner.models import Model


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the slowest GPU; the parts add up to ``total``.

    Attributes:
        products: matrix products, of linear layers and of the head, recomputation included.
        attention: scores and their products with the values.
        others: all operations that are no products.
        host: a layer's fixed time, and what the GPU waits for a host that enqueues too slowly.
        collectives: each kind of message, with its link; some of it hidden.
        exposed: seconds in which a GPU does nothing but communicate.
        bubble: idle in the pipeline.
        optimizer: the update, and the fixed time of a step.
    """

    products: float
    attention: float
    others: float
    host: float
    exposed: float
    bubble: float
    optimizer: float
    collectives: list[Collective] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Seconds of the step."""
        computing = self.products + self.attention + self.others + self.host
        return computing + self.exposed + self.bubble + self.optimizer


def step_time(model: Model, cluster: Cluster, layout: Layout, constants: Constants) -> StepTime:
    """Seconds of one step."""
    times = LayerTimes(model, cluster.gpu, layout, constants)
    network = Network(cluster, constants)
    layers, count = layout.stage_layers(model.layers), layout.microbatches

    # One microbatch through a stage.
    forward, backward = times.forward(), times.backward()
    again = times.again(forward)
    one_layer = forward + backward + again
    missing = layout.missing_layers(model.layers)
    work = _slowest_stage(one_layer, times.head(), layers, missing)
    passes = 4 if layout.recompute == "full" else 3
    fixed = constants.fixed_layer * passes * layers
    host = max(fixed, constants.host_layer * passes * layers - work.total)

    inner = layer_collectives(model, layout, network) * (2 if layout.recompute == "full" else 1)
    inner += layer_collectives(model, layout, network, backward=True)
    ends = end_collectives(model, layout, network)
    talk, at_ends = sum(each.total for each in inner) * layers, sum(each.total for each in ends)
    if layout.overlap_tensor:
        talk *= 1 - constants.hidden
    sent = stage_sends(model, layout, network)
    hop = 2 * layout.virtual_stages * sum(each.seconds for each in sent)
    # While a pipeline fills and empties, its other stages are what the slowest one waits for.
    usual = one_layer.total * layers + host + talk + hop
    bubble = idle(layout, usual, (forward * layers).total, (backward * layers).total)

    shares = stage_shares(model, layout, 0)
    states = state_collectives(layout, network, shares)
    states += shared_collectives(layout, network, shares)
    behind = work * count if layout.sharded == 3 else (backward + again) * layers
    if layout.sharded == 2:
        behind *= layout.rounds
    exposed = _exposed(states, behind.total, layout, constants)
    collectives = [_times(each, layers * count) for each in together(inner)]
    collectives += [_times(each, count) for each in ends] + states
    collectives += [_times(each, 2 * layout.virtual_stages * count) for each in sent]
    return StepTime(
        products=work.products * count,
        attention=work.scores * count,
        others=work.others * count,
        host=host * count,
        exposed=(talk + at_ends + hop) * count + exposed,
        bubble=bubble,
        optimizer=_update(model, cluster, layout, times) + constants.step,
        collectives=collectives,
    )


def _slowest_stage(one_layer: Seconds, head: Seconds, layers: int, missing: int) -> Seconds:
    """The last stage, which has the head; where it goes without a layer, the longer of the two."""
    if not missing:
        return one_layer * layers + head
    return one_layer * layers if head.total < one_layer.total else one_layer * (layers - 1) + head


def idle(layout: Layout, microbatch: float, forward: float, backward: float) -> float:
    """Seconds of a GPU's bubble, where one microbatch takes ``microbatch`` on its stage.

    ``p - 1`` microbatches, over the number of virtual stages (arXiv:2104.04473, section 2.2). ZB-1p
    leaves ``(p - 1) (F + B - W)``, where B and W are halves of the backward pass; ZB-2p next to
    nothing (arXiv:2401.10241, table 1).
    """
    waits = layout.pipeline - 1
    if layout.schedule == "ZB-2p":
        return 0.0
    if layout.schedule == "ZB-1p":
        return waits * forward * microbatch / (forward + backward)
    return waits * microbatch / layout.virtual_stages


def _update(model: Model, cluster: Cluster, layout: Layout, times: LayerTimes) -> float:
    """Seconds of Adam's update: it reads gradient, weight and two averages, and writes three."""
    owned = stage_shares(model, layout, 0).owned(layout)
    return times.moving(owned * (4 * 4 + 3 * 4 + 2))


def _exposed(
    states: list[Collective], behind: float, layout: Layout, constants: Constants
) -> float:
    """What computing does not hide of gradients and parameters on their way."""
    talk = sum(collective.total for collective in states)
    if not layout.overlap:
        return talk
    return max(talk * (1 - constants.hidden), talk - behind)


def _times(collective: Collective, factor: float) -> Collective:
    return Collective(
        collective.name,
        collective.link,
        collective.count * factor,
        collective.bytes,
        collective.seconds,
    )
