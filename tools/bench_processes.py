"""Ranks in real processes: what a call costs, and the code by hand beside PyTorch's engines.

    python tools/bench_processes.py                  # calls, and all pairs on 2 and on 4 ranks
    python tools/bench_processes.py --ranks 2        # pairs on 2 ranks alone
    python tools/bench_processes.py --callers 30     # so many programs at once, four ranks each

A pair takes turns in one process group, so that whatever else the machine does falls on both. A
time is that of the slowest rank; what is shown is the median over the turns, and the median of
their ratios, with the bounds within which 19 of 20 such medians lie. One turn says little where
ranks share cores: it depends on which thread wakes first. Memory is what virtual ranks hold at the
peak of two steps: to the byte, and the same on every machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import course_lib
from course_lib import format_bytes, ranks
from course_lib.hardware import fresh_devices
from course_lib.models import GPT, next_token_loss
from course_lib.ranks.by_hand.data_parallel import AveragedGradients
from course_lib.ranks.by_hand.messages import ring_all_reduce
from course_lib.ranks.by_hand.pipeline import StageOfRank, gpipe_step, one_f_one_b_step
from course_lib.ranks.by_hand.sharded_data_parallel import ShardedParameters
from course_lib.ranks.by_hand.tensor_parallel import NeuronsOfRank

VOCABULARY, LENGTH = 65, 64
SIZES = [4 * 1024 * 4**power for power in range(8)]  # 4 KB to 64 MB
GIGABYTES_OF_A_CALLER = 0.55  # it imports PyTorch, its fork server does too, its ranks share that


Step = Callable[[], object]


class Pair(NamedTuple):
    """The same work by hand and by PyTorch: each is made ready, and returns what does it once."""

    name: str
    by_hand: Callable[[], Step]
    engine: Callable[[], Step]
    turns: int


# ---------------------------------------------------------------------------------- the pairs


def all_reduce_of(size: int) -> Pair:
    """The ring that is made of sends and receives, beside ``all_reduce``."""
    x = torch.zeros(size // 4)
    return Pair(
        f"all-reduce of {format_bytes(size)}",
        lambda: partial(ring_all_reduce, x.to(ranks.device())),
        lambda: partial(dist.all_reduce, x.to(ranks.device())),
        201 if size < 2**22 else 61,
    )


def gpt(depth: int = 4, width: int = 192) -> GPT:
    torch.manual_seed(0)
    return GPT(VOCABULARY, LENGTH, width, heads=6, depth=depth, tied=False).to(ranks.device())


def training(
    model: nn.Module, optimizer: torch.optim.Optimizer, finish: Callable[[], None] | None = None
) -> Step:
    """A step of a GPT on this rank's examples; ``finish`` waits for the gradients."""
    torch.manual_seed(dist.get_rank())
    x, y = torch.randint(VOCABULARY, (2, 4, LENGTH)).to(ranks.device())

    def step() -> None:
        next_token_loss(model(x), y).backward()
        if finish:
            finish()
        optimizer.step()
        optimizer.zero_grad()

    return step


def buckets_by_hand() -> Step:
    model = gpt()
    averaged = AveragedGradients(model, 2**20)
    return training(model, torch.optim.SGD(model.parameters(), 0.1), averaged.finish)


def buckets_by_ddp() -> Step:
    model = DistributedDataParallel(gpt(), bucket_cap_mb=1, gradient_as_bucket_view=True)
    return training(model, torch.optim.SGD(model.parameters(), 0.1))


def shards_by_hand() -> Step:
    model = gpt()
    sharded = ShardedParameters(model)
    return training(model, torch.optim.SGD(sharded.shards, 0.1), sharded.finish)


def shards_by_fsdp() -> Step:
    model = gpt()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return training(model, torch.optim.SGD(model.parameters(), 0.1))


