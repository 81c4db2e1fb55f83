"""A mesh has every device in one group of each kind, and trains as one device does."""

from __future__ import annotations

from itertools import chain, permutations

import pytest
import torch

from course_lib import devices, trace
from course_lib.models import GPT, next_token_loss, parameter_count
from course_lib.parallel.mesh import AXES, Mesh, MeshGPT
from course_lib.parallel.proof import largest_difference
from course_lib.parallel.split_parameter import unsplit


def a_gpt() -> GPT:
    torch.manual_seed(1)
    return GPT(11, context=8, width=8, heads=4, depth=4, tied=False).double()


def places(*shape: int) -> list[torch.device]:
    return [torch.device("cpu")] * (shape[0] * shape[1] * shape[2])


def test_the_last_of_the_order_runs_fastest() -> None:
    mesh = Mesh(places(2, 2, 2), 2, 2, 2)
    assert mesh.groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert mesh.groups("pipeline") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert mesh.groups("data") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    outermost = Mesh(places(2, 2, 2), 2, 2, 2, ("pipeline", "data", "tensor"))
    assert outermost.groups("tensor") == mesh.groups("tensor")
    assert outermost.groups("data") == mesh.groups("pipeline")


@pytest.mark.parametrize("order", list(permutations(AXES)))
@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 2, 2), (3, 1, 1)])
def test_every_device_is_in_one_group_of_each_kind(shape, order) -> None:
    mesh = Mesh(places(*shape), *shape, order)
    for axis, size in zip(AXES, shape, strict=True):
        groups = mesh.groups(axis)
        assert all(len(group) == size for group in groups)
        assert sorted(chain(*groups)) == list(range(len(mesh.devices)))
    steps = [group[1] - group[0] for group in mesh.groups(order[-1]) if len(group) > 1]
    assert set(steps) <= {1}  # neighbours


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2), (8, 1, 1), (1, 2, 4), (3, 2, 1)])
def test_steps_on_a_mesh_are_those_of_one_gpu(vgpus, shape) -> None:
    count = shape[0] * shape[1] * shape[2]
    gpus, gpt = devices(count), a_gpt()
    x, y = torch.randint(11, (12, 8)), torch.randint(11, (12, 8))
    model, alone = MeshGPT(gpt, Mesh(gpus, *shape)), a_gpt()
    placed = model.place(x, y, microbatches=1 if shape[0] > 4 else 3)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (model, alone)]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        with trace(strict=True):
            losses = model.forward_backward(placed)
        loss = next_token_loss(alone(x), y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert sum(each.item() for each in losses) == pytest.approx(loss.item(), abs=1e-12)
    for replica in model.replicas:
        assert largest_difference(unsplit(replica, gpt), alone) < 1e-12
    assert largest_difference(alone, gpt) > 0.01


def test_nothing_comes_from_the_host_during_a_step(vgpus) -> None:
    model = MeshGPT(a_gpt(), Mesh(vgpus, 2, 1, 2))
    placed = model.place(*torch.randint(11, (2, 4, 8)), microbatches=2)
    with trace() as t:
        model.forward_backward(placed)
    assert not any("host" in route for route in t.bytes_moved)


def test_gradients_of_a_call_before_are_added_to_and_not_summed_again(vgpus) -> None:
    model = MeshGPT(a_gpt(), Mesh(vgpus, 2, 1, 2))
    placed = model.place(*torch.randint(11, (2, 4, 8)), microbatches=2)
    model.forward_backward(placed)
    once = [parameter.grad.cpu() for parameter in model.parameters()]
    model.forward_backward(placed)
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), 2 * gradient)


def test_what_is_no_mesh_is_said_in_one_line(vgpus) -> None:
    with pytest.raises(ValueError, match=r"data 2 x pipeline 2 x tensor 2 needs .* there are 4"):
        Mesh(vgpus, 2, 2, 2)
    with pytest.raises(ValueError, match="has each of"):
        Mesh(vgpus, 2, 2, 1, ("data", "tensor"))
    with pytest.raises(ValueError, match="4 blocks cannot fill 5 pipeline stages"):
        MeshGPT(a_gpt(), Mesh(devices(5), 1, 5, 1))
    model = MeshGPT(a_gpt(), Mesh(devices(4), 2, 2, 1))
    with pytest.raises(ValueError, match="3 examples cannot fill 4 microbatches"):
        model.place(*torch.randint(11, (2, 3, 8)), microbatches=2)


def test_replicas_sum_their_gradients_in_buckets_and_not_one_by_one(vgpus) -> None:
    gpt = a_gpt().float()
    model = MeshGPT(gpt, Mesh(vgpus[:2], 2, 1, 1), bucket_bytes=4 * parameter_count(gpt))
    placed = model.place(*torch.randint(11, (2, 4, 8)), microbatches=2)
    with trace() as t:
        model.forward_backward(placed)
    # One ring for two microbatches: half of the bucket scattered, and half gathered.
    copies = [span for span in t.spans if span.route and None not in span.route]
    assert len(copies) == 2 * 2
    assert t.bytes_sent(vgpus[0]) == 4 * parameter_count(gpt)
