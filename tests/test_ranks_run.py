"""``ranks.run``: one function, once a rank, with what a process has of its own."""

from __future__ import annotations

import functools
import gc
import os
import random
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist

import course_lib
from course_lib import ranks


def test_each_rank_returns_in_rank_order(vgpus):
    def who() -> tuple[str, str, str, int]:
        return (
            os.environ["RANK"],
            os.environ["LOCAL_RANK"],
            os.environ["WORLD_SIZE"],
            torch.vgpu.current_device(),
        )

    assert ranks.run(who, vgpus) == [(str(r), str(r), "4", r) for r in range(4)]
    assert "RANK" not in os.environ


def test_arguments_are_handed_to_all(vgpus):
    assert ranks.run(lambda a, b: a + b, vgpus[:2], 1, 2) == [3, 3]


def test_what_they_print_comes_in_rank_order(vgpus, capsys):
    def talk() -> None:
        dist.init_process_group()
        print("before", os.environ["RANK"])
        dist.barrier()
        print("after")
        print("warn", file=sys.stderr)

    ranks.run(talk, vgpus[:2])
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "[rank 0] before 0",
        "[rank 0] after",
        "[rank 1] before 1",
        "[rank 1] after",
    ]
    assert printed.err.splitlines() == ["[rank 0] warn", "[rank 1] warn"]


def test_a_device_without_an_index_is_the_rank_s_own(vgpus):
    def devices() -> list[str]:
        module = torch.nn.Linear(2, 2).to("vgpu")
        made = torch.ones(2, device="vgpu")
        moved = torch.ones(2).to("vgpu")
        counted = torch.arange(2, device=torch.device("vgpu"))
        return [str(t.device) for t in (module.weight, made, moved, counted, made.new_ones(1))]

    assert ranks.run(devices, vgpus) == [[f"vgpu:{rank}"] * 5 for rank in range(4)]


def test_a_group_may_say_which_gpu_it_is_on(vgpus):
    def total() -> float:
        dist.init_process_group("nccl", device_id=ranks.device())
        x = torch.ones(1, device=ranks.device())
        dist.all_reduce(x)
        return x.item()

    assert ranks.run(total, vgpus) == [4] * 4


def test_random_numbers_are_each_rank_s_own(vgpus):
    def draw() -> list[float]:
        dist.init_process_group()
        rank = dist.get_rank()
        torch.manual_seed(rank)
        random.seed(rank)
        np.random.seed(rank)
        dist.barrier()  # others seed, and draw, in between
        return [
            torch.rand(1).item(),
            torch.rand(1, device="vgpu").item(),
            random.random(),
            float(np.random.rand()),
        ]

    def alone(seed: int) -> list[float]:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        return [
            torch.rand(1).item(),
            torch.rand(1, device="vgpu:0").item(),
            random.random(),
            float(np.random.rand()),
        ]

    torch.manual_seed(7)
    before = torch.rand(1)
    torch.manual_seed(7)
    drawn = ranks.run(draw, vgpus)
    assert torch.equal(torch.rand(1), before)  # the caller's go on as if nothing had been
    assert drawn == [alone(rank) for rank in range(4)]


def test_settings_of_a_process_are_each_rank_s_own(vgpus):
    def set_up() -> tuple[torch.dtype, str, bool]:
        dist.init_process_group()
        rank = dist.get_rank()
        if rank == 1:
            torch.set_default_dtype(torch.float64)
            torch.set_grad_enabled(False)
        os.environ["MINE"] = str(rank)
        dist.barrier()
        return torch.ones(1).dtype, os.environ["MINE"], torch.is_grad_enabled()

    made = ranks.run(set_up, vgpus[:2])
    assert made == [(torch.float32, "0", True), (torch.float64, "1", False)]
    assert "MINE" not in os.environ
    assert torch.get_default_dtype() is torch.float32


def test_hosts_go_on_by_themselves_and_meet_at_a_barrier(gpus):
    def work() -> tuple[float, float]:
        dist.init_process_group()
        x = torch.ones(100, device="vgpu")
        for _ in range(10 * dist.get_rank()):
            x.add_(1)
        torch.vgpu.synchronize()
        before = course_lib.host_seconds()
        dist.barrier()
        return before, course_lib.host_seconds()

    before, after = zip(*ranks.run(work, gpus), strict=True)
    assert list(before) == sorted(before)
    assert before[0] < before[3]
    assert set(after) == {max(after)}
    assert course_lib.host_seconds() == max(after)


