"""An answer that runs on ranks: its faults as one sentence, and what it may not call."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from course_lib import ranks
from course_lib.exercises.verdict import Wrong

# How many waits a verdict tells; the others are as a rule of the same kind.
_TOLD = 2


def on_ranks(function: Callable[[], Any], gpus: Sequence[torch.device]) -> list[Any]:
    """What ``function`` returns on each rank, once the ranks have met.

    Raises:
        Wrong: a deadlock or a mismatch, in one sentence.
    """

    def meet_and_run() -> Any:
        dist.init_process_group()
        return function()

    try:
        return ranks.run(meet_and_run, gpus)
    except ranks.DeadlockError as error:
        raise Wrong(f"a deadlock: {deadlock_in_a_sentence(str(error))}") from None
    except ranks.MismatchError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise Wrong(" ".join(lines)) from None


def deadlock_in_a_sentence(message: str) -> str:
    """The first waits of a deadlock's message, and which ranks have ended.

    As in "rank 2 waits in a receive from rank 3, which has sent nothing (line 4 of a cell, in
    shift: dist.recv(x, 3)); 2 more ranks wait."
    """
    waits = re.findall(r"(rank \d+ waits .+)\n +at (.+)", message)
    ended = re.findall(r"rank (\d+) has ended", message)
    told = [f"{wait} ({place})" for wait, place in waits[:_TOLD]]
    if len(waits) > _TOLD:
        more = len(waits) - _TOLD
        told.append("one more rank waits" if more == 1 else f"{more} more ranks wait")
    if ended:
        who = f"rank {ended[0]} has" if len(ended) == 1 else f"ranks {', '.join(ended)} have"
        told.append(f"{who} ended")
    return "; ".join(told) + "."


@contextmanager
def without(names: Sequence[str], instead: str) -> Iterator[None]:
    """``torch.distributed`` without the functions ``names``, for an exercise that forbids them.

    Args:
        instead: what an answer that calls one is told.
    """

    def refuse(*arguments: Any, **named: Any) -> None:
        raise Wrong(instead)

    with ExitStack() as patches:
        for name in names:
            patches.enter_context(mock.patch.object(dist, name, refuse))
        yield
