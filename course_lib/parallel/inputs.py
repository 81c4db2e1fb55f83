"""What the methods ask of what they are given, so that a mistake is one clear line.

What is wrong is said before any work is done. PyTorch's own words are kept where they are clear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.models import GPT
from course_lib.parallel.kinds import MakeOptimizer, OptionsOf, Tensors


def require_devices(devices: Iterable[torch.device | str]) -> list[torch.device]:
    """The devices, which may be given by name and one by one, as a list.

    Raises:
        TypeError: it is one device, or nothing that has devices in it.
        ValueError: there are none.
    """
    if isinstance(devices, torch.device | str):
        raise TypeError(f"this takes a list of devices, and {devices} is one: give [{devices!r}]")
    if isinstance(devices, Tensor) or not isinstance(devices, Iterable):
        raise TypeError(
            f"this takes a list of devices, as course_lib.devices(4) gives it, and not {devices!r}"
        )
    found = [torch.device(device) for device in devices]
    if not found:
        raise ValueError("this needs at least one device, and there is no device in the list")
    return found


def require_tensor(value: object, what: str) -> None:
    """Refuse what is not one tensor, such as a dictionary of several.

    Args:
        what: says what is one, as in "targets are".

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} one tensor, and not a {type(value).__name__}")


def require_one_each(tensors: Tensors, count: int, what: str = "this") -> None:
    """Refuse what is not one tensor for each of ``count`` devices.

    Raises:
        TypeError: it is a single tensor, which would be taken for its rows, or one is no tensor.
        ValueError: there are more of them, or fewer.
    """
    if isinstance(tensors, Tensor):
        raise TypeError(f"{what} takes a list with one tensor a device, not a single tensor")
    if len(tensors) != count:
        raise ValueError(f"{what} is on {count} devices, and was given {len(tensors)} tensors")
    for tensor in tensors:
        require_tensor(tensor, f"{what} takes a list: on each device there is")


def require_one_a_replica(replicas: Sequence[nn.Module], **lists: Sequence) -> None:
    """Refuse lists that have not one item for each replica.

    Raises:
        TypeError: one is a single tensor, which would be taken for its rows.
        ValueError: one has more items, or fewer.
    """
    for name, values in lists.items():
        if isinstance(values, Tensor):
            raise TypeError(f"{name} are a list with one tensor a replica, not a single tensor")
    if any(len(values) != len(replicas) for values in lists.values()):
        counts = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        raise ValueError(f"{len(replicas)} replicas need as many of each: there are {counts}")


def require_one_tensor(output: Any) -> Tensor:
    """The output of a unit of sharded training, whose gradient comes as one tensor.

    Raises:
        TypeError: it is something else, such as a tuple.
    """
    if not isinstance(output, Tensor):
        raise TypeError(
            f"a unit of Sharded has one tensor for its output, not a {type(output).__name__}: put "
            "the layer that makes it and the one that takes it into one nn.Sequential"
        )
    return output


def require_elementwise(
    make_optimizer: MakeOptimizer, options_of: OptionsOf | None, model: nn.Module
) -> None:
    """Refuse an optimizer to which the shapes of parameters matter, which have none in a row.

    Args:
        model: on the device "meta", so that nothing is allocated.

    Raises:
        ValueError: ``make_optimizer`` chooses options by shapes, or the optimizer computes by them.
    """

    def make(of_shape: Callable[[Tensor], Tensor]) -> torch.optim.Optimizer:
        return make_optimizer(
            [
                {"params": [of_shape(p.detach())], **(options_of(name, p) if options_of else {})}
                for name, p in model.named_parameters()
            ]
        )

    made = make(lambda parameter: parameter), make(lambda parameter: parameter.flatten()[:1])
    by_shape, in_a_row = ([{**g, "params": None} for g in each.param_groups] for each in made)
    if by_shape != in_a_row:
        raise ValueError(
            "make_optimizer chooses options by the shapes of parameters, and in a row they have "
            "none: choose them by options_of"
        )
    if isinstance(made[0], torch.optim.Adafactor):
        raise ValueError(
            "Adafactor computes with the rows and columns of a parameter, and here it would get "
            "stretches of rows: take an optimizer that treats each number by itself, such as AdamW"
        )


@contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Refuse a ``module`` that changes its buffers in this block, which runs it a second time.

    Raises:
        ValueError: it does.
    """

    def state() -> dict[str, tuple[int, int]]:
        return {name: (id(buffer), buffer._version) for name, buffer in module.named_buffers()}

    before = state()
    yield
    changed = sorted({name for name, _ in state().items() ^ before.items()})
    if changed:
        raise ValueError(
            f"a stage changes its buffers {changed} in forward, and so twice when that is computed "
            "again: give recompute=False"
        )


def require_gpt(model: nn.Module) -> None:
    """Refuse another model than the course's GPT, whose layers are taken apart by name.

    Raises:
        TypeError: it is another.
    """
    if not isinstance(model, GPT):
        raise TypeError(f"this splits course_lib.models.GPT, and not a {type(model).__name__}")


def require_tokens(tokens_BT: Tensor, what: str = "tokens") -> None:
    """Refuse what is not one tensor of whole numbers, [B, T].

    Raises:
        TypeError: it is no tensor, or one of other numbers.
        ValueError: it has other dimensions.
    """
    if not isinstance(tokens_BT, Tensor) or tokens_BT.dtype not in (torch.int64, torch.int32):
        found = tokens_BT.dtype if isinstance(tokens_BT, Tensor) else type(tokens_BT).__name__
        raise TypeError(f"{what} are one tensor of whole numbers (torch.int64), not {found}")
    if tokens_BT.dim() != 2:
        raise ValueError(f"{what} have the shape [B, T], and not {list(tokens_BT.shape)}")
