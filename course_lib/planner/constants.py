"""The planner's constants: what no data sheet says, fitted on published runs.

``constants.json`` holds their values. ``python -m course_lib.planner.fit`` writes it; nobody else.
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from course_lib import Spec
from course_lib.planner.clusters import family

FILE = Path(__file__).with_name("constants.json")


@dataclass(frozen=True)
class Constants:
    """One number each, with one meaning each.

    Attributes:
        product_a100: part of an A100's peak that a large matrix product reaches.
        product_a100_2021: the same with libraries of 2021 and earlier, and on V100s.
        product_h100: part of an H100's peak (its power limit is what lowers it).
        product_h100_500w: part of an H100's peak where it is limited to 500 W.
        product_b200: part of a B200's or GB200's peak.
        product_b300: part of a GB300's peak.
        fp8_gain: part of fp8's doubled rate that a product gains over bf16 (1: twice as fast).
        wave: part of a wave of tiles (one for each multiprocessor) that a product loses at its
            end.
        product_traffic: part of the operands' memory traffic that a product does not hide.
        attention_a100: part of an A100's peak that flash attention reaches.
        flash1_h100: part of an H100's peak that flash attention's first version reaches.
        flash2_h100: the same for its second version, PyTorch's.
        flash3_h100: the same, on later GPUs as well, for the third version, and cuDNN's.
        scores_traffic: memory traffic of unfused attention over what its operations must move.
        eager_traffic: memory traffic of all other operations in PyTorch's eager mode, over what
            they must move.
        fused_traffic: the same, fused by hand.
        compiled_traffic: the same, compiled.
        host_layer: seconds that the host takes to enqueue one layer's forward pass.
        fixed_layer: seconds that a pass through a layer takes on the GPU beside its work, however
            little that is: starts and ends of its kernels.
        step: seconds that a step takes beside its microbatches and its optimizer's traffic.
        nvlink_part: part of NVLink's bandwidth that a large collective reaches.
        nvlink_base: seconds before a collective within a node moves its first byte.
        nvlink_hop: seconds for each of a ring's hops within a node.
        network_part: part of the network's bandwidth that a large collective reaches.
        network_hop: seconds for each of a ring's hops between nodes.
        exchange_2021: part of that which is left for gradients and weights of a sharded state, with
            libraries of 2021 (DeepSpeed's ZeRO-1).
        hidden: part of the overlapped communication that is hidden, where there is enough to hide
            it behind.
        outside: bytes of a GPU that PyTorch's allocator knows nothing of: CUDA, NCCL, workspaces.
        fragments: memory that the allocator holds for activations and gathered weights, over the
            bytes that these have.
    """

    product_a100: float
    product_a100_2021: float
    product_h100: float
    product_h100_500w: float
    product_b200: float
    product_b300: float
    fp8_gain: float
    wave: float
    product_traffic: float
    attention_a100: float
    flash1_h100: float
    flash2_h100: float
    flash3_h100: float
    scores_traffic: float
    eager_traffic: float
    fused_traffic: float
    compiled_traffic: float
    host_layer: float
    fixed_layer: float
    step: float
    nvlink_part: float
    nvlink_base: float
    nvlink_hop: float
    network_part: float
    network_hop: float
    exchange_2021: float
    hidden: float
    outside: float
    fragments: float

    def product_part(self, gpu: Spec, libraries: str) -> float:
        """Part of the peak that a large product reaches on ``gpu``."""
        if gpu.name.startswith("H100-96GB"):
            return self.product_h100_500w
        a100 = self.product_a100 if libraries == "2023" else self.product_a100_2021
        return {
            "V100": self.product_a100_2021,
            "A100": a100,
            "H100": self.product_h100,
            "H200": self.product_h100,
            "GB300": self.product_b300,
        }.get(family(gpu), self.product_b200)

    def attention_part(self, gpu: Spec, kernel: str) -> float:
        """Part of the peak that flash attention reaches on ``gpu``."""
        if family(gpu) in ("A100", "V100"):
            return self.attention_a100
        return float(getattr(self, f"{kernel}_h100"))

    def traffic(self, kernels: str) -> float:
        """Traffic of all that is no product, over what it must move."""
        return float(getattr(self, f"{kernels}_traffic"))


@cache
def meanings() -> dict[str, str]:
    """What each constant means, in the words of :class:`Constants`."""
    words = inspect.getdoc(Constants) or ""
    listed = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", words, re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in listed}


@cache
def fitted() -> Constants:
    """The constants fitted on all rows."""
    return _constants(json.loads(FILE.read_text())["fitted"])


@cache
def held_out() -> dict[str, Constants]:
    """For each split, by its name, the constants fitted without its held-out rows."""
    splits = json.loads(FILE.read_text())["held_out"]
    return {name: _constants(values) for name, values in splits.items()}


def _constants(values: dict[str, float]) -> Constants:
    return Constants(**{field.name: values[field.name] for field in fields(Constants)})
