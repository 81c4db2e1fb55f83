"""Context parallelism is the same training as on one GPU, and each device does its part of it."""

from __future__ import annotations

import copy
import gc
import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

import course_lib
from course_lib import Spec, Trace, devices, trace
from course_lib.models import GPT, next_token_loss
from course_lib.parallel.blockwise_attention import attend, merge
from course_lib.parallel.context_parallel import (
    ContextParallelGPT,
    join_sequence,
    next_token_losses,
    positions,
    ring_attention,
    split_sequence,
)
from course_lib.parallel.data_parallel import all_reduce_gradients
from course_lib.parallel.proof import largest_difference
from round_numbers import SPEC

counts = pytest.mark.parametrize("count", [1, 2, 3, 4])
masks = pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
orders = pytest.mark.parametrize("zigzag", [False, True], ids=["contiguous", "zigzag"])
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def float64(vgpus: list[torch.device]):
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def queries_keys_values(T: int, K: int = 4) -> list[Tensor]:
    return [torch.randn(2, 3, T, K, requires_grad=True) for _ in range(3)]


def in_a_ring(
    whole: list[Tensor],
    gpus: list[torch.device],
    causal: bool,
    zigzag: bool = True,
    tile: int = 1024,
) -> Tensor:
    """Split, attend, join."""
    parts = [split_sequence(each, gpus, 2, zigzag) for each in whole]
    return join_sequence(ring_attention(*parts, causal, zigzag, tile), 2, zigzag)


# Who has which tokens.


