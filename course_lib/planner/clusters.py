"""Clusters: GPUs, the nodes that they are in, and the links between them, as data with sources."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from course_lib import A100, GB200, H100, H200, Spec

FP8 = torch.float8_e4m3fn
_READ_ML_ENGINEERING = "stas00/ml-engineering@744d01e, compute/accelerator and network READMEs"


def _blackwell(name: str, dense_bf16: float, memory: float) -> Spec:
    """A GPU of the Blackwell generation: FP8 twice and FP4 four times the rate of bf16."""
    return Spec(
        name=name,
        flops={
            torch.float32: 80e12,
            torch.bfloat16: dense_bf16,
            torch.float16: dense_bf16,
            FP8: 2 * dense_bf16,
        },
        memory=memory,
        memory_bandwidth=8e12,
        link_bandwidth=900e9,
        host_bandwidth=64e9,
        source=f"{_READ_ML_ENGINEERING}: bf16 without sparsity, memory, NVLink one way",
    )


V100 = Spec(
    name="V100",
    flops={torch.float32: 15.7e12, torch.float16: 125e12, torch.bfloat16: 125e12},
    memory=32e9,
    memory_bandwidth=0.9e12,
    link_bandwidth=150e9,
    host_bandwidth=16e9,
    source="NVIDIA V100 data sheet, column SXM2 (recalled); it has no bf16: fp16's rate is meant",
)
A100_40GB = A100.with_(name="A100-40GB", memory=40e9, memory_bandwidth=1.555e12)
_FP8_HOPPER = {**H100.flops, FP8: 1979e12}
_HOPPER = H100.with_(name="H100", flops=_FP8_HOPPER)

# By the name that a person types.
GPUS: dict[str, Spec] = {
    "V100": V100,
    "A100": A100,
    "A100-40GB": A100_40GB,
    "H100": _HOPPER,
    # torchtitan's benchmarks: an H100 with HBM2e, limited to 500 W.
    "H100-96GB": _HOPPER.with_(name="H100-96GB", memory=96e9, memory_bandwidth=2.4e12),
    "H200": H200.with_(name="H200", flops=_FP8_HOPPER),
    "B200": _blackwell("B200", 2250e12, 180e9),
    "GB200": GB200.with_(name="GB200", flops={**GB200.flops, FP8: 5000e12}),
    "GB300": _blackwell("GB300", 2500e12, 288e9),
}

# Bytes a second that one GPU may send to other nodes, one way, by its usual network.
NETWORKS: dict[str, float] = {
    "V100": 100e9 / 8,
    "A100": 200e9 / 8,
    "H100": 400e9 / 8,
    "H200": 400e9 / 8,
    "B200": 400e9 / 8,
    "GB200": 400e9 / 8,
    "GB300": 800e9 / 8,
}


@dataclass(frozen=True)
class Link:
    """What carries a group's messages.

    Attributes:
        name: ``"NVLink"`` (within a node) or ``"network"`` (between nodes).
        bandwidth: bytes a second that a GPU of the group can send, one way, by the data sheet.
        nodes: nodes that the group spans.
    """

    name: str
    bandwidth: float
    nodes: int


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs in equal nodes.

    Attributes:
        gpu: what each can do.
        gpus: how many.
        node_size: GPUs that share a node (or another domain of fast links).
        network: bytes a second that one GPU may send to other nodes, one way; a node's whole
            bandwidth divided by its GPUs.
    """

    gpu: Spec
    gpus: int
    node_size: int = 8
    network: float = 0.0

    def __post_init__(self) -> None:
        for name in ("gpus", "node_size"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} of a cluster is a whole number above 0, not {number!r}")
        if not self.network:
            object.__setattr__(self, "network", NETWORKS[family(self.gpu)])
        if not self.network > 0:
            raise ValueError(f"network is in bytes a second, above 0, not {self.network!r}")

    def link(self, members: int, stride: int) -> Link:
        """What a group uses whose ``members`` are each ``stride`` GPUs apart.

        Members that share a node share its way out, so a group with k members a node sends k times
        as fast as a single GPU could, up to what NVLink carries.
        """
        if members * stride <= self.node_size:
            return Link("NVLink", self.gpu.link_bandwidth, 1)
        in_a_node = max(1, min(members, self.node_size // stride))
        rate = min(self.gpu.link_bandwidth, in_a_node * self.network)
        return Link("network", rate, -(-members // in_a_node))


def family(gpu: Spec) -> str:
    """The generation that a GPU belongs to, by its name: what was fitted for it holds."""
    for name in ("V100", "A100", "H100", "H200", "GB200", "GB300", "B200"):
        if gpu.name.startswith(name):
            return name
    return "A100"


def cluster(gpu: str, gpus: int, node_size: int = 8, network: float = 0.0) -> Cluster:
    """A cluster of a GPU of the catalogue.

    Raises:
        ValueError: there is no such GPU; names those that there are.
    """
    if gpu not in GPUS:
        raise ValueError(f"no GPU is called {gpu!r}: take one of {', '.join(GPUS)}")
    return Cluster(GPUS[gpu], gpus, node_size, network)
