"""Is it the same training? How far apart two models, or two gradients, are."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Difference(NamedTuple):
    """Where two models differ most, and by how much.

    Attributes:
        name: of the parameter or buffer; empty if the models have none.
        largest: the largest difference of two numbers in it; NaN if there is one in either.
    """

    name: str
    largest: float


def difference(one: nn.Module, other: nn.Module) -> Difference:
    """Where two models differ most: in which parameter or buffer, and by how much.

    Buffers count as well: BatchNorm's running mean is one, and two models that differ in it give
    different answers although all their parameters agree. A NaN is a larger difference than any
    number.

    Raises:
        ValueError: the models do not have parameters and buffers of the same names and shapes.
    """
    ours, theirs = _numbers(one), _numbers(other)
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            raise ValueError(
                f"the two models have different parameters and cannot be compared: {name} is not "
                "the same in both"
            )
    differences = [Difference(name, _largest(ours[name], theirs[name])) for name in ours]
    return max(differences, key=_nan_first, default=Difference("", 0.0))


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """The largest difference between any number in the parameters and buffers of two models.

    :func:`difference` says where it is, too. Raises what that does.
    """
    return difference(one, other).largest


def _numbers(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _largest(one: Tensor, other: Tensor) -> float:
    if one.numel() == 0:
        return 0.0
    return (one.detach().cpu().double() - other.detach().cpu().double()).abs().max().item()


def _nan_first(difference: Difference) -> tuple[bool, float]:
    is_nan = difference.largest != difference.largest
    return is_nan, 0.0 if is_nan else difference.largest
