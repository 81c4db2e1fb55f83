"""Faults of ranks are named at once, and leave nothing behind."""

from __future__ import annotations

import _thread
import gc
import os
import signal
import subprocess
import sys
import threading
import traceback
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import course_lib
from course_lib import ranks
from course_lib.virtual.machine import machine


def rank_here() -> int:
    return int(os.environ["RANK"])


def assert_usable(gpus: list[torch.device]) -> None:
    """The next run works, and no device holds anything."""

    def total() -> float:
        dist.init_process_group()
        x = torch.ones(4, device="vgpu")
        dist.all_reduce(x)
        return x[0].item()

    assert ranks.run(total, gpus) == [len(gpus)] * len(gpus)
    assert [course_lib.memory_in_use(gpu) for gpu in gpus] == [0] * len(gpus)
    assert not dist.is_initialized()


def test_a_deadlock_says_who_waits_for_what_and_where(vgpus):
    def each_waits() -> None:
        dist.init_process_group()
        x = torch.zeros(3, device="vgpu")
        if rank_here() < 2:
            dist.recv(x, src=1 - rank_here())  # both receive first
        elif rank_here() == 2:
            dist.all_reduce(x)

    with pytest.raises(ranks.DeadlockError) as caught:
        ranks.run(each_waits, vgpus)
    message = str(caught.value)
    assert "rank 0 waits in a receive from rank 1, which has sent nothing" in message
    assert "rank 1 waits in a receive from rank 0" in message
    assert "rank 2 waits in all_reduce, number 1 of all ranks, for ranks 0, 1, 3" in message
    assert "rank 3 has ended" in message
    assert message.count("dist.recv(x, src=1 - rank_here())") == 2
    assert "test_ranks_faults.py" in message
    assert_usable(vgpus)


def test_two_sends_that_wait_for_each_other_are_a_deadlock(vgpus):
    def both_send() -> None:
        dist.init_process_group()
        x = torch.zeros(3, device="vgpu")
        dist.send(x, dst=1 - rank_here())
        dist.recv(x, src=1 - rank_here())

    with pytest.raises(ranks.DeadlockError, match="a send to rank 1, which has posted no receive"):
        ranks.run(both_send, vgpus[:2])
    assert_usable(vgpus)


def test_a_send_with_another_tag_than_its_receive_is_named(vgpus):
    def differ() -> None:
        dist.init_process_group()
        x = torch.zeros(3, device="vgpu")
        if rank_here() == 0:
            dist.send(x, dst=1, tag=1)
        else:
            dist.recv(x, src=0, tag=2)

    with pytest.raises(ranks.DeadlockError) as caught:
        ranks.run(differ, vgpus[:2])
    assert "in a send with tag 1 to rank 1" in str(caught.value)
    assert "which has sent nothing with tag 2" in str(caught.value)


@pytest.mark.parametrize(
    "numbers",
    [
        {"rank": 0, "world_size": 2},
        {"rank": 1, "world_size": 3},
        {"rank": 0, "world_size": 1, "store": dist.HashStore()},
        {"backend": "mpi"},
    ],
)
def test_a_rank_that_says_it_is_another_is_refused(vgpus, numbers):
    def begin() -> None:
        dist.init_process_group(**numbers)

    with pytest.raises(ValueError, match=r"and this is rank . of 2: leave rank= and world_size="):
        ranks.run(begin, vgpus[:2])
    assert_usable(vgpus)


def test_what_belongs_to_ranks_that_have_ended_says_so(vgpus):
    def begin() -> tuple:
        dist.init_process_group()
        x = torch.ones(2, device="vgpu")
        return dist.group.WORLD, dist.all_reduce(x, async_op=True), fully_shard(nn.Linear(2, 2))

    group, work, model = ranks.run(begin, vgpus)[0]
    for use in (
        lambda: group.allreduce([torch.ones(1)]),
        lambda: group.send([torch.ones(1)], 1, 0),
        work.wait,
        lambda: model(torch.ones(1, 2, device="vgpu")),
    ):
        with pytest.raises(RuntimeError, match="this belongs to ranks that have ended"):
            use()


