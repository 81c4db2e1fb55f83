"""``torch.distributed`` on virtual ranks: values, bytes, and what runs beside what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import course_lib
from course_lib import ranks
from course_lib.parallel import node_collectives
from course_lib.parallel.collectives import ring_all_reduce
from course_lib.virtual.machine import machine

N = 4


def on_ranks(vgpus: list[torch.device], function: Callable[[int], Any]) -> list[Any]:
    def with_a_group() -> Any:
        dist.init_process_group()
        return function(dist.get_rank())

    return ranks.run(with_a_group, vgpus)


def numbers(rank: int, size: int = 6, device: str = "vgpu") -> Tensor:
    return torch.arange(size, device=device, dtype=torch.float32) + 10 * rank


ALL = torch.stack([torch.arange(6.0) + 10 * rank for rank in range(N)])


@pytest.mark.parametrize("device", ["vgpu", "cpu"])
@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (dist.ReduceOp.SUM, ALL.sum(0)),
        (dist.ReduceOp.AVG, ALL.mean(0)),
        (dist.ReduceOp.PRODUCT, ALL.prod(0)),
        (dist.ReduceOp.MIN, ALL.amin(0)),
        (dist.ReduceOp.MAX, ALL.amax(0)),
    ],
)
def test_all_reduce(vgpus, device, op, expected):
    def reduce(rank: int) -> Tensor:
        x = numbers(rank, device=device)
        dist.all_reduce(x, op)
        return x.cpu()

    assert torch.equal(torch.stack(on_ranks(vgpus, reduce)), expected.expand(N, -1))


@pytest.mark.parametrize(
    ("op", "expected"),
    [(dist.ReduceOp.BAND, 0b1000), (dist.ReduceOp.BOR, 0b1111), (dist.ReduceOp.BXOR, 0b0111)],
    ids=["and", "or", "xor"],
)
def test_all_reduce_of_bits(vgpus, op, expected):
    def reduce(rank: int) -> int:
        x = torch.tensor([0b1000 | (1 << rank if rank < 3 else 0)], device="vgpu")
        dist.all_reduce(x, op)
        return int(x.item())

    assert on_ranks(vgpus, reduce) == [expected] * N


@pytest.mark.parametrize("device", ["vgpu", "cpu"])
def test_gathers_and_scatters(vgpus, device):
    def use_all(rank: int) -> dict[str, Tensor]:
        x = numbers(rank, device=device)
        gathered = [torch.empty_like(x) for _ in range(N)]
        dist.all_gather(gathered, x)
        whole = torch.empty(N * 6, device=device)
        dist.all_gather_single(whole, x)
        parts = list(torch.arange(8.0, device=device).add(rank).chunk(N))
        mine = torch.empty(2, device=device)
        dist.reduce_scatter(mine, parts)
        also_mine = torch.empty(2, device=device)
        source = torch.cat(parts)
        dist.reduce_scatter_single(also_mine, source, dist.ReduceOp.AVG)
        collected = [torch.empty_like(x) for _ in range(N)] if rank == 2 else None
        dist.gather(x, collected, dst=2)
        dealt = torch.empty(2, device=device)
        dist.scatter(dealt, parts if rank == 1 else None, src=1)
        return {
            "gathered": torch.stack(gathered).cpu(),
            "whole": whole.cpu().view(N, 6),
            "mine": mine.cpu(),
            "also mine": also_mine.cpu(),
            "source": source.cpu(),
            "collected": torch.stack(collected).cpu() if collected else ALL,
            "dealt": dealt.cpu(),
        }

    for rank, got in enumerate(on_ranks(vgpus, use_all)):
        for name in ("gathered", "whole", "collected"):
            assert torch.equal(got[name], ALL), name
        own = torch.tensor([2.0 * rank, 2.0 * rank + 1])
        assert torch.equal(got["mine"], N * own + 6)
        assert torch.equal(got["also mine"], own + 1.5)
        assert torch.equal(got["source"], torch.arange(8.0) + rank)  # an input stays as it was
        assert torch.equal(got["dealt"], own + 1)


@pytest.mark.parametrize("device", ["vgpu", "cpu"])
def test_broadcast_and_reduce(vgpus, device):
    def use_both(rank: int) -> tuple[Tensor, Tensor]:
        x, y = numbers(rank, device=device), numbers(rank, device=device)
        dist.broadcast(x, src=3)
        dist.reduce(y, dst=1, op=dist.ReduceOp.AVG)
        return x.cpu(), y.cpu()

    for rank, (x, y) in enumerate(on_ranks(vgpus, use_both)):
        assert torch.equal(x, ALL[3])
        assert torch.equal(y, ALL.mean(0) if rank == 1 else ALL[rank])


def test_an_all_to_all_over_nodes_takes_the_rounds_of_the_one_by_hand():
    """So that no round waits for a network card while others have done with their fast links."""
    patient = course_lib.CLASSROOM.with_(launch_overhead=0.0)
    gpus = course_lib.devices(8, patient, nodes=2, backing="meta")
    parts = [[torch.empty(10_000, device=gpu) for _ in gpus] for gpu in gpus]
    with course_lib.trace() as by_hand:
        node_collectives.all_to_all(parts)

    def exchange() -> None:
        dist.init_process_group()
        x = torch.empty(8 * 10_000, device="vgpu")
        dist.all_to_all_single(torch.empty_like(x), x)

    with course_lib.trace() as trace:
        ranks.run(exchange, gpus)
    sent = [span for span in trace.spans if span.route and None not in span.route]
    seconds = max(span.end for span in sent) - min(span.start for span in sent)
    assert seconds == pytest.approx(by_hand.seconds, rel=0.01)


@pytest.mark.parametrize("device", ["vgpu", "cpu"])
def test_all_to_all(vgpus, device):
    def exchange(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.arange(4.0, device=device) + 10 * rank
        even = torch.empty_like(x)
        dist.all_to_all_single(even, x)
        sizes = [1 + (rank + other) % 2 for other in range(N)]  # symmetric
        rows = torch.full((sum(sizes),), float(rank), device=device)
        uneven = torch.empty(sum(sizes), device=device)
        dist.all_to_all_single(uneven, rows, sizes, sizes)
        outputs = [torch.empty(1, device=device) for _ in range(N)]
        dist.all_to_all(outputs, list(x.chunk(N)))
        return even.cpu(), uneven.cpu(), torch.cat(outputs).cpu()

    for rank, (even, uneven, listed) in enumerate(on_ranks(vgpus, exchange)):
        expected = torch.tensor([10.0 * other + rank for other in range(N)])
        assert torch.equal(even, expected)
        assert torch.equal(listed, expected)
        sizes = torch.tensor([1 + (rank + other) % 2 for other in range(N)])
        assert torch.equal(uneven, torch.arange(4.0).repeat_interleave(sizes))


@pytest.mark.parametrize("device", ["vgpu", "cpu"])
def test_messages(vgpus, device):
    def pass_on(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        x, y, z = numbers(rank, device=device), numbers(0, device=device), numbers(0, device=device)
        if rank == 0:
            dist.send(x, dst=1)
        elif rank == 1:
            dist.recv(y, src=0)
        following, before = (rank + 1) % N, (rank - 1) % N
        works = [dist.isend(x, following, tag=5), dist.irecv(z, before, tag=5)]
        for work in works:
            work.wait()
        w = torch.empty_like(x)
        ops = [dist.P2POp(dist.isend, x, before), dist.P2POp(dist.irecv, w, following)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        return y.cpu(), z.cpu(), w.cpu()

    for rank, (_, z, w) in enumerate(on_ranks(vgpus, pass_on)):
        assert torch.equal(z, ALL[(rank - 1) % N])
        assert torch.equal(w, ALL[(rank + 1) % N])


def test_messages_arrive_in_the_order_of_their_tag(vgpus):
    def pass_on(rank: int) -> list[float]:
        got = [torch.empty(1, device="vgpu") for _ in range(3)]
        if rank == 0:
            for value, tag in ((1.0, 7), (2.0, 8), (3.0, 7)):
                dist.isend(torch.full((1,), value, device="vgpu"), 1, tag=tag)
        elif rank == 1:
            for tensor, tag in zip(got, (8, 7, 7), strict=True):
                dist.recv(tensor, 0, tag=tag)
        return [x.item() for x in got]

    assert on_ranks(vgpus, pass_on)[1] == [2.0, 1.0, 3.0]


def test_objects(vgpus):
    def share(rank: int) -> tuple[list, list, Any]:
        everyone: list[Any] = [None] * N
        dist.all_gather_object(everyone, {"rank": rank})
        said = [f"from {rank}"]
        dist.broadcast_object_list(said, src=2)
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, ["a", "bb", "ccc", "dddd"] if rank == 0 else None, src=0)
        return everyone, said, mine[0]

    for rank, (everyone, said, mine) in enumerate(on_ranks(vgpus, share)):
        assert everyone == [{"rank": other} for other in range(N)]
        assert said == ["from 2"]
        assert mine == "abcd"[rank] * (rank + 1)


def test_groups_and_meshes(vgpus):
    def sums(rank: int) -> tuple[float, ...]:
        pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        x = torch.tensor([float(rank)], device="vgpu")
        dist.all_reduce(x, group=pairs[rank % 2])
        mesh = init_device_mesh("vgpu", (2, 2), mesh_dim_names=("rows", "columns"))
        y, z = torch.tensor([float(rank)], device="vgpu"), torch.tensor([1.0 * rank], device="vgpu")
        dist.all_reduce(y, group=mesh.get_group("rows"))
        dist.all_reduce(z, group=mesh["columns"].get_group())
        return x.item(), y.item(), z.item(), mesh.get_local_rank("rows")

    assert on_ranks(vgpus, sums) == [(2, 2, 1, 0), (4, 4, 1, 0), (2, 2, 5, 1), (4, 4, 5, 1)]


def test_functional_collectives(vgpus):
    def use_all(rank: int) -> list[Tensor]:
        group = dist.group.WORLD
        x = numbers(rank, 4)
        scattered = funcol.reduce_scatter_single(x, "sum", 0, group)
        results = [
            funcol.all_reduce(x, "avg", group),
            funcol.all_gather_single(x, 0, group),
            scattered + 0,
            funcol.all_to_all_single(x, None, None, group),
            funcol.broadcast(x, 1, group),
            *funcol.all_reduce_coalesced([x, 2 * x], "sum", group),
            x,
        ]
        return [(result * 1).cpu() for result in results]

    all_4 = ALL[:, :4]
    with course_lib.trace(strict=True):
        made = on_ranks(vgpus, use_all)
    for rank, got in enumerate(made):
        expected = [
            all_4.mean(0),
            all_4.flatten(),
            all_4.sum(0)[rank : rank + 1],
            all_4[:, rank],
            all_4[1],
            all_4.sum(0),
            2 * all_4.sum(0),
            all_4[rank],
        ]
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("collective", "sent"),
    [
        (lambda x: dist.all_reduce(x), [1.5] * N),
        (lambda x: dist.all_gather_single(x.new_empty(4 * len(x)), x), [3] * N),
        (lambda x: dist.reduce_scatter_single(x.new_empty(len(x) // 4), x), [0.75] * N),
        (lambda x: dist.all_to_all_single(torch.empty_like(x), x), [0.75] * N),
        (lambda x: dist.broadcast(x, 1), [0, 1, 1, 1]),
        (lambda x: dist.reduce(x, 1), [1, 0, 1, 1]),
        (lambda x: dist.barrier(), [0] * N),
        (lambda x: dist.all_reduce(x.cpu()), [0] * N),
    ],
)
def test_bytes_are_those_of_a_ring(vgpus, collective, sent):
    """In tensors of 4,000 bytes that each rank sends."""

    with course_lib.trace() as trace:
        on_ranks(vgpus, lambda rank: collective(torch.ones(1000, device="vgpu")))
    assert [trace.bytes_sent(gpu) / 4000 for gpu in vgpus] == sent
    assert trace.hazards == []


def test_an_all_reduce_is_the_course_s_own(vgpus):
    """Bit for bit, and in as many seconds on the devices."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(1001, generator=generator) for _ in range(N)]
    flat = [value.to(gpu) for value, gpu in zip(values, vgpus, strict=True)]
    course_lib.synchronize()
    with course_lib.trace() as by_hand:
        ring_all_reduce(flat)

    def reduce(rank: int) -> Tensor:
        x = values[rank].to("vgpu")
        dist.all_reduce(x)
        return x.cpu()

    with course_lib.trace() as by_ranks:
        got = on_ranks(vgpus, reduce)
    for one, other in zip(got, flat, strict=True):
        assert torch.equal(one, other.cpu())
    assert by_ranks.bytes_between_devices == by_hand.bytes_between_devices