class Stage(NamedTuple):
    """What a step of a pipeline needs, by hand or by PyTorch: four microbatches a rank."""

    layers: nn.Module
    x: torch.Tensor
    microbatches: int

    @classmethod
    def of_rank(cls, width: int = 512) -> Stage:
        count = 4 * dist.get_world_size()
        torch.manual_seed(dist.get_rank())
        layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        return cls(
            layers.to(ranks.device()), torch.randn(32 * count, width).to(ranks.device()), count
        )

    def by_hand(self, step: Callable) -> Step:
        stage = StageOfRank(self.layers, (32, self.x.shape[1]))
        return lambda: step(
            stage, self.x.chunk(self.microbatches), self.x.chunk(self.microbatches), F.mse_loss
        )

    def by_engine(self, schedule: Callable) -> Step:
        rank, last = dist.get_rank(), dist.get_world_size() - 1
        stage = PipelineStage(self.layers, rank, last + 1, ranks.device())
        engine = schedule(stage, self.microbatches, loss_fn=F.mse_loss)
        inputs, target = [self.x] if rank == 0 else [], {"target": self.x} if rank == last else {}
        return lambda: engine.step(*inputs, **target)


def whole_mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))


def backward_through(model: nn.Module) -> Step:
    x = torch.ones(256, 512).to(ranks.device())
    return lambda: model(x.requires_grad_()).square().mean().backward()


def neurons_by_hand() -> Step:
    return backward_through(NeuronsOfRank(whole_mlp(), ranks.device()))


def neurons_by_dtensor() -> Step:
    mesh = init_device_mesh(ranks.device().type, (dist.get_world_size(),))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return backward_through(parallelize_module(whole_mlp().to(ranks.device()), mesh, plan))


METHODS = [
    Pair("data-parallel step of a GPT", buckets_by_hand, buckets_by_ddp, 31),
    Pair("stage 3, step of a GPT", shards_by_hand, shards_by_fsdp, 31),
    Pair(
        "pipeline step, GPipe",
        lambda: Stage.of_rank().by_hand(gpipe_step),
        lambda: Stage.of_rank().by_engine(ScheduleGPipe),
        31,
    ),
    Pair(
        "pipeline step, 1F1B",
        lambda: Stage.of_rank().by_hand(one_f_one_b_step),
        lambda: Stage.of_rank().by_engine(Schedule1F1B),
        31,
    ),
    Pair("tensor-parallel MLP", neurons_by_hand, neurons_by_dtensor, 31),
]

# ---------------------------------------------------------------------------------- measuring


class Turns(NamedTuple):
    """The seconds of one rank, turn by turn."""

    name: str
    by_hand: list[float]
    engine: list[float]


def seconds(work: Callable[[], object]) -> float:
    dist.barrier()
    began = time.perf_counter()
    work()
    if ranks.device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measured() -> list[Turns]:
    """For ``ranks.run``: all pairs, one after the other."""
    dist.init_process_group()
    found = []
    for pair in [*map(all_reduce_of, SIZES), *METHODS]:
        turns = Turns(pair.name, [], [])
        sides = [(pair.by_hand(), turns.by_hand), (pair.engine(), turns.engine)]
        for turn in range(pair.turns + 2):
            for work, times in sides[:: 1 if turn % 2 else -1]:  # each goes first in turn
                times.append(seconds(work))
        found.append(Turns(pair.name, turns.by_hand[2:], turns.engine[2:]))
    return found


def show_pairs(count: int) -> None:
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "OFF"  # no comparison of collectives
    print(f"{count} ranks{'':22}{'by hand ms':>12}{'PyTorch ms':>12}{'ratio':>8}  within")
    for rows in zip(*ranks.run(measured, processes=count), strict=True):
        by_hand = [max(times) for times in zip(*(row.by_hand for row in rows), strict=True)]
        engine = [max(times) for times in zip(*(row.engine for row in rows), strict=True)]
        ratios = [a / b for a, b in zip(by_hand, engine, strict=True)]
        low, ratio, high = median_within(ratios)
        hand_ms, engine_ms = (statistics.median(times) * 1e3 for times in (by_hand, engine))
        print(f"{rows[0].name:29}{hand_ms:12.2f}{engine_ms:12.2f}{ratio:8.2f}", end="")
        print(f"  {low:.2f} to {high:.2f}", flush=True)
    print()


def median_within(values: list[float]) -> tuple[float, float, float]:
    """The median, between bounds that miss that of endless turns once in twenty times."""
    values, middle = sorted(values), len(values) / 2
    spread = 0.98 * len(values) ** 0.5  # of how many lie below the median, a binomial's
    return values[int(middle - spread)], statistics.median(values), values[int(middle + spread)]


