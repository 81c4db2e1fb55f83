"""What a GPU can do: its speeds and its sizes, as data.

A *classroom GPU* is a real one divided by a constant. ``A100 / 1000`` computes, reads memory,
sends over its links and stores a thousandth of what an A100 does, so a model a thousand times
smaller meets the same bottlenecks in the same proportions. Latencies are not divided: a model
a thousand times smaller launches as many operations as a large one does, and each of them
takes as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from course_lib.virtual.achieved import Achieved
from course_lib.virtual.network import INFINIBAND_HDR, INFINIBAND_NDR, Network, is_finite

DEVICE_TYPE = "vgpu"  # "vgpu:1" is to a virtual GPU what "cuda:1" is to a real one


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
        network: what joins its node to others, where there are some.
        source: where the numbers come from.
        achieved: what of its speeds measured training reaches, where that is known.

    Raises:
        ValueError: a number is not finite and above zero (the two latencies may be zero), or there
            is no rate for float32.
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
    network: Network = INFINIBAND_HDR
    achieved: Achieved | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.flops, Mapping) or torch.float32 not in self.flops:
            raise ValueError(
                "flops of a Spec are a rate for each dtype, torch.float32 at least, as in "
                f"{{torch.float32: 19.5e12}}: {self.flops!r}"
            )
        positive = {f"flops[{dtype}]": rate for dtype, rate in self.flops.items()}
        for name in ("memory", "memory_bandwidth", "link_bandwidth", "host_bandwidth"):
            positive[name] = getattr(self, name)
        for name, number in positive.items():
            if not (is_finite(number) and number > 0):
                raise ValueError(f"{name} of a Spec is a finite number above 0, not {number!r}")
        for name in ("latency", "launch_overhead"):
            number = getattr(self, name)
            if not (is_finite(number) and number >= 0):
                raise ValueError(f"{name} of a Spec is a finite number, 0 or above, not {number!r}")

    def __truediv__(self, factor: float) -> Spec:
        """A GPU ``factor`` times smaller and slower; latencies stay."""
        if not (is_finite(factor) and factor > 0):
            raise ValueError(f"a GPU can only be divided by a positive number, not by {factor}")
        return replace(
            self,
            name=f"{self.name} / {factor:g}",
            flops={dtype: rate / factor for dtype, rate in self.flops.items()},
            memory=self.memory / factor,
            memory_bandwidth=self.memory_bandwidth / factor,
            link_bandwidth=self.link_bandwidth / factor,
            host_bandwidth=self.host_bandwidth / factor,
            network=self.network / factor,
        )

    def with_(self, **changes: Any) -> Spec:
        """The same GPU with some fields changed, as in ``A100.with_(memory=40e9)``."""
        names = [field.name for field in fields(self)]
        if unknown := [name for name in changes if name not in names]:
            raise TypeError(f"a Spec has no {unknown[0]!r}; it has {', '.join(names)}")
        name = f"{self.name.removesuffix(' (changed)')} (changed)"
        return replace(self, **{"name": name, **changes})

    def achievable(self) -> Spec:
        """The GPU that training meets, instead of its data sheet's.

        Products, links and network are as fast as large ones are in published runs; a virtual GPU
        of this spec predicts a real step better. Memory's speed and the latencies stay.

        Raises:
            ValueError: nobody has fitted what it achieves, or this is what it achieves.
        """
        if self.achieved is None:
            raise ValueError(
                f"what a {self.name} achieves is not known: give it parts, as in "
                "spec.with_(achieved=course_lib.A100.achieved)"
            )
        parts = self.achieved
        return replace(
            self,
            name=f"{self.name} (achievable)",
            flops={dtype: rate * parts.product for dtype, rate in self.flops.items()},
            link_bandwidth=self.link_bandwidth * parts.link,
            network=replace(self.network, bandwidth=self.network.bandwidth * parts.network),
            source=f"{self.source}; parts of it as the planner's fit found them",
            achieved=None,
        )

    def peak_flops(self, dtype: torch.dtype) -> float:
        """Peak FLOP/s of a matrix product in ``dtype``."""
        return self.flops.get(dtype, self.flops[torch.float32])


# Latency and launch overhead are in no data sheet: the two defaults are estimates, in round
# numbers, for all of them.
#
# * latency, 2.5 us: NVIDIA's p2pBandwidthLatencyTest shows 1.8 to 2.3 us between GPUs with NVLink
#   (github.com/NVIDIA/cuda-samples, issue 230), for a tiny copy.
# * launch_overhead, 5 us: the few microseconds that PyTorch's eager mode needs at the least, from a
#   Python call to a launched kernel. An operator that records for autograd can need several times
#   that; so can a slow host.
#
# Of the peaks, a matrix product is meant: on tensor cores where the dtype has them, without
# sparsity, and float32 without TF32, as PyTorch's default is. NVIDIA states a link's two directions
# together; half of that is one.

A100 = Spec(
    name="A100",
    flops={
        torch.float64: 19.5e12,
        torch.float32: 19.5e12,
        torch.bfloat16: 312e12,
        torch.float16: 312e12,
    },
    memory=80e9,
    memory_bandwidth=2.039e12,
    link_bandwidth=300e9,
    host_bandwidth=32e9,
    achieved=Achieved(product=0.808),
    source="NVIDIA A100 Tensor Core GPU data sheet, column A100 80GB SXM: FP64 Tensor Core 19.5, "
    "FP32 19.5, BFLOAT16 and FP16 Tensor Core 312 TFLOPS; 80GB at 2,039 GB/s; NVLink 600 GB/s, "
    "PCIe Gen4 64 GB/s",
)

H100 = Spec(
    name="H100",
    flops={
        torch.float64: 67e12,
        torch.float32: 67e12,
        torch.bfloat16: 989e12,
        torch.float16: 989e12,
    },
    memory=80e9,
    memory_bandwidth=3.35e12,
    link_bandwidth=450e9,
    host_bandwidth=64e9,
    network=INFINIBAND_NDR,
    achieved=Achieved(product=0.6821),
    source="NVIDIA H100 Tensor Core GPU data sheet, column H100 SXM: FP64 Tensor Core 67, FP32 67, "
    "BFLOAT16 and FP16 Tensor Core 1,979 teraFLOPS with sparsity, half of it without; 80GB at "
    "3.35TB/s; NVLink 900GB/s, PCIe Gen5 128GB/s",
)

H200 = replace(
    H100,
    name="H200",
    memory=141e9,
    memory_bandwidth=4.8e12,
    source="NVIDIA H200 Tensor Core GPU data sheet, column H200 SXM: an H100 SXM with 141GB at "
    "4.8TB/s",
)

GB200 = Spec(
    name="GB200",
    flops={
        torch.float64: 40e12,
        torch.float32: 80e12,
        torch.bfloat16: 2500e12,
        torch.float16: 2500e12,
    },
    memory=186e9,
    memory_bandwidth=8e12,
    link_bandwidth=900e9,
    host_bandwidth=450e9,
    network=INFINIBAND_NDR,
    achieved=Achieved(product=0.5747),
    source="NVIDIA GB200 NVL72 data sheet, one GPU of 72 that NVLink joins: FP64 40, FP32 80, FP16 "
    "and BF16 5,000 TFLOPS with sparsity, half of it without; 186GB at 8TB/s; NVLink 1.8TB/s; to "
    "the Grace CPU 900GB/s, both directions together",
)

A100_PCIE = replace(
    A100,
    name="A100 PCIe",
    memory_bandwidth=1.935e12,
    link_bandwidth=32e9,
    achieved=None,  # its link is no NVLink, and its power limit is lower
    source="NVIDIA A100 Tensor Core GPU data sheet, column A100 80GB PCIe: an A100 with 1,935 "
    "GB/s, whose link to other GPUs is its PCIe Gen4, 64 GB/s (no NVLink bridge)",
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
    source="NVIDIA GeForce RTX 40 Series Laptops comparison, column RTX 4060: 3072 cores at up to "
    "2370 MHz, 8 GB on a 128-bit bus. From that, FLOP/s = 2 x cores x clock, twice as many on its "
    "tensor cores with float32 sums, a 64th in float64; GDDR6 at 16 Gbit/s a pin, PCIe 4 x8, no "
    "NVLink",
)

CLASSROOM = A100 / 1000
