"""FSDP2 of Llama 3 8B, real size, on eight GPUs that are not there.

    python examples/llama_8b_on_paper.py

Eight virtual H100s without numbers (``backing="meta"``) keep shapes, memory and time. PyTorch's
``fully_shard``, checkpointing and AdamW train the model on them for two steps, unmodified, as
torchtitan does it: a sequence of 8,192 tokens, two of them a GPU, parameters in bfloat16, sums of
gradients in float32. The second step's tokens a second and the peak memory stand beside what
torchtitan published.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import course_lib
from course_lib import H100, Spec, ranks
from course_lib.planner.rows import read

GPUS = 8
GIB = 2**30

# The card of torchtitan's runs, as its table says: 96 GB of slower memory.
CARD = H100.with_(memory=96e9, memory_bandwidth=2.4e12)


@dataclass(frozen=True)
class Sizes:
    """Of a Llama 3 and of its batch; those of 8 billion parameters, in torchtitan's runs."""

    layers: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    hidden: int = 14336
    vocabulary: int = 128256
    sequence: int = 8192
    batch: int = 2


class Result(NamedTuple):
    """Of the second step, on one GPU."""

    seconds: float
    peak_bytes: int
    parameters: int


def rotate(x_BTHK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021), in float32."""
    one, other = x_BTHK.float().chunk(2, dim=-1)
    cos, sin = cos_TK[:, None], sin_TK[:, None]
    turned = torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)
    return turned.to(x_BTHK.dtype)


class Attention(nn.Module):
    """Causal self-attention in which several heads share keys and values."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head_width = sizes.width // sizes.heads
        self.repeats = sizes.heads // sizes.kv_heads
        shared = sizes.kv_heads * self.head_width
        self.wq, self.wo = (nn.Linear(sizes.width, sizes.width, bias=False) for _ in range(2))
        self.wk, self.wv = (nn.Linear(sizes.width, shared, bias=False) for _ in range(2))

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (layer(x_BTD).view(B, T, -1, self.head_width) for layer in self.layers())
        q, k = rotate(q, cos_TK, sin_TK), rotate(k, cos_TK, sin_TK)
        k, v = (each.repeat_interleave(self.repeats, dim=2) for each in (k, v))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y_BHTK.transpose(1, 2).reshape(B, T, D))

    def layers(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.wq, self.wk, self.wv


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, hidden = sizes.width, sizes.hidden
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(sizes)
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.norm_1(x_BTD), cos_TK, sin_TK)
        h_BTD = self.norm_2(x_BTD)
        return x_BTD + self.down(F.silu(self.gate(h_BTD)) * self.up(h_BTD))


class Llama(nn.Module):
    def __init__(self, sizes: Sizes, keep: Callable | None) -> None:
        super().__init__()
        self.sizes, self.keep = sizes, keep
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList([Block(sizes) for _ in range(sizes.layers)])
        self.norm = nn.RMSNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        half = self.sizes.width // self.sizes.heads // 2
        angles = torch.empty(tokens_BT.shape[1], half, device=tokens_BT.device)
        cos_TK, sin_TK = angles.cos(), angles.sin()
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            options: Any = {} if self.keep is None else {"context_fn": self.keep}
            x_BTD = checkpoint(block, x_BTD, cos_TK, sin_TK, use_reentrant=False, **options)
        return self.head(self.norm(x_BTD))


def keep_every_other_product() -> tuple[Any, Any]:
    """torchtitan's selective recomputation: attention and every other product are kept."""
    counts = {True: 0, False: 0}

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = "scaled_dot_product" in str(operator)
        if operator == torch.ops.aten.mm.default:
            counts[context.is_recompute] += 1
            kept = counts[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


RECOMPUTATION = {"selective": keep_every_other_product, "full": None}


def train(sizes: Sizes, keep: Callable | None, steps: int = 2) -> Result:
    """What one rank does."""
    dist.init_process_group()
    with torch.device("meta"):
        model = Llama(sizes, keep)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.to_empty(device="vgpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens_BT = torch.empty(sizes.batch, sizes.sequence, dtype=torch.int64, device="vgpu")
    gpu: Any = torch.get_device_module("vgpu")
    moments = [gpu.Event(enable_timing=True) for _ in range(steps + 1)]
    moments[0].record()
    for moment in moments[1:]:
        optimizer.zero_grad()
        scores_BTV = model(tokens_BT)
        F.cross_entropy(scores_BTV.flatten(0, 1).float(), tokens_BT.flatten()).backward()
        del scores_BTV
        optimizer.step()
        moment.record()
    gpu.synchronize()
    seconds = moments[-2].elapsed_time(moments[-1]) / 1e3
    return Result(seconds, gpu.max_memory_allocated(), parameters)


def run(sizes: Sizes, spec: Spec, recomputation: str) -> Result:
    """Two steps on eight such GPUs; what the first of them says."""
    gpus = course_lib.devices(GPUS, spec, backing="meta")
    return ranks.run(train, gpus, sizes, RECOMPUTATION[recomputation])[0]


def published() -> dict[str, float]:
    """Tokens a second and GPU, and GiB, of torchtitan without a compiler."""
    (row,) = [
        row
        for row in read("torchtitan_2024_12")
        if (row["model"], row["gpus"], row["technique"]) == ("8B", str(GPUS), "eager")
    ]
    return {"tokens": float(row["tps_per_gpu"]), "GiB": float(row["mem_GiB"])}


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--layers", type=int, default=Sizes.layers)
    sizes = Sizes(layers=options.parse_args(arguments).layers)
    theirs = published()
    print("recomputation  spec         GiB      of theirs  tokens/s/GPU      of theirs  (s here)")
    for recomputation in RECOMPUTATION:
        for name, spec in (("data sheet", CARD), ("achievable", CARD.achievable())):
            began = time.perf_counter()
            result = run(sizes, spec, recomputation)
            took = time.perf_counter() - began
            gib = result.peak_bytes / GIB
            rate = sizes.batch * sizes.sequence / result.seconds
            print(
                f"{recomputation:13}  {name:10} {gib:5.1f}  {gib / theirs['GiB']:13.2f}"
                f"  {rate:12,.0f}  {rate / theirs['tokens']:13.2f}  {took:8.0f}",
                flush=True,
            )
    print(f"torchtitan published {theirs['GiB']} GiB and {theirs['tokens']:,.0f}, selective.")


if __name__ == "__main__":
    main()