def test_two_runs_give_the_same_trace(vgpus):
    def work() -> None:
        dist.init_process_group()
        x = torch.ones(1000, device="vgpu")
        for _ in range(3):
            pending = dist.all_reduce(x.clone(), async_op=True)
            x = x * 2
            pending.wait()

    def trace() -> str:
        gpus = course_lib.devices(4)
        with course_lib.trace() as trace:
            ranks.run(work, gpus)
        return repr(trace.spans) + repr([list(history) for history in trace.memory])

    assert trace() == trace()


def test_fewer_gpus_than_before_will_do(vgpus):
    gpus = course_lib.devices(2)
    assert ranks.run(lambda: torch.rand(1, device="vgpu").device, gpus) == gpus
    course_lib.devices(4)
    torch.vgpu.manual_seed_all(0)  # the generators of all four are still there


def test_the_default_device_is_a_thread_s_own(vgpus):
    def work() -> torch.device:
        torch.set_default_device(f"vgpu:{os.environ['RANK']}")
        return torch.ones(1).device

    assert ranks.run(work, vgpus) == vgpus
    assert torch.ones(1).device.type == "cpu"


def test_no_thread_is_left(vgpus):
    before = threading.active_count()
    ranks.run(lambda: None, vgpus)
    assert threading.active_count() == before


def test_sys_exit_without_a_code_ends_a_rank(vgpus):
    def leave() -> int:
        if os.environ["RANK"] == "0":
            sys.exit()
        return 1

    assert ranks.run(leave, vgpus[:2]) == [None, 1]


@pytest.mark.parametrize(
    ("gpus", "error", "words"),
    [
        ([], ValueError, "at least one device"),
        (["vgpu:0", "vgpu:0"], ValueError, "a GPU of its own"),
        (["cpu"], RuntimeError, "virtual GPUs, and cpu is none"),
        (["vgpu:9"], RuntimeError, "vgpu:9 does not exist"),
        (["vgpu"], RuntimeError, "vgpu does not say which GPU"),
        (4, TypeError, "takes a list of devices, as course_lib.devices.* and not 4"),
        ("vgpu:0", TypeError, r"takes a list of devices, and vgpu:0 is one: give \['vgpu:0'\]"),
        (torch.tensor([0, 1]), TypeError, "takes a list of devices, .* and not tensor"),
    ],
)
def test_gpus_that_cannot_be_are_refused(vgpus, gpus, error, words):
    with pytest.raises(error, match=words):
        ranks.run(lambda: None, gpus)


def test_gpus_may_come_one_by_one(vgpus):
    assert ranks.run(lambda: 1, (gpu for gpu in vgpus)) == [1] * 4


async def waits() -> None: ...


def gives_one() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (None, "None is none: give train itself, and not what train.. returns"),
        ("train", "'train' is none"),
        (gives_one, "gives_one would only be begun"),
        (functools.partial(waits), "would only be begun"),
    ],
)
@pytest.mark.parametrize("where", [{"processes": 2}, {"gpus": ["vgpu:0"]}])
def test_a_function_that_cannot_be_is_refused(vgpus, function, words, where):
    with pytest.raises(TypeError, match=words):
        ranks.run(function, **where)


def test_what_a_rank_cannot_do_is_refused(vgpus):
    with pytest.raises(RuntimeError, match="cannot be called inside of a rank"):
        ranks.run(lambda: ranks.run(lambda: None, vgpus), vgpus)
    with pytest.raises(RuntimeError, match=r"call devices\(\) before it"):
        ranks.run(lambda: course_lib.devices(2), vgpus)

    def record() -> None:
        with course_lib.trace():
            pass

    with pytest.raises(RuntimeError, match=r"around ranks\.run"):
        ranks.run(record, vgpus)
    assert ranks.run(lambda: 1, vgpus) == [1] * 4


def test_what_ranks_leave_in_cycles_is_freed_at_the_end_of_a_run(vgpus):
    """As of a process that has ended: the next run's peak is its own."""

    def work() -> None:
        held: list = [torch.ones(4, device="vgpu")]
        held.append(held)
        gc.collect()  # from now on it is old, and is found when Python looks through everything

    ranks.run(work, vgpus)
    assert [course_lib.memory_in_use(gpu) for gpu in vgpus] == [0] * len(vgpus)
