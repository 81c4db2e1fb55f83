"""A machine with nodes: what crosses the network, how long it takes, and who waits for a card."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch

import course_lib
from course_lib import ETHERNET, INFINIBAND_HDR, Network, Trace
from round_numbers import LATENCY, LAUNCH, SPEC, seconds

NETWORK_LATENCY = 0.5
SLOW = Network("slow", bandwidth=1e6, latency=NETWORK_LATENCY, source="round numbers")
CARD = NETWORK_LATENCY + 4e6 / 1e6  # seconds that 4 MB keep a card busy
LINK = LATENCY + 4e6 / 1e7


def four_megabytes_from(*pairs: tuple[int, int], cards: int = 0, nodes: int = 2) -> Trace:
    """Copies of 4 MB enqueued at nearly the same time, from device to device of four."""
    network = Network("slow", SLOW.bandwidth, SLOW.source, cards, NETWORK_LATENCY)
    gpus = course_lib.devices(4, SPEC.with_(network=network, launch_overhead=0.0), nodes=nodes)
    tensors = {source: torch.empty(1_000_000, device=gpus[source]) for source, _ in pairs}
    arrived = {pair: torch.empty(1_000_000, device=gpus[pair[1]]) for pair in pairs}
    with course_lib.trace() as recording:
        for source, destination in pairs:
            arrived[source, destination].copy_(tensors[source])
    return recording


def copies(recording: Trace) -> list[tuple[float, float]]:
    return [(span.start, span.end) for span in recording.spans if span.route is not None]


def test_inside_a_node_a_copy_takes_the_gpus_own_link():
    assert copies(four_megabytes_from((0, 1))) == [(0, seconds(LINK))]


def test_between_nodes_it_takes_the_network_and_its_latency():
    assert copies(four_megabytes_from((0, 2))) == [(0, seconds(CARD))]


def test_gpus_with_a_card_each_send_at_the_same_time():
    assert copies(four_megabytes_from((0, 2), (1, 3))) == [(0, seconds(CARD))] * 2


def test_two_gpus_that_share_a_card_take_turns_in_the_order_of_arrival():
    first, second = copies(four_megabytes_from((0, 2), (1, 3), cards=1))
    assert first == (0, seconds(CARD))
    assert second == (seconds(CARD), seconds(2 * CARD))


def test_a_card_sends_and_receives_at_once():
    assert copies(four_megabytes_from((0, 2), (3, 1), cards=1)) == [(0, seconds(CARD))] * 2


@pytest.mark.parametrize("flows", [1, 2, 3, 8])
@pytest.mark.parametrize("cards", [1, 2, 4, 8])
def test_n_flows_over_k_cards_take_n_over_k_turns(flows: int, cards: int):
    network = Network("slow", SLOW.bandwidth, SLOW.source, cards, NETWORK_LATENCY)
    gpus = course_lib.devices(16, SPEC.with_(network=network, launch_overhead=0.0), nodes=2)
    tensors = [torch.empty(1_000_000, device=gpu) for gpu in gpus]
    with course_lib.trace() as recording:
        for rank in range(flows):
            tensors[8 + rank].copy_(tensors[rank])
    sharing = 8 // cards  # neighbours share a card: flows 0 to 7 fill one card after the other
    assert recording.seconds == seconds(min(flows, sharing) * CARD)


def test_the_own_link_of_a_gpu_works_beside_its_card():
    gpus = course_lib.devices(4, SPEC.with_(network=SLOW), nodes=2)
    near, far = (torch.empty(1_000_000, device=gpus[rank]) for rank in (1, 2))
    source = torch.empty(1_000_000, device=gpus[0])
    side = course_lib.side_stream(gpus[0])
    with course_lib.trace() as recording:
        far.copy_(source)
        with side:
            near.copy_(source)
    assert recording.seconds == seconds(LAUNCH + CARD)


def test_a_flat_machine_never_uses_its_network():
    def program(network: Network) -> list[tuple[float, float]]:
        gpus = course_lib.devices(4, SPEC.with_(network=network))
        tensors = [torch.ones(1000, device=gpu) for gpu in gpus]
        with course_lib.trace() as recording:
            for tensor in tensors[1:]:
                tensor.copy_(tensors[0])
                tensor.mul_(2)
        return [(span.start, span.end) for span in recording.spans]

    assert program(SLOW) == program(INFINIBAND_HDR)


def test_the_trace_knows_which_link_a_copy_crossed():
    recording = four_megabytes_from((0, 1), (0, 2), (1, 3), (3, 2))
    assert recording.bytes_by_link == {"within a node": 8e6, "network": 8e6, "host": 0}
    assert sum(recording.bytes_by_link.values()) == sum(recording.bytes_moved.values())


def test_a_copy_from_the_host_crosses_no_network():
    gpus = course_lib.devices(4, nodes=4)
    with course_lib.trace() as recording:
        torch.ones(1000).to(gpus[3])
    assert recording.bytes_by_link == {"within a node": 0, "network": 0, "host": 4000}


def test_what_is_no_copy_crossed_no_link():
    gpus = course_lib.devices(2, nodes=2)
    with course_lib.trace() as recording:
        torch.ones(4, device=gpus[0]).mul_(2)
    with pytest.raises(ValueError, match="it is no copy"):
        recording.link_of(recording.spans[-1])


def test_links_can_be_drawn_as_rows():
    recording = four_megabytes_from((0, 1), (0, 2), (1, 3), cards=1)
    ax = recording.plot_links()
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert rows == ["vgpu:0 sends", "vgpu:1 receives", "node 0 card 0 sends",
                    "node 1 card 0 receives"]  # fmt: skip
    plt.close(ax.figure)


def test_devices_know_their_node():
    gpus = course_lib.devices(6, nodes=3)
    assert [course_lib.node_of(gpu) for gpu in gpus] == [0, 0, 1, 1, 2, 2]
    assert {course_lib.node_of(gpu) for gpu in course_lib.devices(6)} == {0}


def test_devices_say_what_joins_their_nodes(capsys: pytest.CaptureFixture[str]):
    course_lib.devices(8, nodes=2)
    assert "8 virtual GPUs in 2 nodes, joined by InfiniBand HDR / 1000:" in capsys.readouterr().out


def test_a_spec_is_divided_with_its_network():
    divided = (course_lib.A100.with_(network=ETHERNET) / 100).network
    assert divided.bandwidth == ETHERNET.bandwidth / 100
    assert (divided.latency, divided.cards) == (ETHERNET.latency, 1)


@pytest.mark.parametrize(
    "count, nodes, network, message",
    [
        (7, 2, INFINIBAND_HDR, "7 GPUs do not divide among 2 nodes"),
        (4, 0, INFINIBAND_HDR, "nodes is a whole number from 1 on, not 0"),
        (4, 2.0, INFINIBAND_HDR, "nodes is a whole number from 1 on, not 2.0"),
        (4, 4, Network("two", 1e9, "", cards=2), "a node of 1 GPU has no use for 2 network cards"),
    ],
)
def test_nodes_that_cannot_be_are_refused_in_one_line(
    count: int, nodes: int, network: Network, message: str
):
    with pytest.raises(ValueError, match=message):
        course_lib.devices(count, SPEC.with_(network=network), nodes=nodes)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"bandwidth": 0.0}, "bandwidth of a Network is a finite number above 0"),
        ({"latency": -1.0}, "latency of a Network is a finite number, 0 or above"),
        ({"bandwidth": "fast"}, "bandwidth of a Network is a finite number above 0, not 'fast'"),
        ({"cards": 1.5}, "cards of a Network is a whole number from 0 on"),
    ],
)
def test_networks_that_cannot_be_are_refused_in_one_line(values: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        Network(**{"name": "x", "bandwidth": 1e9, "source": "", **values})


@pytest.mark.parametrize("factor", [0, -1, "2"])
def test_a_network_is_divided_by_positive_numbers_alone(factor: object):
    with pytest.raises(ValueError, match="can only be divided by a positive number"):
        ETHERNET / factor