def test_in_zigzag_order_each_device_has_an_early_and_a_late_chunk() -> None:
    assert [positions(8, 2, rank).tolist() for rank in range(2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_in_contiguous_order_each_device_has_one_chunk() -> None:
    own = [positions(8, 2, rank, zigzag=False).tolist() for rank in range(2)]
    assert own == [[0, 1, 2, 3], [4, 5, 6, 7]]


@counts
@orders
@pytest.mark.parametrize("dimension", [1, -2])
def test_a_sequence_that_was_split_can_be_joined(count: int, zigzag: bool, dimension: int) -> None:
    gpus = devices(count)
    whole = torch.randn(2, 24, 3)
    parts = split_sequence(whole, gpus, dimension, zigzag)
    assert [part.device for part in parts] == gpus
    assert [part.shape for part in parts] == [(2, 24 // count, 3)] * count
    assert torch.equal(join_sequence(parts, dimension, zigzag), whole)


# The running softmax.


def full_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def test_blocks_one_after_the_other_are_as_good_as_all_at_once() -> None:
    q, k, v = (each.detach() for each in queries_keys_values(12))
    so_far = attend(q, k[..., :5, :], v[..., :5, :])
    for block in (slice(5, 6), slice(6, 12)):
        so_far = merge(*so_far, *attend(q, k[..., block, :], v[..., block, :]))
    torch.testing.assert_close(so_far[0], full_attention(q, k, v), **CLOSE)


@pytest.mark.parametrize("size", [1e3, 1e5])
@pytest.mark.parametrize("larger", [0, 1])
def test_no_exponential_overflows(size: float, larger: int) -> None:
    q, k, v = (each.detach() for each in queries_keys_values(8))
    blocks = [[k[..., :4, :], v[..., :4, :]], [k[..., 4:, :], v[..., 4:, :]]]
    blocks[larger][0].mul_(size)
    out, log_sum = merge(*attend(q, *blocks[0]), *attend(q, *blocks[1]))
    assert log_sum.abs().max() > 710  # whose exponential is infinite
    torch.testing.assert_close(out, full_attention(q, k, v), **CLOSE)


# The same as on one GPU.


@counts
@masks
@orders
def test_ring_attention_equals_attention_on_one_gpu(count: int, causal: bool, zigzag: bool) -> None:
    gpus = devices(count)
    whole = queries_keys_values(24)
    theirs = full_attention(*whole, causal)
    weights = torch.randn_like(theirs)
    expected = torch.autograd.grad((theirs * weights).sum(), whole)
    for tile in (1024, 4):
        with trace(strict=True):
            ours = in_a_ring(whole, gpus, causal, zigzag, tile)
            gradients = torch.autograd.grad((ours * weights).sum(), whole)
        torch.testing.assert_close(ours, theirs, **CLOSE)
        torch.testing.assert_close(gradients, expected, **CLOSE)


@masks
@orders
def test_its_gradients_are_those_of_its_values(causal: bool, zigzag: bool) -> None:
    gpus = devices(3)
    whole = [torch.randn(1, 1, 6, 2, requires_grad=True) for _ in range(3)]
    assert gradcheck(lambda *each: in_a_ring(each, gpus, causal, zigzag), whole, fast_mode=True)


@orders
def test_a_device_without_a_loss_takes_part_in_the_backward_pass(zigzag: bool) -> None:
    gpus = devices(3)
    whole = queries_keys_values(12)
    parts = [split_sequence(each, gpus, 2, zigzag) for each in whole]
    own = positions(12, 3, 1, zigzag)
    ours = torch.autograd.grad(ring_attention(*parts, True, zigzag)[1].sum(), whole)
    theirs = torch.autograd.grad(full_attention(*whole, True)[..., own, :].sum(), whole)
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_in_bfloat16_it_is_as_exact_as_attention_on_one_gpu() -> None:
    gpus = devices(4)
    whole = [each.detach().bfloat16() for each in queries_keys_values(64, K=16)]
    exact = full_attention(*(each.double() for each in whole), causal=True)
    ours, theirs = in_a_ring(whole, gpus, True, tile=4), full_attention(*whole, causal=True)
    assert ours.dtype == torch.bfloat16
    error, usual = ((each - exact).abs().max() for each in (ours, theirs))
    assert error < 1.5 * usual


def test_in_bfloat16_its_gradients_are_summed_in_float32() -> None:
    gpus = devices(4)
    whole = [each.detach().bfloat16().requires_grad_() for each in queries_keys_values(128, K=16)]
    gradient = torch.randn(2, 3, 128, 16).bfloat16()

    def gradients(function, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        out = function(*tensors)
        return torch.autograd.grad(out, tensors, gradient.to(out.dtype))

    exact = gradients(
        lambda *each: full_attention(*each, False),
        [each.detach().double().requires_grad_() for each in whole],
    )
    ours = gradients(lambda *each: in_a_ring(list(each), gpus, False, tile=4), whole)
    for right, one in zip(exact, ours, strict=True):
        assert one.dtype == torch.bfloat16
        # About one rounding, however many tiles: summed in bfloat16 it would be two or three.
        assert (one - right).norm() / right.norm() < 1.5 * 2**-8


def small_gpt(**changes: object) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(13, **{"context": 24, "width": 8, "heads": 2, "depth": 1} | changes)
    for parameter in gpt.parameters():  # what happens to a bias of zero would not be seen
        torch.nn.init.normal_(parameter, std=0.3)
    return gpt


def backward(parallel: ContextParallelGPT, gpus: list[torch.device], *batch: Tensor) -> Tensor:
    tokens, targets = (split_sequence(each, gpus, 1) for each in batch)
    losses = next_token_losses(parallel(tokens), targets)
    torch.autograd.backward(losses)
    all_reduce_gradients(parallel.replicas)
    return sum(loss.detach().cpu() for loss in losses)


@counts
def test_training_a_gpt_is_the_same_as_on_one_gpu(count: int) -> None:
    gpus = devices(count)
    gpt = small_gpt(depth=2)
    parallel = ContextParallelGPT(gpt, gpus)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (gpt, parallel)]
    for _ in range(2):
        tokens_BT, targets_BT = torch.randint(13, (2, 2, 24))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = next_token_loss(gpt(tokens_BT), targets_BT)
        loss.backward()
        with trace(strict=True):
            ours = backward(parallel, gpus, tokens_BT, targets_BT)
        torch.testing.assert_close(ours, loss.detach(), **CLOSE)
        for replica in parallel.replicas:
            for mine, theirs in zip(replica.parameters(), gpt.parameters(), strict=True):
                torch.testing.assert_close(mine.grad.cpu(), theirs.grad, **CLOSE)
        for optimizer in optimizers:
            optimizer.step()
    for replica in parallel.replicas:
        assert largest_difference(replica, gpt) < 1e-12
        assert largest_difference(replica, parallel.replicas[0]) == 0


def test_a_shorter_sequence_than_the_context_has_its_own_positions() -> None:
    gpus = devices(2)
    gpt = small_gpt()
    tokens_BT = torch.randint(13, (2, 8))
    scores = ContextParallelGPT(gpt, gpus)(split_sequence(tokens_BT, gpus, 1))
    torch.testing.assert_close(join_sequence(scores, 1), gpt(tokens_BT), **CLOSE)


@pytest.mark.parametrize("first", [1, 5, 20])
@orders
def test_padding_does_not_count_wherever_it_gathers(first: int, zigzag: bool) -> None:
    gpus = devices(4)
    gpt = small_gpt()
    tokens_BT, targets_BT = torch.randint(13, (2, 2, 24))
    targets_BT[:, first:] = -100
    loss = next_token_loss(gpt(tokens_BT), targets_BT)
    loss.backward()
    parallel = ContextParallelGPT(gpt, gpus)
    parts = [split_sequence(each, gpus, 1, zigzag) for each in (tokens_BT, targets_BT)]
    losses = next_token_losses(parallel(parts[0]), parts[1])
    torch.autograd.backward(losses)
    all_reduce_gradients(parallel.replicas)
    torch.testing.assert_close(sum(each.detach().cpu() for each in losses), loss.detach(), **CLOSE)
    for mine, theirs in zip(parallel.replicas[0].parameters(), gpt.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.cpu(), theirs.grad, **CLOSE)


def test_after_its_first_step_it_copies_nothing_from_the_host() -> None:
    gpus = devices(2)
    parallel = ContextParallelGPT(small_gpt(), gpus)
    tokens, targets = (split_sequence(each, gpus, 1) for each in torch.randint(13, (2, 2, 8)))
    next_token_losses(parallel(tokens), targets)
    with trace(strict=True) as recording:
        torch.autograd.backward(next_token_losses(parallel(tokens), targets))
    assert not [route for route in recording.bytes_moved if "host" in route]


def test_making_it_leaves_the_model_as_it_was() -> None:
    gpt = small_gpt()
    before = copy.deepcopy(gpt)
    for parameter in ContextParallelGPT(gpt, devices(2)).parameters():
        parameter.data.zero_()
    assert largest_difference(gpt, before) == 0


# What moves, and what is computed.


def parts_on(gpus: list[torch.device], T: int, K: int = 4, **form: object) -> list[list[Tensor]]:
    """Queries, keys and values, T tokens of each on every device."""
    return [
        [torch.zeros(1, 2, T, K, device=gpu, requires_grad=True, **form) for gpu in gpus]
        for _ in range(3)
    ]


def forward_and_backward(parts: list[list[Tensor]], **how: object) -> tuple[Trace, Trace]:
    with trace(strict=True) as forward:
        outs = ring_attention(*parts, **how)
    gradients = [torch.ones_like(out) for out in outs]
    with trace(strict=True) as backward:
        torch.autograd.backward(outs, gradients)
    return forward, backward


@counts
@orders
def test_each_device_sends_most_keys_and_values_on_once_and_backward_gradients_too(
    count: int, zigzag: bool
) -> None:
    gpus = devices(count)
    parts = parts_on(gpus, T=4)
    all_keys_and_values = 2 * sum(part.nbytes for part in parts[0])
    most = (count - 1) / count * all_keys_and_values
    forward, backward = forward_and_backward(parts, causal=True, zigzag=zigzag)
    ring = list(zip(map(str, gpus), map(str, gpus[1:] + gpus[:1]), strict=True))
    assert forward.bytes_moved == ({route: most for route in ring} if count > 1 else {})
    assert backward.bytes_moved == ({route: 2 * most for route in ring} if count > 1 else {})


def flops(recording: Trace) -> list[float]:
    """Of each device."""
    total = Counter()
    for span in recording.spans:
        total[span.device] += span.flops
    return [total[rank] for rank in range(recording.device_count)]


@counts
def test_in_zigzag_order_all_devices_compute_equally_much(count: int) -> None:
    forward, backward = forward_and_backward(parts_on(devices(count), T=4), causal=True)
    a_chunk = 2 * 2 * (2 * 2 * 2 * 4)  # two products, H = 2, of 2 queries, 2 keys and K = 4
    assert flops(forward) == [(2 * count + 1) * a_chunk] * count
    assert flops(backward) == [(2 * count + 1) * a_chunk * 5 / 2] * count


@counts
def test_in_contiguous_order_the_last_device_computes_the_most(count: int) -> None:
    parts = parts_on(devices(count), T=4)
    forward, _ = forward_and_backward(parts, causal=True, zigzag=False)
    a_block = 2 * 2 * (2 * 4 * 4 * 4)
    assert flops(forward) == [(rank + 1) * a_block for rank in range(count)]


def test_without_a_mask_all_pairs_are_computed() -> None:
    forward, _ = forward_and_backward(parts_on(devices(3), T=4), causal=False)
    assert flops(forward) == [3 * 2 * 2 * (2 * 4 * 4 * 4)] * 3


# How long it takes.

LARGE = {"T": 256, "K": 32}


def ring_spec(**changes: float) -> Spec:
    return SPEC.with_(**{"launch_overhead": 0, "latency": 0} | changes)


@pytest.mark.parametrize("count", [2, 4])
def test_with_a_causal_mask_zigzag_order_is_faster(count: int) -> None:
    seconds = {}
    for zigzag in (True, False):
        parts = parts_on(devices(count, ring_spec(link_bandwidth=1e9), "meta"), **LARGE)
        both = forward_and_backward(parts, causal=True, zigzag=zigzag)
        seconds[zigzag] = sum(each.seconds for each in both)
    # Products alone would be at (2N + 1) / 4N of the time.
    assert seconds[True] < 0.8 * seconds[False]


def test_blocks_travel_while_devices_compute() -> None:
    parts = parts_on(devices(4, ring_spec(link_bandwidth=4e6), "meta"), **LARGE)
    forward, backward = forward_and_backward(parts, causal=False, zigzag=False)
    (computing, copying), (computing_back, copying_back) = map(
        seconds_of_first, (forward, backward)
    )
    assert copying > 0.4 * computing
    assert forward.seconds == pytest.approx(computing, rel=0.01)
    # Three blocks of keys and values, and three of gradients, the last of which come home alone.
    assert backward.seconds == pytest.approx(computing_back + copying_back / 6, rel=0.01)


def seconds_of_first(recording: Trace) -> tuple[float, float]:
    """How long the first device computes, and how long it sends."""
    spans = [span for span in recording.spans if span.device == 0]
    computing, copying = (
        math.fsum(span.end - span.start for span in spans if (span.kind == "copy") is is_copy)
        for is_copy in (False, True)
    )
    return computing, copying


# What is held.


def fresh(count: int) -> list[torch.device]:
    gpus = devices(count, SPEC, "meta")
    for gpu in gpus:
        course_lib.reset_peak_memory(gpu)
    return gpus


def peak(length: int, count: int, tile: int = 8) -> int:
    """Bytes that any device holds at most, in attention to ``length`` tokens and back."""
    gpus = fresh(count)
    outs = ring_attention(*parts_on(gpus, length // count), causal=True, tile=tile)
    torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    return max(map(course_lib.peak_memory, gpus))


def test_twice_the_sequence_on_twice_the_devices_needs_the_same_memory() -> None:
    assert peak(64, 4) == peak(128, 8)


@pytest.mark.parametrize("count", [1, 2])
def test_memory_grows_as_the_sequence_and_not_as_its_square(count: int) -> None:
    assert 1 < peak(48 * count, count) / peak(16 * count, count) < 3


def test_full_attention_on_one_device_grows_as_the_square_of_the_sequence() -> None:
    def full_peak(length: int) -> int:
        (gpu,) = fresh(1)
        (q,), (k,), (v,) = parts_on([gpu], length)
        ((q @ k.mT).softmax(-1) @ v).sum().backward()
        return course_lib.peak_memory(gpu)

    assert full_peak(512) > 3.5 * full_peak(256)
    assert full_peak(512) > 20 * peak(512, 4, tile=64)


def test_all_memory_is_free_again() -> None:
    gpus = devices(3)
    parts = parts_on(gpus, T=4)
    forward_and_backward(parts, causal=True)
    del parts
    gc.collect()
    assert [course_lib.memory_in_use(gpu) for gpu in gpus] == [0, 0, 0]


# What cannot be done.


def test_a_sequence_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="12 tokens does not divide into 8 equal chunks, 2 for"):
        split_sequence(torch.zeros(2, 12), devices(4), 1)
    with pytest.raises(ValueError, match="14 tokens does not divide into 4 equal chunks, 1 for"):
        split_sequence(torch.zeros(2, 14), devices(4), 1, zigzag=False)
    with pytest.raises(ValueError, match="6 tokens does not divide into 4 equal chunks, 2 for"):
        ring_attention(*parts_on(devices(2), T=3), causal=True)


def test_parts_that_do_not_fit_are_refused() -> None:
    gpus = devices(2)
    qs, ks, vs = parts_on(gpus, T=4)
    with pytest.raises(ValueError, match="not 2 parts of queries, 1 parts of keys, 2 parts of val"):
        ring_attention(qs, ks[:1], vs, causal=True)
    with pytest.raises(ValueError, match="not 0 parts of queries, 0 parts of keys, 0 parts of val"):
        ring_attention([], [], [], causal=True)
    with pytest.raises(
        ValueError, match=r"one shape and dtype, not \['\(1, 2, 2, 4\) torch.float64'"
    ):
        ring_attention(qs, parts_on(gpus, T=2)[1], vs, causal=True)


def test_parts_in_another_order_are_refused() -> None:
    gpus = devices(2)
    whole = torch.zeros(1, 1, 8, 4)
    plain, dealt = (split_sequence(whole, gpus, 2, zigzag) for zigzag in (False, True))
    with pytest.raises(ValueError, match="split with zigzag=False is taken here for one with zigz"):
        ring_attention(plain, plain, plain, causal=True)
    with pytest.raises(ValueError, match="split with zigzag=True is taken here for one with zigz"):
        join_sequence(dealt, 2, zigzag=False)
    parallel = ContextParallelGPT(small_gpt(), gpus)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    scores = parallel(split_sequence(tokens, gpus, 1, zigzag=False))
    with pytest.raises(ValueError, match="split with zigzag=True is taken here for one with zigz"):
        next_token_losses(scores, split_sequence(tokens, gpus, 1))


def test_a_single_tensor_in_place_of_a_list_is_refused() -> None:
    q = torch.zeros(2, 2, 4, 4)
    with pytest.raises(TypeError, match="takes a list of queries, one tensor a device"):
        ring_attention(q, q, q, causal=True)


def test_parts_for_other_devices_are_refused() -> None:
    gpus = devices(3)
    parallel = ContextParallelGPT(small_gpt(), gpus)
    with pytest.raises(ValueError, match="on 3 devices, and was given 2 tensors"):
        parallel(split_sequence(torch.zeros(1, 8, dtype=torch.int64), gpus[:2], 1))


def test_a_device_that_is_not_there_has_no_positions() -> None:
    with pytest.raises(ValueError, match="there is no device 2 among 2: they count from 0"):
        positions(8, 2, 2)


def test_a_tile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="a tile has at least one token: tile=0"):
        ring_attention(*parts_on(devices(2), T=4), causal=True, tile=0)


def test_more_tokens_than_the_context_are_refused() -> None:
    gpus = devices(2)
    parallel = ContextParallelGPT(small_gpt(), gpus)
    with pytest.raises(ValueError, match="28 tokens are more than this GPT can read, 24"):
        parallel(split_sequence(torch.zeros(1, 28, dtype=torch.int64), gpus, 1))
