"""The one table of exceptions: what is not equal to the CPU bit for bit, and why.

Every operator, module and optimiser that is not named here must be equal. What is named here is
tested for what the table says of it.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch


class Kind(Enum):
    """What is asked of an exception instead of equality."""

    NO_REFERENCE = "the CPU refuses it too, so there is nothing to be equal to"
    REFUSED = "refused in one clear line"
    CLOSE = "equal within rounding, see TOLERANCE in equality.py"
    FORM = "its shape, strides and dtype are equal, its numbers are not defined"


class Row(NamedTuple):
    kind: Kind
    reason: str
    only: torch.dtype | None = None  # the one dtype that it holds for; ``None`` is all


_CUDA_ALONE = Row(Kind.NO_REFERENCE, "compiles CUDA code: exists for CUDA alone")
_SPARSE = Row(Kind.REFUSED, "virtual GPUs hold dense tensors only")
_UNINITIALISED = Row(Kind.FORM, "returns memory as it is found there")
_SUBCLASS = Row(Kind.CLOSE, "PyTorch's formula adds up in another order for every tensor subclass")
_STEP_BY_STEP = Row(
    Kind.CLOSE, "PyTorch multiplies the whole sequence at once on the CPU, elsewhere step by step"
)
_LEAST_SQUARES = Row(Kind.CLOSE, "the CPU's own two runs differ: LAPACK's gelsy")
_BY_DEVICE_TYPE = Row(
    Kind.CLOSE,
    "PyTorch chooses how to accumulate by device.type, and the CPU is a case of its own",
    only=torch.bfloat16,
)

EXCEPTIONS: dict[str, Row] = {
    # Operators.
    "jiterator_unary": _CUDA_ALONE,
    "jiterator_binary": _CUDA_ALONE,
    "jiterator_binary_return_by_ref": _CUDA_ALONE,
    "jiterator_2inputs_2outputs": _CUDA_ALONE,
    "jiterator_4inputs_with_extra_args": _CUDA_ALONE,
    "sparse.mm.reduce": _SPARSE,
    "sparse.sampled_addmm": _SPARSE,
    "to_sparse": _SPARSE,
    "empty": _UNINITIALISED,
    "empty_like": _UNINITIALISED,
    "empty_permuted": _UNINITIALISED,
    "empty_strided": _UNINITIALISED,
    "new_empty": _UNINITIALISED,
    "new_empty_strided": _UNINITIALISED,
    "masked_fill": _SUBCLASS,
    "prod": _SUBCLASS,
    "masked.prod": _SUBCLASS,
    "ormqr": _SUBCLASS,
    "linalg.lstsq": _LEAST_SQUARES,
    "linalg.lstsq.grad_oriented": _LEAST_SQUARES,
    "nn.functional.linear_cross_entropy.chunked": _BY_DEVICE_TYPE,
    "nn.functional.linear_cross_entropy.chunked_none": _BY_DEVICE_TYPE,
    # Modules.
    "nn.LinearCrossEntropyLoss": _SUBCLASS,
    "nn.RNN": _STEP_BY_STEP,
    "nn.GRU": _STEP_BY_STEP,
    "nn.LSTM": _STEP_BY_STEP,
    # Optimisers.
    "SparseAdam": _SPARSE,
}


def kind_of(name: str, dtype: torch.dtype = torch.float32) -> Kind | None:
    """What is asked of ``name`` instead of equality; ``None`` is equality."""
    row = EXCEPTIONS.get(name)
    return row.kind if row and row.only in (None, dtype) else None
