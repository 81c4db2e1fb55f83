"""Collectives give every GPU the same bits, move what they say they move, and refuse the rest."""

import pytest
import torch

from course_lib import collectives, devices, trace
from course_lib.collectives import all_reduce, broadcast


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


@pytest.mark.parametrize("collective", [all_reduce, broadcast])
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


@pytest.mark.parametrize("collective", [all_reduce, broadcast])
def test_what_is_no_list_of_tensors_is_refused(collective) -> None:
    with pytest.raises(ValueError, match="at least one tensor"):
        collective([])
    with pytest.raises(TypeError, match="not a single tensor"):
        collective(torch.ones(2, 3))
    with pytest.raises(TypeError, match="one of these is None"):
        collective([torch.ones(3), None])
