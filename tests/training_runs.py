"""Runs of ``examples/train_gpt.py`` that a test disturbs. Imported by ranks too, so it is light."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPT = EXAMPLES / "train_gpt.py"
SIZES = {"steps": 2, "save-every": 1, "print-every": 1, "width": 8, "depth": 1, "length": 8}
SMALL = [f"--{name}={value}" for name, value in {**SIZES, "batch": 2}.items()]


def trained(engine: str, folder: Path, killed_at: int = 0) -> list[Tensor]:
    """For ``ranks.run``: the parameters after all steps.

    Args:
        killed_at: rank 0 is killed as it makes this change to the disk, counted from 1.
    """
    import train_gpt

    if killed_at and os.environ["RANK"] == "0":
        kill_this_process_at(killed_at, folder)
    arguments = [*SMALL, "--engine", engine, "--checkpoints", str(folder)]
    dist.init_process_group()
    model = train_gpt.train(train_gpt.parser().parse_args(arguments), train_gpt.own_device())
    parameters = (p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters())
    return [parameter.detach().cpu() for parameter in parameters]


def kill_this_process_at(number: int, folder: Path) -> None:
    """Kill it as it makes the ``number``-th change to what is in ``folder``."""
    changes = itertools.count(1)

    def look(event: str, args: tuple) -> None:
        is_change = event in ("os.mkdir", "os.rename", "os.rmdir", "shutil.rmtree") or (
            event == "open" and isinstance(args[2], int) and args[2] & os.O_WRONLY
        )
        if is_change and str(folder) in str(args[0]) and next(changes) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
