"""PyTorch's own databases of operators, modules and optimisers.

They belong to PyTorch's tests, and hold for each entry the arguments that PyTorch tests it with.
"""

from __future__ import annotations

import sys
import types
import unittest
from typing import Any

import torch

try:
    import expecttest  # noqa: F401
except ImportError:
    # PyTorch's test helpers want this package for a base class, which the databases never use.
    stand_in = types.ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase
    sys.modules["expecttest"] = stand_in

from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_optimizers import optim_db

OPERATORS: dict[str, Any] = {
    op.full_name: op for op in op_db if op.supports_dtype(torch.float32, "cpu")
}
MODULES: dict[str, Any] = {module.name: module for module in module_db}
OPTIMIZERS: dict[str, Any] = {optimizer.optim_cls.__name__: optimizer for optimizer in optim_db}