def spans_of(trace: course_lib.Trace, name: str) -> list[tuple[float, float]]:
    return [(span.start, span.end) for span in trace.spans if span.name == name]


@pytest.mark.parametrize("waits_first", [False, True])
def test_communication_runs_beside_computing_only_when_it_may(gpus, waits_first):
    def work(rank: int) -> None:
        x = torch.ones(500, 500, device="vgpu")
        pending = dist.all_reduce(torch.ones(10_000, device="vgpu"), async_op=True)
        if waits_first:
            pending.wait()
        x @ x
        pending.wait()

    with course_lib.trace() as trace:
        on_ranks(gpus, work)
    copies = [span for span in trace.spans if span.route and None not in span.route]
    products = [span for span in trace.spans if span.name == "mm"]
    first_product = min(span.start for span in products)
    last_copy = max(span.end for span in copies)
    assert (first_product >= last_copy) is waits_first
    assert trace.hazards == []


def test_a_collective_starts_when_the_last_rank_is_there_and_not_later(gpus):
    """What a rank does after its call, before the others come, delays nobody."""

    def work(rank: int) -> None:
        x = torch.ones(300, 300, device="vgpu")
        if rank == 3:
            x = x @ x  # comes last
        pending = dist.all_reduce(torch.ones(1000, device="vgpu"), async_op=True)
        for _ in range(50):
            x = x @ x
        pending.wait()

    with course_lib.trace() as trace:
        on_ranks(gpus, work)
    copies = [span for span in trace.spans if span.route and 3 in span.route]
    products_of_3 = sorted(s.end for s in trace.spans if s.name == "mm" and s.device == 3)
    assert min(span.start for span in copies) >= products_of_3[0] - 1e-12
    assert max(span.end for span in copies) < products_of_3[-1]


