"""Ranks in real processes: what a call costs, and the code by hand beside PyTorch's engines.

    python tools/bench_processes.py                  # calls, and all pairs on 2 and on 4 ranks
    python tools/bench_processes.py --ranks 2        # pairs on 2 ranks alone
    python tools/bench_processes.py --callers 30     # so many programs at once, four ranks each

A pair takes turns in one process group, so that whatever else the machine does falls on both. A
time is that of the slowest rank; what is shown is the median over the turns, and the median of
their ratios.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from course_lib import format_bytes, ranks
from course_lib.models import GPT, next_token_loss
from course_lib.ranks.by_hand.data_parallel import AveragedGradients
from course_lib.ranks.by_hand.messages import ring_all_reduce
from course_lib.ranks.by_hand.pipeline import StageOfRank, gpipe_step
from course_lib.ranks.by_hand.tensor_parallel import NeuronsOfRank

VOCABULARY, LENGTH = 65, 64
SIZES = [4 * 1024 * 4**power for power in range(8)]  # 4 KB to 64 MB


class Pair(NamedTuple):
    """The same work by hand and by PyTorch; each has a name and a function that does it once."""

    name: str
    by_hand: Callable[[], object]
    engine: Callable[[], object]
    turns: int


# ---------------------------------------------------------------------------------- the pairs


def all_reduces() -> Iterator[Pair]:
    """The ring that is made of sends and receives, beside ``all_reduce``."""
    for size in SIZES:
        x = torch.zeros(size // 4, device=ranks.device())
        turns = 41 if size < 2**22 else 11
        yield Pair(
            f"all-reduce of {format_bytes(size)}",
            partial(ring_all_reduce, x),
            partial(dist.all_reduce, x),
            turns,
        )


def gpt(depth: int = 4, width: int = 192) -> GPT:
    torch.manual_seed(0)
    return GPT(VOCABULARY, LENGTH, width, heads=6, depth=depth, tied=False).to(ranks.device())


def data_parallel() -> Iterator[Pair]:
    """A step with buckets by hand, beside ``DistributedDataParallel`` with buckets of that size."""
    x, y = torch.randint(VOCABULARY, (2, 4, LENGTH), device=ranks.device())
    mine, wrapped = gpt(), gpt()
    bucket_megabytes = 1
    averaged = AveragedGradients(mine, bucket_megabytes * 2**20)
    engine = DistributedDataParallel(wrapped, bucket_cap_mb=bucket_megabytes)
    mine_sgd, engine_sgd = (torch.optim.SGD(model.parameters(), 0.1) for model in (mine, wrapped))

    def by_hand() -> None:
        next_token_loss(mine(x), y).backward()
        averaged.finish()
        mine_sgd.step()
        mine_sgd.zero_grad(set_to_none=False)

    def by_ddp() -> None:
        next_token_loss(engine(x), y).backward()
        engine_sgd.step()
        engine_sgd.zero_grad(set_to_none=False)

    yield Pair("data-parallel step of a GPT", by_hand, by_ddp, 21)


def pipeline() -> Iterator[Pair]:
    """A step of GPipe, four microbatches a rank."""
    rank, world_size, device = dist.get_rank(), dist.get_world_size(), ranks.device()
    width, count = 512, 4 * dist.get_world_size()
    torch.manual_seed(rank)
    stages = [nn.Sequential(nn.Linear(width, width), nn.ReLU()).to(device) for _ in range(2)]
    x = torch.randn(32 * count, width, device=device)
    mine = StageOfRank(stages[0], (32, width))
    engine = ScheduleGPipe(
        PipelineStage(stages[1], rank, world_size, device), count, loss_fn=F.mse_loss
    )

    def by_hand() -> None:
        gpipe_step(mine, x.chunk(count), x.chunk(count), F.mse_loss)

    def by_schedule() -> None:
        if rank == 0:
            engine.step(x)
        elif rank == world_size - 1:
            engine.step(target=x)
        else:
            engine.step()

    yield Pair("pipeline step, GPipe", by_hand, by_schedule, 21)


def tensor_parallel() -> Iterator[Pair]:
    """Forward and backward of an MLP that is cut by its neurons."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))
    mine = NeuronsOfRank(whole, ranks.device())
    mesh = init_device_mesh(ranks.device().type, (dist.get_world_size(),))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    engine = parallelize_module(whole.to(ranks.device()), mesh, plan)
    x = torch.randn(256, 512, device=ranks.device())

    def step(model: nn.Module) -> None:
        model(x.requires_grad_()).square().mean().backward()

    yield Pair("tensor-parallel MLP", lambda: step(mine), lambda: step(engine), 21)


GROUPS: list[Callable[[], Iterator[Pair]]] = [
    all_reduces,
    data_parallel,
    pipeline,
    tensor_parallel,
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
    for group in GROUPS:
        for pair in group():
            turns = Turns(pair.name, [], [])
            for turn in range(pair.turns + 2):
                sides = [(pair.by_hand, turns.by_hand), (pair.engine, turns.engine)]
                for work, times in sides[:: 1 if turn % 2 else -1]:  # each goes first in turn
                    times.append(seconds(work))
            found.append(Turns(pair.name, turns.by_hand[2:], turns.engine[2:]))
    return found


def show_pairs(count: int) -> None:
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "OFF"  # no comparison of collectives
    print(f"{count} ranks{'':22}{'by hand ms':>12}{'PyTorch ms':>12}{'ratio':>8}")
    for rows in zip(*ranks.run(measured, processes=count), strict=True):
        by_hand = [max(times) for times in zip(*(row.by_hand for row in rows), strict=True)]
        engine = [max(times) for times in zip(*(row.engine for row in rows), strict=True)]
        ratio = statistics.median(a / b for a, b in zip(by_hand, engine, strict=True))
        hand_ms, engine_ms = (statistics.median(times) * 1e3 for times in (by_hand, engine))
        print(f"{rows[0].name:29}{hand_ms:12.2f}{engine_ms:12.2f}{ratio:8.2f}")
    print()


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
    """Many programs begin at once, as learners on one host do."""
    call = [sys.executable, __file__, "--one-call"]
    began = time.perf_counter()
    callers = [subprocess.Popen(call, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    said = [caller.communicate()[0] for caller in callers]
    right = sum(text == f"{[4.0] * 4}\n" for text in said)
    print(f"{count} callers at once: {right} right, {time.perf_counter() - began:.0f} s for all\n")


def one_call() -> None:
    def total() -> float:
        dist.init_process_group()
        x = torch.ones(1)
        dist.all_reduce(x)
        return x.item()

    print(ranks.run(total, processes=4))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--callers", type=int)
    parser.add_argument("--one-call", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_call:
        return one_call()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; Python "
        f"{platform.python_version()}, PyTorch {torch.__version__}; one thread a rank\n"
    )
    if options.callers:
        return show_callers(options.callers)
    show_calls()
    for count in options.ranks:
        show_pairs(count)


if __name__ == "__main__":
    main()