def show_memory(count: int) -> None:
    print(f"{count} virtual ranks{'':14}{'by hand MB':>12}{'PyTorch MB':>12}{'ratio':>8}")
    for pair in METHODS:
        by_hand, engine = (peak(make, count) / 1e6 for make in (pair.by_hand, pair.engine))
        print(f"{pair.name:29}{by_hand:12.3f}{engine:12.3f}{by_hand / engine:8.2f}", flush=True)
    print()


def peak(make: Callable[[], Step], count: int) -> int:
    """The most bytes that are in use on a virtual GPU, from the beginning to a second step."""

    def twice() -> None:
        dist.init_process_group()
        step = make()
        step()
        step()

    with fresh_devices(count, course_lib.A100, backing="cpu") as gpus, course_lib.trace() as t:
        ranks.run(twice, gpus)
    return max(t.peak_memory)


# ---------------------------------------------------------------------------------- the calls


def own_megabytes() -> float:
    """For ``ranks.run``: memory that this process shares with no other (Linux only)."""
    dist.init_process_group()
    dist.all_reduce(torch.ones(1))
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    private = [line.split()[1] for line in lines if line.startswith("Private_")]
    return sum(map(int, private)) / 1000


def show_calls(count: int = 4, calls: int = 11) -> None:
    times = []
    for _ in range(calls + 1):
        began = time.perf_counter()
        megabytes = ranks.run(own_megabytes, processes=count)
        times.append(time.perf_counter() - began)
    print(
        f"a call of {count} ranks that all-reduce: the first {times[0]:.2f} s, the median of "
        f"{calls} others {statistics.median(times[1:]):.2f} s; {max(megabytes):.0f} MB a rank\n"
    )


def show_callers(count: int) -> None:
    """Many programs begin at once, as learners on one host do; what they leave is counted.

    Raises:
        SystemExit: this machine has not the memory for so many.
    """
    needed, available = count * GIGABYTES_OF_A_CALLER, available_gigabytes()
    if needed > available:
        raise SystemExit(
            f"{count} programs take about {needed:.0f} GB, and {available:.1f} GB are free: "
            f"try --callers {int(available / GIGABYTES_OF_A_CALLER)}"
        )
    with tempfile.TemporaryDirectory(prefix="callers_") as folder:
        call = [sys.executable, __file__, "--one-call"]
        environment = {**os.environ, "TMPDIR": folder}
        before, least = available_gigabytes(), float("inf")
        began = time.perf_counter()
        callers = [
            subprocess.Popen([*call, str(n)], stdout=subprocess.PIPE, text=True, env=environment)
            for n in range(count)
        ]
        while any(caller.poll() is None for caller in callers):
            least = min(least, available_gigabytes())
            time.sleep(0.2)
        passed = time.perf_counter() - began
        right = sum(
            caller.communicate()[0] == f"{[4.0 * n + 6] * 4}\n" for n, caller in enumerate(callers)
        )
        left = [path for path in Path(folder).iterdir() if "torch" not in path.name]
    processes = [n for n in os.listdir("/proc") if n.isdigit() and has_in_environment(n, folder)]
    print(
        f"{count} programs at once, four ranks each: {right} right, {passed:.0f} s for all, "
        f"{before - least:.1f} GB at most; {len(left)} files and {len(processes)} processes left\n"
    )


def available_gigabytes() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1e6


def has_in_environment(process: str, text: str) -> bool:
    """Whether it began with that in its environment; forks have that of the first one."""
    try:
        return text.encode() in Path("/proc", process, "environ").read_bytes()
    except OSError:  # it has ended, or is somebody else's
        return False


def one_call(number: int) -> None:
    def total() -> float:
        dist.init_process_group()
        x = torch.tensor([number + dist.get_rank()], dtype=torch.float32)
        dist.all_reduce(x)
        return x.item()

    print(ranks.run(total, processes=4))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--callers", type=int)
    parser.add_argument("--one-call", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_call is not None:
        return one_call(options.one_call)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; Python "
        f"{platform.python_version()}, PyTorch {torch.__version__}; one thread a rank\n"
    )
    if options.callers:
        return show_callers(options.callers)
    show_calls()
    for count in options.ranks:
        show_pairs(count)
        show_memory(count)


if __name__ == "__main__":
    main()
