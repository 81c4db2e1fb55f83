"""Collectives give every GPU the same bits, move what they say they move, and refuse the rest."""

from contextlib import ExitStack
from math import ceil, log2

import pytest
import torch

from course_lib import current_stream, devices, side_stream, trace
from course_lib.parallel import collectives
from course_lib.parallel.collectives import (
    all_gather,
    all_reduce,
    broadcast,
    reduce_scatter,
    ring_all_reduce,
    tree_all_reduce,
)
from course_lib.parallel.regions import gather_sequence
from round_numbers import LATENCY, SPEC, seconds

COUNTS = [1, 2, 3, 4, 8]
ALL_REDUCES = [all_reduce, tree_all_reduce, ring_all_reduce]
IN_PLACE = [*ALL_REDUCES, reduce_scatter]
WITHOUT_LAUNCHES = SPEC.with_(launch_overhead=0.0)


def different_tensors(count: int, *shape: int, dtype=torch.float32) -> tuple[list, list]:
    """A tensor for each of so many devices, on the host and on the device."""
    gpus = devices(count, WITHOUT_LAUNCHES)
    torch.manual_seed(0)
    if dtype.is_floating_point and dtype is not torch.bfloat16:
        originals = [torch.randn(shape, dtype=dtype) for _ in gpus]
    else:  # small whole numbers, whose sums are exact
        originals = [torch.randint(-9, 9, shape).to(dtype) for _ in gpus]
    return originals, [tensor.to(gpu) for tensor, gpu in zip(originals, gpus, strict=True)]


def bytes_sent_and_received(t, count: int) -> tuple[list[int], list[int]]:
    names = [f"vgpu:{rank}" for rank in range(count)]
    return tuple(
        [sum(n for route, n in t.bytes_moved.items() if route[end] == name) for name in names]
        for end in (0, 1)
    )


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_all_reduce_moves_what_its_formula_says_and_leaves_equal_bits(count: int) -> None:
    gpus = devices(count)
    torch.manual_seed(0)
    originals = [torch.randn(7, 3) for _ in gpus]
    tensors = [tensor.to(gpu) for tensor, gpu in zip(originals, gpus, strict=True)]
    with trace() as t:
        collectives.all_reduce(tensors)
    assert t.bytes_between_devices == collectives.all_reduce_bytes(count, originals[0].nbytes)
    for tensor in tensors:
        assert torch.allclose(tensor.cpu(), sum(originals), atol=1e-6)
        assert torch.equal(tensor.cpu(), tensors[0].cpu())


@pytest.mark.parametrize("collective", [all_reduce, broadcast])
@pytest.mark.parametrize("make", [tuple, iter], ids=["a tuple", "a generator"])
def test_tensors_may_come_in_a_tuple_or_from_a_generator(collective, make) -> None:
    tensors = [torch.full((3,), float(n + 1), device=gpu) for n, gpu in enumerate(devices(3))]
    collective(make(tensors))
    expected = 6.0 if collective is all_reduce else 1.0
    assert [tensor.tolist() for tensor in tensors] == [[expected] * 3] * 3


def test_two_tensors_on_one_device_are_reduced_over_no_link() -> None:
    (gpu,) = devices(1)
    tensors = [torch.ones(3, device=gpu), torch.ones(3, device=gpu)]
    with trace() as t:
        all_reduce(tensors)
    assert [tensor.tolist() for tensor in tensors] == [[2.0] * 3] * 2
    assert t.bytes_moved == {}


@pytest.mark.parametrize("collective", [*IN_PLACE, broadcast])
def test_tensors_that_do_not_match_are_refused_and_left_alone(collective) -> None:
    one = torch.ones(3)
    for other, words in [
        (torch.ones(4), r"of one shape, these differ: \[\(3,\), \(4,\)\]"),
        (torch.ones(1), r"of one shape, these differ: \[\(3,\), \(1,\)\]"),
        (torch.ones(3, dtype=torch.bfloat16), r"of one dtype, .*torch.float32, torch.bfloat16"),
        (torch.ones(3, dtype=torch.int64), r"of one dtype, .*torch.float32, torch.int64"),
        (one, "one of these is there twice"),
    ]:
        with pytest.raises(ValueError, match=words):
            collective([one, other])
        assert one.tolist() == [1.0] * 3


@pytest.mark.parametrize("collective", [*IN_PLACE, all_gather, broadcast])
def test_what_is_no_list_of_tensors_is_refused(collective) -> None:
    with pytest.raises(ValueError, match="at least one tensor"):
        collective([])
    with pytest.raises(TypeError, match="not a single tensor"):
        collective(torch.ones(2, 3))
    with pytest.raises(TypeError, match="one of these is None"):
        collective([torch.ones(3), None])