def test_a_group_that_outlives_its_ranks_keeps_no_tensor_of_theirs(vgpus):
    def begin(held: torch.Tensor, given: torch.Tensor) -> tuple:
        dist.init_process_group()
        if os.environ["RANK"] == "0":  # a message that nobody takes, a sum to which nobody comes
            dist.isend(torch.ones(2, device="vgpu"), 1)
            dist.all_reduce(torch.ones(2, device="vgpu"), async_op=True)
        return dist.group.WORLD, torch.ones(4, device="vgpu")

    function = partial(begin, torch.ones(8, device="vgpu:0"))
    group = ranks.run(function, vgpus, torch.ones(8, device="vgpu:0"))[0][0]
    del function
    assert [course_lib.memory_in_use(gpu) for gpu in vgpus] == [0] * 4
    del group


HOOKS = """
import torch
from course_lib import devices, ranks  # ranks is imported before there is a virtual GPU

def fail(gradient):
    raise ValueError("from the hook")

def backward():
    x = torch.ones(2, device="vgpu", requires_grad=True)
    y = x * 2
    y.register_hook(fail)
    y.sum().backward()

try:
    ranks.run(backward, devices(2))
except ValueError as error:
    print(error)
"""


def test_the_error_of_a_hook_is_that_of_the_run():
    """In a process of its own: here virtual GPUs were there before anything was imported."""
    done = subprocess.run([sys.executable, "-c", HOOKS], capture_output=True, text=True)
    assert done.stdout.endswith("from the hook\n"), done.stderr


def test_ranks_that_differ_inside_of_a_backward_pass_are_named(vgpus):
    """The error goes up through C++, which may lose it."""

    def only_rank_1_sums() -> None:
        dist.init_process_group()
        model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(2)))
        for layer in model:
            fully_shard(layer)
        sharded = fully_shard(model)
        sharded.set_requires_gradient_sync(rank_here() == 1)
        sharded(torch.ones(2, 4, device="vgpu")).sum().backward()
        dist.all_reduce(torch.ones(1, device="vgpu"))

    with pytest.raises(ranks.MismatchError, match="reduce_scatter_single"):
        ranks.run(only_rank_1_sums, vgpus[:2])
    gc.collect()  # a sharded model and its hooks refer to each other
    assert_usable(vgpus)


def reduced(x: torch.Tensor) -> None:
    dist.all_reduce(x)


@pytest.mark.parametrize(
    ("zero", "one", "words"),
    [
        (reduced, lambda x: dist.broadcast(x, 0), "broadcast with root 0 of float32 (4,)"),
        (reduced, lambda x: dist.all_reduce(x[:2]), "all_reduce of float32 (2,)"),
        (reduced, lambda x: dist.all_reduce(x.int()), "all_reduce of int32 (4,)"),
        (reduced, lambda x: dist.all_reduce(x, dist.ReduceOp.MAX), "all_reduce (MAX)"),
        (lambda x: dist.broadcast(x, 0), lambda x: dist.broadcast(x, 1), "with root 1"),
        (reduced, lambda x: dist.all_reduce(x.cpu()), "(4,) on the CPU"),
    ],
)
def test_collectives_that_differ_name_both_sides(vgpus, zero, one, words):
    def differ() -> None:
        dist.init_process_group()
        x = torch.ones(4, device="vgpu")
        one(x) if rank_here() == 1 else zero(x)

    with pytest.raises(ranks.MismatchError) as caught:
        ranks.run(differ, vgpus)
    message = str(caught.value)
    assert "collective number 1 of all ranks" in message
    assert "rank 0: " in message and "rank 1: " in message
    assert words in message
    assert_usable(vgpus)


