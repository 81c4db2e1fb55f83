"""What a GPU can do: its speeds and its sizes, as data.

A *classroom GPU* is a real one divided by a constant. ``A100 / 1000`` computes, reads memory,
sends over its links and stores a thousandth of what an A100 does, so a model a thousand times
smaller meets the same bottlenecks in the same proportions. Latencies are not divided: a model
a thousand times smaller launches as many operations as a large one does, and each of them
takes as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Spec:
    """Speeds and sizes of one GPU.

    Attributes:
        name: what to call it, for example ``"A100"``.
        flops: peak floating-point operations a second of a matrix product, by dtype. A dtype
            that is not in it runs at the float32 rate.
        memory: bytes that it can hold.
        memory_bandwidth: bytes a second between its memory and its compute units.
        link_bandwidth: bytes a second to another GPU, in one direction.
        host_bandwidth: bytes a second to or from the host, in one direction.
        latency: seconds from the start of a copy until its first byte arrives.
        launch_overhead: seconds the host needs to enqueue one operation.
        source: where the numbers come from.
    """

    name: str
    flops: Mapping[torch.dtype, float]
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    host_bandwidth: float
    source: str
    latency: float = 2.5e-6
    launch_overhead: float = 5e-6

    def __truediv__(self, factor: float) -> Spec:
        """A GPU ``factor`` times smaller and slower; latencies stay."""
        if not factor > 0:
            raise ValueError(f"a GPU can only be divided by a positive number, not by {factor}")
        return replace(
            self,
            name=f"{self.name} / {factor:g}",
            flops={dtype: rate / factor for dtype, rate in self.flops.items()},
            memory=self.memory / factor,
            memory_bandwidth=self.memory_bandwidth / factor,
            link_bandwidth=self.link_bandwidth / factor,
            host_bandwidth=self.host_bandwidth / factor,
        )

    def with_(self, **changes: float) -> Spec:
        """The same GPU with some numbers changed, as in ``A100.with_(memory=40e9)``."""
        return replace(self, name=f"{self.name} (changed)", **changes)

    def peak_flops(self, dtype: torch.dtype) -> float:
        """Peak FLOP/s of a matrix product in ``dtype``."""
        return self.flops.get(dtype, self.flops[torch.float32])


# Latency and launch overhead are in no data sheet. 2.5 us and 5 us are what CUDA's
# p2pBandwidthLatencyTest and an empty PyTorch kernel launch commonly show.

A100 = Spec(
    name="A100",
    flops={
        torch.float64: 9.7e12,
        torch.float32: 19.5e12,
        torch.bfloat16: 312e12,
        torch.float16: 312e12,
    },
    memory=80e9,
    memory_bandwidth=2.039e12,
    link_bandwidth=300e9,
    host_bandwidth=32e9,
    source="NVIDIA A100 data sheet, SXM4 80 GB: NVLink 600 GB/s and PCIe 64 GB/s both ways",
)

H100 = Spec(
    name="H100",
    flops={
        torch.float64: 34e12,
        torch.float32: 67e12,
        torch.bfloat16: 989e12,
        torch.float16: 989e12,
    },
    memory=80e9,
    memory_bandwidth=3.35e12,
    link_bandwidth=450e9,
    host_bandwidth=64e9,
    source="NVIDIA H100 data sheet, SXM5, dense: NVLink 900 GB/s and PCIe 128 GB/s both ways",
)

H200 = replace(
    H100,
    name="H200",
    memory=141e9,
    memory_bandwidth=4.8e12,
    source="NVIDIA H200 data sheet, SXM, dense: NVLink 900 GB/s and PCIe 128 GB/s both ways",
)

LAPTOP = Spec(
    name="RTX 4060 Laptop",
    flops={
        torch.float64: 0.23e12,
        torch.float32: 14.6e12,
        torch.bfloat16: 29.1e12,
        torch.float16: 29.1e12,
    },
    memory=8e9,
    memory_bandwidth=256e9,
    link_bandwidth=16e9,
    host_bandwidth=16e9,
    source="NVIDIA specification page: 3072 cores at 2.37 GHz (FLOP/s = 2 x cores x clock, twice "
    "that on its tensor cores with float32 sums, a 64th in float64), 128-bit memory at 16 Gbit/s, "
    "PCIe 4 x8 and no NVLink",
)

CLASSROOM = A100 / 1000