@pytest.mark.parametrize("collective", ALL_REDUCES)
@pytest.mark.parametrize("count", COUNTS)
def test_every_all_reduce_leaves_the_sum_with_equal_bits(collective, count: int) -> None:
    # Sizes that N divides, that it does not, smaller than N, none at all; a matrix, a scalar.
    for shape in [(24,), (33,), (2,), (0,), (7, 3), ()]:
        originals, tensors = different_tensors(count, *shape)
        with trace(strict=True):
            assert collective(tensors) is None
        for tensor in tensors:
            assert torch.allclose(tensor.cpu(), sum(originals), atol=1e-5)
            assert torch.equal(tensor.cpu(), tensors[0].cpu())


@pytest.mark.parametrize("collective", ALL_REDUCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.float64])
def test_every_all_reduce_takes_any_dtype(collective, dtype: torch.dtype) -> None:
    originals, tensors = different_tensors(3, 5, 2, dtype=dtype)
    collective(tensors)
    for tensor in tensors:
        assert tensor.dtype == dtype
        assert torch.allclose(tensor.cpu(), sum(originals))


@pytest.mark.parametrize("count", COUNTS)
def test_reduce_scatter_leaves_rank_r_chunk_r_of_the_sum(count: int) -> None:
    for shape in [(16,), (11,), (2,), (0,), (7, 3), (8, 2, 2)]:
        originals, tensors = different_tensors(count, *shape)
        chunks = reduce_scatter(tensors)
        expected = sum(originals).tensor_split(count)
        for chunk, right_one, tensor in zip(chunks, expected, tensors, strict=True):
            assert chunk.device == tensor.device
            assert chunk.shape == right_one.shape
            assert torch.allclose(chunk.cpu(), right_one, atol=1e-5)


