"""Reduction operations: how two ranks' numbers become one, and what happens to the result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from course_lib.parallel.ring import Combine


class Reduction:
    """A ``torch.distributed.ReduceOp``, in the form in which a ring needs it.

    Attributes:
        name: ``"SUM"`` and so on.
        combine: adds the second tensor to the first one, in the sense of the operation.
        factor: what the result is multiplied by: for means, and for sums of scaled numbers. Those
            are scaled once, at the end, where NCCL scales each rank's numbers first.
    """

    def __init__(self, op: Any, world_size: int) -> None:
        kind, factor = _kind_and_factor(op)
        if kind not in _COMBINE:
            raise NotImplementedError(f"ranks on virtual GPUs cannot reduce by {kind}")
        self.name = kind
        self.combine: Combine = _COMBINE[kind]
        self._divisor = world_size if kind == "AVG" else 1
        self.factor = factor

    def finish(self, total: Tensor) -> None:
        """Turn what was combined into the result, in place."""
        if self._divisor > 1 and total.is_floating_point():
            total.div_(self._divisor)
        elif self._divisor > 1:
            total.div_(self._divisor, rounding_mode="trunc")
        if self.factor is not None:
            total.mul_(self.factor)

    def check(self, tensor: Tensor) -> None:
        """Raise if numbers of that dtype cannot be reduced in this way.

        Raises:
            TypeError: they cannot.
        """
        dtype = tensor.dtype
        has_bits = not (dtype.is_floating_point or dtype.is_complex)
        may = has_bits if self.name in _OF_BITS else dtype.itemsize > 1 or has_bits
        if not may or (dtype == torch.bool and self.changes_result):
            name = str(dtype).removeprefix("torch.")
            other = "whole numbers" if self.name in _OF_BITS else "another dtype, such as float32"
            raise TypeError(f"{self.name} is not there for {name}: reduce {other}")

    @property
    def changes_result(self) -> bool:
        """Whether :meth:`finish` does anything."""
        return self._divisor > 1 or self.factor is not None


def _kind_and_factor(op: Any) -> tuple[str, Any]:
    """The name of an operation, and the factor of ``PREMUL_SUM``."""
    if isinstance(op, ReduceOp.RedOpType):
        return op.name, None
    state = op.__getstate__()
    kind, factor = state if isinstance(state, tuple) else (state, None)
    return ReduceOp.RedOpType(kind).name, factor


def _minimum(into: Tensor, other: Tensor) -> Tensor:
    return torch.minimum(into, other, out=into)


def _maximum(into: Tensor, other: Tensor) -> Tensor:
    return torch.maximum(into, other, out=into)


_OF_BITS = {"BAND", "BOR", "BXOR"}

_COMBINE: dict[str, Combine] = {
    "SUM": Tensor.add_,
    "AVG": Tensor.add_,
    "PREMUL_SUM": Tensor.add_,
    "PRODUCT": Tensor.mul_,
    "MIN": _minimum,
    "MAX": _maximum,
    "BAND": Tensor.bitwise_and_,
    "BOR": Tensor.bitwise_or_,
    "BXOR": Tensor.bitwise_xor_,
}
