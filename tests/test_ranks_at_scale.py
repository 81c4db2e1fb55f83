"""Ranks on GPUs without numbers: what a ring of real copies sends, holds and takes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import course_lib
from course_lib import ranks
from course_lib.parallel.all_reduce_costs import ring_seconds

SPEC = course_lib.CLASSROOM
SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "llama_8b_on_paper.py"
Work = Callable[[], Any]


def imported(path: Path) -> Any:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


llama = imported(SCRIPT)


def numbers(size: int) -> torch.Tensor:
    return torch.empty(size, device="vgpu")


def all_reduce(size: int) -> None:
    dist.all_reduce(numbers(size))


def mean(size: int) -> None:
    dist.all_reduce(numbers(size), op=dist.ReduceOp.AVG)


def reduce_scatter(size: int) -> None:
    dist.reduce_scatter_single(numbers(size), numbers(size * dist.get_world_size()))


def mean_of_parts(size: int) -> None:
    parts = [numbers(size) for _ in range(dist.get_world_size())]
    dist.reduce_scatter(numbers(size), parts, op=dist.ReduceOp.AVG)


def all_gather(size: int) -> None:
    dist.all_gather_single(numbers(size * dist.get_world_size()), numbers(size))


def all_gather_in_place(size: int) -> None:
    whole, rank = numbers(size * dist.get_world_size()), dist.get_rank()
    dist.all_gather_single(whole, whole[rank * size : (rank + 1) * size])


def all_gather_of_many_sizes(size: int) -> None:
    sizes = [size + rank for rank in range(dist.get_world_size())]
    dist.all_gather([numbers(each) for each in sizes], numbers(sizes[dist.get_rank()]))


def broadcast(size: int) -> None:
    dist.broadcast(numbers(size), src=1)


def reduce(size: int) -> None:
    dist.reduce(numbers(size), dst=1, op=dist.ReduceOp.MAX)


def gather(size: int) -> None:
    parts = [numbers(size) for _ in range(dist.get_world_size())]
    dist.gather(numbers(size), parts if dist.get_rank() == 0 else None, dst=0)


def scatter(size: int) -> None:
    parts = [numbers(size) for _ in range(dist.get_world_size())]
    dist.scatter(numbers(size), parts if dist.get_rank() == 0 else None, src=0)


def all_to_all(size: int) -> None:
    count = dist.get_world_size()
    dist.all_to_all_single(numbers(size * count), numbers(size * count))


COLLECTIVES = [
    all_reduce,
    mean,
    reduce_scatter,
    mean_of_parts,
    all_gather,
    all_gather_in_place,
    all_gather_of_many_sizes,
    broadcast,
    reduce,
    gather,
    scatter,
    all_to_all,
]


def traced(work: Work, backing: str, count: int, nodes: int = 1) -> course_lib.Trace:
    gpus = course_lib.devices(count, SPEC, backing=backing, nodes=nodes)
    with course_lib.trace(strict=True) as trace:
        ranks.run(work, gpus)
    return trace


def links(trace: course_lib.Trace) -> dict[Any, tuple[int, float, float]]:
    """For each way from one GPU to another: bytes, and when the first began and the last ended."""
    ways: dict[Any, tuple[int, float, float]] = {}
    for span in trace.spans:
        if span.route is not None:
            nbytes, start, end = ways.get(span.route, (0, span.start, span.end))
            total = nbytes + span.bytes
            ways[span.route] = total, min(start, span.start), max(end, span.end)
    return ways


def computed(trace: course_lib.Trace, name: str) -> list[tuple[int, float, float]]:
    return sorted((s.device, s.start, s.end) for s in trace.spans if s.name == name)


@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize(("count", "nodes"), [(2, 1), (4, 1), (8, 2), (12, 1), (12, 2)])
def test_a_counted_ring_sends_holds_and_takes_what_real_copies_do(collective, count, nodes):
    def work() -> None:
        dist.init_process_group()
        for size in (1, 5, 1001):
            collective(size)

    real, counted = [traced(work, backing, count, nodes) for backing in ("cpu", "meta")]
    assert links(counted) == links(real)
    assert counted.bytes_by_link == real.bytes_by_link
    assert counted.seconds == real.seconds > 0
    assert counted.peak_memory == real.peak_memory


def busy(backing: str) -> course_lib.Trace:
    """Products beside two collectives of two groups, on ranks that come at different times."""

    def work() -> None:
        dist.init_process_group()
        rank = dist.get_rank()
        pairs = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
        x, y, z = torch.empty(64, 64, device="vgpu"), numbers(3001), numbers(2000)
        for _ in range(rank):
            x @ x
        one = dist.all_reduce(y, async_op=True)
        for _ in range(40):
            x @ x
        other = dist.reduce_scatter_single(numbers(1000), z, group=pairs[rank // 2], async_op=True)
        for _ in range(5):
            x @ x
        one.wait()
        y.neg()
        other.wait()
        z.neg()

    return traced(work, backing, 4)


def test_beside_products_it_ends_when_real_copies_do():
    """Its sums wait for the cores, its copies for each other, and what waits for it, for it."""
    real, counted = busy("cpu"), busy("meta")
    assert computed(counted, "mm") == computed(real, "mm")
    assert computed(counted, "neg") == computed(real, "neg")
    assert links(counted) == links(real)
    assert counted.seconds == real.seconds
    copies = [span for span in counted.spans if span.route]
    assert any(
        span.start < copy.end and copy.start < span.end
        for copy in copies
        for span in counted.spans
        if span.name == "mm" and span.device in copy.devices
    )


def test_it_is_one_span_a_rank():
    def work() -> None:
        dist.init_process_group()
        dist.all_reduce(numbers(1000))
        dist.reduce_scatter_single(numbers(10), numbers(80))

    trace = traced(work, "meta", 8)
    assert [span.route for span in trace.spans] == 2 * [(rank, (rank + 1) % 8) for rank in range(8)]
    assert {span.streams for span in trace.spans} == {("all ranks", "all ranks")}


def test_a_result_that_is_used_without_waiting_is_reported():
    def work() -> None:
        dist.init_process_group()
        x = numbers(100)
        work = dist.all_reduce(x, async_op=True)
        if dist.get_rank() == 1:
            x.neg()
        work.wait()
        x.neg()

    gpus = course_lib.devices(2, backing="meta")
    with pytest.warns(course_lib.StreamHazard, match="neg on vgpu:1 default stream reads"):
        ranks.run(work, gpus)


def test_a_gpu_without_room_for_a_chunk_says_so():
    def work() -> None:
        dist.init_process_group()
        dist.all_reduce(numbers(1000))

    gpus = course_lib.devices(2, SPEC.with_(memory=5000), backing="meta")
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 2\.00 kB"):
        ranks.run(work, gpus)


def test_an_all_reduce_of_128_ranks_takes_the_seconds_of_its_formula():
    size = 128 * 1000
    spec = SPEC.with_(launch_overhead=0.0)

    def work() -> None:
        dist.init_process_group()
        dist.all_reduce(numbers(size))

    gpus = course_lib.devices(128, spec, backing="meta", nodes=16)
    with course_lib.trace() as trace:
        ranks.run(work, gpus)
    assert trace.seconds == pytest.approx(ring_seconds(spec, 16, 8, 4 * size), rel=1e-9)
    assert trace.bytes_between_devices == 2 * 127 * 4 * size


def fsdp_of_a_small_llama(recomputation: str) -> tuple[float, int]:
    """Seconds and peak of two blocks of the model that ``examples/`` trains at its real size."""
    sizes = llama.Sizes(2, 64, 4, 2, 128, 256, sequence=32)
    result = llama.run(sizes, SPEC, recomputation)
    return result.seconds, result.peak_bytes


def test_recomputing_all_takes_longer_and_holds_less_than_recomputing_half():
    seconds, peak = fsdp_of_a_small_llama("full")
    less_seconds, more_peak = fsdp_of_a_small_llama("selective")
    assert seconds > less_seconds
    assert peak < more_peak


def test_it_is_the_model_of_8_billion_parameters():
    with torch.device("meta"):
        model = llama.Llama(llama.Sizes(), None)
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_030_261_248


def test_it_stands_beside_what_was_published():
    assert llama.published() == {"tokens": 5762.0, "GiB": 82.4}