def test_a_message_of_another_size_names_both_sides(vgpus):
    def differ() -> None:
        dist.init_process_group()
        if rank_here() == 0:
            dist.send(torch.ones(3, device="vgpu"), dst=1)
        else:
            dist.recv(torch.ones(4, device="vgpu"), src=0)

    words = r"rank 0 sends float32 \(3,\), and rank 1 receives float32 \(4,\)"
    with pytest.raises(ranks.MismatchError, match=words):
        ranks.run(differ, vgpus[:2])


def test_the_error_of_the_rank_that_failed_first_ends_in_its_own_line(vgpus):
    def fail() -> None:
        dist.init_process_group()
        x = torch.ones(2, device="vgpu")
        if rank_here() == 2:
            x.view(5)  # the line
        dist.all_reduce(x)

    with pytest.raises(RuntimeError, match="shape '\\[5\\]' is invalid") as caught:
        ranks.run(fail, vgpus)
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert last.line == "x.view(5)  # the line"
    assert "rank 2 of 4" in caught.value.__notes__[0]
    assert_usable(vgpus)


def test_a_rank_that_runs_out_of_memory_says_so_and_frees_it(vgpus):
    def fill() -> None:
        dist.init_process_group()
        kept = []
        while True:
            kept.append(torch.zeros(10**6, device="vgpu"))
            if rank_here() == 0:
                dist.all_reduce(kept[-1])

    with pytest.raises(torch.OutOfMemoryError, match="vgpu:1 out of memory"):
        ranks.run(fill, vgpus)
    assert_usable(vgpus)


def test_a_rank_that_ends_early_is_named(vgpus):
    def leave() -> None:
        dist.init_process_group()
        if rank_here() == 3:
            return
        dist.barrier()

    with pytest.raises(ranks.DeadlockError, match="rank 3 has ended"):
        ranks.run(leave, vgpus)


def test_sys_exit_with_a_code_is_a_failure(vgpus):
    with pytest.raises(RuntimeError, match=r"rank 0 ended with sys.exit\(3\)"):
        ranks.run(lambda: sys.exit(3), vgpus)


def test_a_tensor_on_another_rank_s_gpu_is_refused(vgpus):
    def forget() -> None:
        dist.init_process_group()
        dist.all_reduce(torch.ones(2, device="vgpu:0"))

    with pytest.raises(ValueError, match="on vgpu:0, the GPU of rank 0; that of rank 1 is vgpu:1"):
        ranks.run(forget, vgpus[:2])


def test_a_tensor_that_is_not_contiguous_is_refused(vgpus):
    def transpose() -> None:
        dist.init_process_group()
        dist.all_reduce(torch.ones(2, 3, device="vgpu").t())

    with pytest.raises(ValueError, match="contiguous"):
        ranks.run(transpose, vgpus[:2])


def test_what_was_printed_before_a_fault_is_shown(vgpus, capsys):
    def fail() -> None:
        print("so far")
        raise KeyError("gone")

    with pytest.raises(KeyError):
        ranks.run(fail, vgpus[:2])
    assert capsys.readouterr().out == "[rank 0] so far\n"


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals to threads")
@pytest.mark.parametrize("work", [id, lambda x: x.add_(1), reduced])
def test_an_interrupt_ends_all_ranks(vgpus, work):
    began = threading.Event()

    def loop() -> None:
        dist.init_process_group()
        x = torch.ones(2, device="vgpu")
        while True:
            work(x)
            began.set()

    def interrupt() -> None:
        began.wait()
        _thread.interrupt_main()

    helper = threading.Thread(target=interrupt)
    helper.start()
    with pytest.raises(KeyboardInterrupt):
        ranks.run(loop, vgpus)
    helper.join()
    assert not [each for each in threading.enumerate() if each.name.startswith("rank ")]
    assert machine.clock.listeners == []
    assert_usable(vgpus)
