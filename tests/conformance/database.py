"""PyTorch's operator database, as far as a float32 CPU goes."""

from __future__ import annotations

import sys
import types
import unittest
from typing import Any

import pytest


def _load() -> list[Any]:
    try:
        import expecttest  # noqa: F401
    except ImportError:
        # PyTorch's test helpers want this package for a base class, which the database never uses.
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stand_in
    import torch
    from torch.testing._internal.common_methods_invocations import op_db

    return [op for op in op_db if op.supports_dtype(torch.float32, "cpu")]


OPERATORS = [pytest.param(op, id=op.full_name) for op in _load()]
