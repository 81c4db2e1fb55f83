"""What is sent to the ranks: the function, and what the caller's process is like at this moment."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from course_lib.ranks.processes import sending


@dataclass(frozen=True)
class Settings:
    """What a rank has of the caller, as on virtual GPUs: environment, random numbers, dtype."""

    environment: dict[str, str]
    of_torch: torch.Tensor
    of_random: Any
    of_numpy: Any
    dtype: torch.dtype

    @classmethod
    def of_this_process(cls) -> Settings:
        return cls(
            dict(os.environ),
            torch.get_rng_state(),
            random.getstate(),
            np.random.get_state(),
            torch.get_default_dtype(),
        )

    def put_in_place(self) -> None:
        os.environ.clear()
        os.environ.update(self.environment)
        torch.set_rng_state(self.of_torch)
        random.setstate(self.of_random)
        np.random.set_state(self.of_numpy)
        torch.set_default_dtype(self.dtype)


def packed(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """What :func:`unpacked` reads.

    Raises:
        TypeError: something in it cannot be sent, such as an open file or a lock.
    """
    try:
        call = sending.packed((function, args))
    except Exception as error:
        raise TypeError(
            "ranks.run(..., processes=N) sends the function to other processes, with the "
            f"variables that it uses, and one of these cannot be sent: {error}"
        ) from None
    return pickle.dumps((Settings.of_this_process(), call))


def unpacked(job: bytes) -> tuple[Settings, Callable[[], Any]]:
    """The caller's settings, and how to make the call once they are in place."""
    settings, packed_call = pickle.loads(job)

    def call() -> Any:
        try:
            function, args = pickle.loads(packed_call)
        except Exception as error:
            raise TypeError(
                "the function, or a variable that it uses, cannot be made anew in another process "
                f"(a tensor on a virtual GPU, a module that is not found): {error}"
            ) from None
        return function(*args)

    return settings, call
