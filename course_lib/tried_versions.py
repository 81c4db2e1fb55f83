"""A warning for a PyTorch that the course was not tried with, where nothing else would say so.

pip sees to the version, unless it is told to leave the PyTorch alone that a machine has, as on
Colab (``pip install --no-deps``). Importing this module warns.
"""

from __future__ import annotations

import re
import warnings
from importlib import metadata

import torch


def bounds(requirements: list[str] | None) -> tuple[str, str] | None:
    """The lowest version of PyTorch that is tried, and the first that is not, of a package's
    requirements; None if they do not say."""
    for line in requirements or []:
        lowest = re.match(r"torch\b.*>=([\d.]+)", line)
        first_after = re.match(r"torch\b.*<([\d.]+)", line)
        if lowest and first_after:
            return lowest[1], first_after[1]
    return None


def warn_unless_tried(version: str, requirements: list[str] | None) -> None:
    """Warn if ``version`` of PyTorch is outside of the bounds in ``requirements``."""
    tried = bounds(requirements)
    if tried and not _parts(tried[0]) <= _parts(version) < _parts(tried[1]):
        warnings.warn(
            f"the course was tried with PyTorch {tried[0]} up to, not including, {tried[1]}; this "
            f'is {version}. If a cell fails: pip install "torch>={tried[0]},<{tried[1]}", then '
            "restart the kernel",
            stacklevel=2,
        )


def requirements_of_the_course() -> list[str] | None:
    try:
        return metadata.requires("multi-gpu-by-hand")
    except metadata.PackageNotFoundError:  # a checkout that nobody installed
        return None


def _parts(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


warn_unless_tried(torch.__version__, requirements_of_the_course())