def test_a_result_that_is_used_without_waiting_is_reported(vgpus):
    def forget(rank: int) -> None:
        x = torch.ones(1000, device="vgpu")
        pending = dist.all_reduce(x, async_op=True)
        x.add_(1)
        pending.wait()

    with course_lib.trace() as trace:
        on_ranks(vgpus, forget)
    assert trace.hazards


def test_synchronize_waits_for_what_was_begun(vgpus):
    def begin(rank: int) -> list[float]:
        x = torch.ones(8, device="vgpu")
        dist.all_reduce(x, async_op=True)
        torch.vgpu.synchronize()
        return x.tolist()

    assert on_ranks(vgpus, begin) == [[4.0] * 8] * N


def test_an_input_keeps_its_version(vgpus):
    """As with NCCL, autograd does not see what a collective writes."""

    def train(rank: int) -> float:
        x = torch.ones(3, device="vgpu", requires_grad=True)
        y = x.exp()
        dist.all_reduce(y.detach())
        y.sum().backward()
        return x.grad[0].item()

    assert on_ranks(vgpus, train)[0] == pytest.approx(4 * torch.e)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: dist.recv(x), "cannot receive from any source"),
        (lambda x: dist.all_gather([x], x), "a tensor for each of the 4 ranks"),
        (lambda x: dist.all_gather_single(x, x.clone()), "4 times the numbers"),
        (lambda x: dist.all_to_all_single(x, x.clone()), "do not divide the 6 rows"),
        (lambda x: dist.all_to_all_single(x[0], x[1]), "the output is a single number"),
        (lambda x: dist.all_to_all_single(x, x, ["2"] * 4, ["2"] * 4), "must be whole numbers"),
        (lambda x: dist.all_to_all_single(x, x, [9, -1, -1, -1], None), "none of them below zero"),
        (lambda x: dist.broadcast(x, src=7), "broadcast: there is no rank 7 .* they are 0 to 3"),
        (lambda x: dist.broadcast(x, src=-1), "broadcast: there is no rank -1"),
        (lambda x: dist.reduce(x, dst=7), "reduce: there is no rank 7"),
        (lambda x: dist.scatter(x, src=-4), "scatter: there is no rank -4"),
        (lambda x: dist.gather(x, dst=7), "gather: there is no rank 7"),
        (lambda x: dist.send(x, dst=9), "send: there is no rank 9"),
        (lambda x: dist.send(x, dst=-1), "send: there is no rank -1"),
        (lambda x: dist.recv(x, src=-1), "receive: there is no rank -1"),
        (lambda x: dist.recv(x, src="0"), "receive: a rank is a whole number, and '0' is none"),
        (lambda x: dist.all_reduce(x, dist.ReduceOp.BAND), "BAND is not there for float32"),
        (lambda x: dist.all_reduce(x > 1, dist.ReduceOp.AVG), "AVG is not there for bool"),
        (
            lambda x: dist.all_reduce(x.to(torch.float8_e4m3fn)),
            "SUM is not there for float8_e4m3fn: reduce another dtype, such as float32",
        ),
    ],
)
def test_what_cannot_be_is_said(vgpus, call, words):
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=words):
        on_ranks(vgpus, lambda rank: call(torch.ones(6, device="vgpu")))


def test_who_asks_until_it_is_done_lets_the_others_come(vgpus):
    def ask(rank: int) -> float:
        x = numbers(rank)
        work = dist.all_reduce(x, async_op=True)
        while not work.is_completed():
            numbers(rank).sum().item()  # time passes
        work.wait()
        return x[0].item()

    assert on_ranks(vgpus, ask) == [60.0] * N


def test_the_store_of_the_ranks_can_be_used(vgpus):
    def meet(rank: int) -> bytes:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"of rank {rank}", str(rank))
        store.wait([f"of rank {other}" for other in range(N)])
        return store.get(f"of rank {(rank + 1) % N}")

    assert on_ranks(vgpus, meet) == [b"1", b"2", b"3", b"0"]


def test_a_run_leaves_no_streams(vgpus):
    on_ranks(vgpus, lambda rank: dist.all_reduce(torch.ones(2, device="vgpu")))
    assert not any(machine.clock._links)
