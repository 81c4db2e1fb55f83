"""What CUDA refuses is refused, in CUDA's words; what it takes is taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("vgpus")

MIXED = "Expected all tensors to be on the same device, but found at least two devices"


def _leaf(device: str = "vgpu:0") -> torch.Tensor:
    return torch.ones(2, device=device, requires_grad=True)


# Gradients on the wrong GPU.

INVALID = "invalid gradient at index 0 - expected device vgpu:0 but got vgpu:1"


@pytest.mark.parametrize("where", ["vgpu:1", "cpu"])
def test_backward_from_a_gradient_on_another_device_is_refused(where: str):
    y = _leaf() * 2
    with pytest.raises(RuntimeError, match=f"invalid gradient at index 0 .* but got {where}"):
        y.backward(torch.ones(2, device=where))
    with pytest.raises(RuntimeError, match="invalid gradient at index 1"):
        x = _leaf()
        torch.autograd.grad(
            [x * 2, x * 3], x, [torch.ones(2, device="vgpu:0"), torch.ones(2, device=where)]
        )


def test_a_gradient_that_is_one_number_moves_to_its_tensor_as_on_cuda():
    x = _leaf()
    x.sum().backward(torch.tensor(3.0, device="vgpu:1"))
    assert x.grad.tolist() == [3, 3]


@pytest.mark.parametrize("on_leaf", [True, False])
def test_a_hook_that_returns_a_gradient_on_another_device_is_refused(on_leaf: bool):
    x = _leaf()
    y = x * 2
    (x if on_leaf else y).register_hook(lambda gradient: gradient.to("vgpu:1"))
    with pytest.raises(RuntimeError, match=INVALID):
        y.sum().backward()


def test_a_hook_on_the_right_device_changes_the_gradient():
    x = _leaf()
    handle = x.register_hook(lambda gradient: gradient * 10)
    x.sum().backward()
    assert x.grad.tolist() == [10, 10]
    handle.remove()
    x.sum().backward()
    assert x.grad.tolist() == [11, 11]


class _Moves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor, where="vgpu:1"):
        ctx.where = where
        return x * factor

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(ctx.where), None, None


class _Each(torch.autograd.Function):
    """Two tensors behind an argument that is none, each to be multiplied on its own device."""

    @staticmethod
    def forward(ctx, factor, x, y):
        return x * factor, y * factor

    @staticmethod
    def backward(ctx, *gradients):
        return None, *gradients


def test_a_function_may_take_what_is_no_tensor_before_its_tensors():
    x, y = _leaf(), _leaf("vgpu:1")
    torch.autograd.backward([each.sum() for each in _Each.apply(2.0, x, y)])
    assert (x.grad.device, y.grad.device) == (x.device, y.device)


def test_a_function_whose_backward_leaves_the_device_is_refused():
    with pytest.raises(RuntimeError, match=f"_MovesBackward returned an {INVALID}"):
        _Moves.apply(_leaf(), 2.0).sum().backward()
    with pytest.raises(RuntimeError, match=r"invalid gradient at index 0 .* but got cpu"):
        _Moves.apply(_leaf(), 2.0, "cpu").sum().backward()
    with pytest.raises(RuntimeError, match="expected device cpu but got vgpu:1"):
        _Moves.apply(_leaf("cpu"), 2.0).sum().backward()
    x = _leaf("vgpu:1")
    _Moves.apply(x, 2.0).sum().backward()
    assert x.grad.tolist() == [1, 1]


@pytest.mark.parametrize("where", ["vgpu:1", "cpu"])
def test_one_number_from_the_backward_of_a_function_moves_to_its_tensor_as_on_cuda(where: str):
    x = torch.tensor(5.0, device="vgpu:0", requires_grad=True)
    _Moves.apply(x, 2.0, where).backward()
    assert (x.grad.device, x.grad.item()) == (x.device, 1)


# Tensors of two devices in one operator.


@pytest.mark.parametrize("home", ["cpu", "vgpu:1"])
def test_indices_must_be_on_the_host_or_with_what_they_index(home: str):
    x, index = torch.arange(4.0, device=home), torch.tensor([1, 2], device="vgpu:0")
    words = rf"indices should be either on cpu or on the same device as the indexed .*\({home}\)"
    with pytest.raises(RuntimeError, match=words):
        x[index]
    with pytest.raises(RuntimeError, match=words):
        x[index] = 0.0


def test_indices_on_the_host_are_taken():
    x = torch.arange(4.0, device="vgpu:0")
    index = torch.tensor([1, 2])
    assert x[index].tolist() == [1, 2]
    x[index] = torch.tensor(7.0)  # one number on the host, too
    assert x.tolist() == [0, 7, 7, 3]


REFUSED: dict[str, Callable[[], object]] = {
    "values of the host": lambda: torch.ones(3, device="vgpu:0").index_put_(
        (torch.tensor([0, 1], device="vgpu:0"),), torch.ones(2)
    ),
    "stack": lambda: torch.stack([torch.ones((), device="vgpu:0"), torch.ones(())]),
    "embedding": lambda: F.embedding(torch.tensor(1), torch.ones(3, 2, device="vgpu:0")),
    "index_select": lambda: torch.ones(3, device="vgpu:0").index_select(0, torch.tensor(1)),
    "gather": lambda: torch.ones((), device="vgpu:0").gather(0, torch.tensor(0)),
    "out": lambda: torch.add(torch.ones(2, device="vgpu:0"), 1, out=torch.empty(2)),
    "out, one number": lambda: torch.sum(torch.ones(2, device="vgpu:0"), 0, out=torch.ones(())),
    "in place": lambda: torch.ones(()).add_(torch.ones((), device="vgpu:0")),
    "mask of attention": lambda: F.scaled_dot_product_attention(
        *[torch.ones(1, 2, 3, 4, device="vgpu:0")] * 3, torch.ones(3, 3, dtype=torch.bool)
    ),
    "mask of a transformer": lambda: nn.TransformerEncoderLayer(4, 2).to("vgpu:0")(
        torch.ones(3, 2, 4, device="vgpu:0"), src_mask=torch.zeros(3, 3)
    ),
}


@pytest.mark.parametrize("program", REFUSED.values(), ids=REFUSED)
def test_tensors_of_two_devices_are_refused(program: Callable[[], object]):
    with pytest.raises(RuntimeError, match=MIXED):
        program()


TAKEN: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": lambda x, number: x + number,
    "add to it": lambda x, number: number + x,
    "in place": lambda x, number: x.mul_(number),
    "compare in place": lambda x, number: x.eq_(number),
    "where": lambda x, number: torch.where(x > 1, x, number),
    "clamp": lambda x, number: x.clamp(min=number),
    "lerp": lambda x, number: x.lerp(x + 1, number),
    "fill": lambda x, number: x.fill_(number),
    "masked_fill": lambda x, number: x.masked_fill(x > 1, number),
    "index_fill": lambda x, number: x.index_fill(0, torch.tensor([0], device=x.device), number),
    "list": lambda x, number: torch._foreach_mul([x], number)[0],
}


@pytest.mark.parametrize("program", TAKEN.values(), ids=TAKEN)
def test_one_number_on_the_host_joins_a_gpu_where_cuda_takes_it(program: Callable):
    x, number = torch.tensor([1.0, 2.0]), torch.tensor(0.5)
    expected = program(x.clone(), number)
    assert torch.equal(program(x.to("vgpu:1"), number).cpu(), expected)


def test_block_diag_of_two_devices_is_refused_by_name():
    with pytest.raises(
        RuntimeError, match="Input 0 is on device cpu and input 1 is on device vgpu"
    ):
        torch.block_diag(torch.ones(2, 2), torch.ones(2, 2, device="vgpu:0"))


def test_sparse_tensors_beside_dense_ones_are_refused_in_one_line():
    x = torch.ones(2, 2, device="vgpu:1")
    with pytest.raises(NotImplementedError, match=r"dense tensors only, not torch\.sparse_csr"):
        torch.ones(2, 2).to_sparse_csr().to("vgpu:1") @ x


def test_lengths_of_a_ctc_loss_may_be_on_the_host():
    torch.manual_seed(0)
    scores = torch.randn(6, 2, 4).log_softmax(2).requires_grad_()
    targets, lengths = (
        torch.tensor([[1, 2, 3], [3, 1, 1]]),
        (torch.tensor([6, 5]), torch.tensor([3, 2])),
    )
    expected = F.ctc_loss(scores, targets, *lengths)
    expected.backward()
    for home in ("cpu", "vgpu:0"):
        on_gpu = scores.detach().to("vgpu:0").requires_grad_()
        loss = F.ctc_loss(on_gpu, targets.to("vgpu:0"), *[each.to(home) for each in lengths])
        loss.backward()
        assert loss.item() == expected.item()
        assert torch.equal(on_gpu.grad.cpu(), scores.grad)


def test_a_tensor_without_numbers_is_on_another_device():
    with pytest.raises(RuntimeError, match="found at least two devices, vgpu:0 and meta"):
        torch.ones(2, 3, device="vgpu:0") @ torch.ones(3, 4, device="meta")