@pytest.mark.parametrize("count", COUNTS)
def test_all_gather_joins_the_shards_in_the_order_of_ranks(count: int) -> None:
    for sizes in [[3] * count, list(range(count)), [0] * count, [count, *[0] * (count - 1)]]:
        gpus = devices(count)
        shards = [torch.randn(size, 2) for size in sizes]
        wholes = all_gather([shard.to(gpu) for shard, gpu in zip(shards, gpus, strict=True)])
        assert [whole.device for whole in wholes] == gpus
        assert all(torch.equal(whole.cpu(), torch.cat(shards)) for whole in wholes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
def test_reduce_scatter_and_all_gather_take_any_dtype(dtype: torch.dtype) -> None:
    originals, tensors = different_tensors(3, 5, 2, dtype=dtype)
    for whole in all_gather(reduce_scatter(tensors)):
        assert torch.equal(whole.cpu(), sum(originals))


def test_all_gather_leaves_the_shards_alone_and_shares_no_memory_with_them() -> None:
    originals, shards = different_tensors(2, 4)
    wholes = all_gather(shards)
    wholes[0].zero_()
    assert all(torch.equal(s.cpu(), o) for s, o in zip(shards, originals, strict=True))
    (whole,) = all_gather(shards[:1])
    whole.zero_()
    assert torch.equal(shards[0].cpu(), originals[0])


@pytest.mark.parametrize("count", COUNTS)
def test_in_a_ring_every_device_sends_and_receives_the_least_there_is(count: int) -> None:
    nbytes = 4 * 24  # a multiple of N numbers
    for collective, times in [(ring_all_reduce, 2), (reduce_scatter, 1), (all_gather, count)]:
        _, tensors = different_tensors(count, 24)
        with trace() as t:
            collective(tensors)
        least = [times * (count - 1) * nbytes // count] * count
        assert bytes_sent_and_received(t, count) == (least, least)
    _, tensors = different_tensors(count, 25)
    with trace() as t:
        ring_all_reduce(tensors)
    assert t.bytes_between_devices == collectives.all_reduce_bytes(count, 100)


@pytest.mark.parametrize("count", COUNTS)
def test_a_tree_moves_as_many_bytes_in_all_as_the_direct_way(count: int) -> None:
    _, tensors = different_tensors(count, 25)
    with trace() as t:
        tree_all_reduce(tensors)
    assert t.bytes_between_devices == collectives.all_reduce_bytes(count, 100)


def test_an_empty_chunk_is_not_sent() -> None:
    _, tensors = different_tensors(4, 1)
    with trace() as t:
        ring_all_reduce(tensors)
    assert sum(span.kind == "copy" for span in t.spans) == 6
    assert t.seconds < 6.1 * (LATENCY + 4 / SPEC.link_bandwidth)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("nbytes", [32, 320_000])
def test_the_seconds_are_those_of_the_formulas(count: int, nbytes: int) -> None:
    def link(moved: float) -> float:
        return LATENCY + moved / SPEC.link_bandwidth

    def add(added: float) -> float:
        return 3 * added / SPEC.memory_bandwidth

    chunk, levels = nbytes / count, ceil(log2(count))
    for collective, expected in [
        (all_reduce, (count - 1) * (2 * link(nbytes) + add(nbytes))),
        (tree_all_reduce, levels * (2 * link(nbytes) + add(nbytes))),
        (ring_all_reduce, (count - 1) * (2 * link(chunk) + add(chunk))),
        (reduce_scatter, (count - 1) * (link(chunk) + add(chunk))),
        (all_gather, (count - 1) * link(nbytes)),
    ]:
        _, tensors = different_tensors(count, nbytes // 4)
        with trace() as t:
            collective(tensors)
        if collective is all_gather:  # first each puts its own shard into its place
            expected += max(span.end for span in t.spans if span.kind == "other")
        assert t.seconds == seconds(expected), collective


@pytest.mark.parametrize("collective", [*IN_PLACE, all_gather])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_wait_is_missing_before_or_after(collective, count: int) -> None:
    """The current streams touch the tensors right before and right after, also side streams."""
    for on_side_streams in (False, True):
        gpus = devices(count)
        streams = [side_stream(gpu) if on_side_streams else current_stream(gpu) for gpu in gpus]
        with ExitStack() as stack, trace(strict=True):
            for each in streams:
                stack.enter_context(each)
            tensors = [torch.ones(7, device=gpu) for gpu in gpus]
            results = collective(tensors) or tensors
            for tensor in (*tensors, *results):
                tensor.add_(1)
            again = collective(tensors) or tensors
            del tensors, results
        assert len(again) == count


def test_a_ring_runs_beside_what_is_on_other_streams() -> None:
    gpus = devices(4, WITHOUT_LAUNCHES)
    matrices = [torch.ones(300, 300, device=gpu) for gpu in gpus]
    tensors = [torch.ones(4000, device=gpu) for gpu in gpus]

    def product_and_ring() -> None:
        for matrix in matrices:
            matrix @ matrix
        with ExitStack() as stack:
            for gpu in gpus:
                stack.enter_context(side_stream(gpu))
            ring_all_reduce(tensors[:])

    with trace() as t:
        product_and_ring()
    products = [span for span in t.spans if span.kind == "matmul"]
    first_copy = min(span.start for span in t.spans if span.kind == "copy")
    assert first_copy < min(span.end for span in products)
    assert t.seconds < sum(t.seconds_by_kind().values())


@pytest.mark.parametrize("collective", [ring_all_reduce, reduce_scatter, all_gather])
def test_a_ring_asks_for_contiguous_tensors_in_one_line(collective) -> None:
    one, other = (torch.arange(6.0).reshape(2, 3) for _ in range(2))
    with pytest.raises(ValueError) as caught:
        collective([one.t().contiguous(), other.t()])
    assert str(caught.value) == (
        "a ring needs contiguous tensors, and that of rank 1 is not: call .contiguous() on it"
    )
    assert torch.equal(other, one)


def test_all_gather_refuses_shards_that_differ_in_more_than_their_length() -> None:
    with pytest.raises(ValueError, match="of one shape"):
        all_gather([torch.ones(2, 3), torch.ones(2, 4)])
    with pytest.raises(ValueError, match="of one dtype"):
        all_gather([torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64)])


def test_tensors_on_one_device_go_round_a_ring_over_no_link() -> None:
    (gpu,) = devices(1)
    for collective in (tree_all_reduce, ring_all_reduce):
        tensors = [torch.full((5,), float(n), device=gpu) for n in range(3)]
        with trace(strict=True) as t:
            collective(tensors)
        assert [tensor.tolist() for tensor in tensors] == [[3.0] * 5] * 3
        assert t.bytes_between_devices == 0


def test_a_gather_that_would_lose_gradients_is_refused_and_names_the_one_that_does_not() -> None:
    gpus = devices(3)
    leaves = [torch.full((2, 3), float(rank), device=gpu) for rank, gpu in enumerate(gpus)]
    for leaf in leaves:
        leaf.requires_grad_()
    shards = [2 * leaf for leaf in leaves]
    with pytest.raises(RuntimeError, match=r"use regions\.gather_sequence, or detach them"):
        all_gather(shards)
    with torch.no_grad():
        assert len(all_gather(shards)) == 3
    torch.autograd.backward([whole.square().sum() for whole in gather_sequence(shards)])
    for leaf in leaves:  # each is in three wholes
        assert torch.allclose(leaf.grad, 3 * 2 * 2 * 2 * leaf.detach())
