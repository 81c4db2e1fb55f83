"""Ulysses is attention on one device, and its bytes cross the ring's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import course_lib
from course_lib.parallel.attention_ring import ring_attention
from course_lib.parallel.context_parallel import join_sequence, split_sequence
from course_lib.parallel.ulysses import ring_attention_bytes, ulysses_attention, ulysses_bytes

B, H, T, K = 2, 8, 16, 3


def whole() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, H, T, K, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def split(tensors: list[Tensor], count: int, zigzag: bool = False) -> list:
    gpus = course_lib.devices(count)
    return [split_sequence(each, gpus, dimension=2, zigzag=zigzag) for each in tensors]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_outputs_and_gradients_are_those_of_one_device(count: int, causal: bool):
    mine, theirs = whole(), whole()
    parts = split(mine, count)
    with course_lib.trace(strict=True):  # no wait is missing
        outs = ulysses_attention(*parts, causal)
    joined = join_sequence(outs, 2, zigzag=False)
    expected = F.scaled_dot_product_attention(*theirs, is_causal=causal)
    torch.testing.assert_close(joined, expected, rtol=1e-12, atol=1e-12)
    (joined**2).sum().backward()
    (expected**2).sum().backward()
    for tensor, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(tensor.grad, right.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_both_attentions_move_what_their_formulas_say(count: int):
    qkv = [tensor.detach() for tensor in whole()]
    nbytes = qkv[0].nbytes
    parts = split(qkv, count)
    with course_lib.trace() as t:
        ulysses_attention(*parts, causal=True)
    assert t.bytes_between_devices == ulysses_bytes(count, nbytes)
    parts = split(qkv, count, zigzag=True)
    with course_lib.trace() as t:
        ring_attention(*parts, causal=True)
    assert t.bytes_between_devices == ring_attention_bytes(count, nbytes)


def test_ulysses_sends_as_much_as_a_ring_on_two_devices_and_less_on_more():
    difference = [ulysses_bytes(n, 1000) - ring_attention_bytes(n, 1000) for n in range(1, 9)]
    assert difference[:2] == [0, 0]
    assert all(less < 0 for less in difference[2:])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_fewer_heads_of_keys_and_values_are_attention_with_grouped_queries(
    count: int, kv_heads: int, causal: bool
):
    q, k, v = (tensor.detach() for tensor in whole())
    mine = [each.clone().requires_grad_() for each in (q, k[:, :kv_heads], v[:, :kv_heads])]
    theirs = [each.detach().clone().requires_grad_() for each in mine]
    parts = split(mine, count)
    with course_lib.trace(strict=True):  # no wait is missing
        outs = ulysses_attention(*parts, causal)
    joined = join_sequence(outs, 2, zigzag=False)
    repeated = [each.repeat_interleave(H // kv_heads, dim=1) for each in theirs[1:]]
    expected = F.scaled_dot_product_attention(theirs[0], *repeated, is_causal=causal)
    torch.testing.assert_close(joined, expected, rtol=1e-12, atol=1e-12)
    (joined**2).sum().backward()
    (expected**2).sum().backward()
    for tensor, right in zip(mine, theirs, strict=True):  # of a copied head, the copies' sum
        torch.testing.assert_close(tensor.grad, right.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_keys_and_values_of_fewer_heads_move_less_but_a_head_for_each_device(
    count: int, kv_heads: int
):
    q, k, v = (tensor.detach() for tensor in whole())
    parts = split([q, k[:, :kv_heads].contiguous(), v[:, :kv_heads].contiguous()], count)
    with course_lib.trace() as t:
        ulysses_attention(*parts, causal=True)
    formula = ulysses_bytes(count, q.nbytes, heads_per_kv=H // kv_heads, heads=H)
    assert t.bytes_between_devices == formula
    kv_bytes = 2 * max(kv_heads, count) * q.nbytes // H
    assert formula == (2 * q.nbytes + kv_bytes) * (count - 1) // count


def test_heads_of_keys_that_fit_no_device_are_refused_in_one_line():
    q, k, v = whole()
    with pytest.raises(ValueError, match="3 heads of keys and values for 8 of queries on 2"):
        ulysses_attention(*split([q, k[:, :3], v[:, :3]], 2), causal=True)


def test_heads_that_do_not_divide_are_refused_in_one_line():
    with pytest.raises(ValueError, match="8 heads do not divide among 16 devices"):
        ulysses_attention(*split(whole(), 16), causal=True)


def test_zigzag_order_is_refused_in_one_line():
    with pytest.raises(ValueError, match="split with zigzag=True is taken here for one with"):
        ulysses_attention(*split(whole(), 2, zigzag=True), causal=True)


def test_a_missing_part_is_refused_in_one_line():
    qs, ks, vs = split(whole(), 2)
    with pytest.raises(ValueError, match="one part of each a device, not 2, 1 and 2"):
        ulysses_attention(qs, ks[:1], vs, causal=True)
