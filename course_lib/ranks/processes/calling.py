"""A run of ranks in processes, as the caller sees it. No process and no file outlives it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from course_lib.ranks.output import print_in_rank_order
from course_lib.ranks.processes import outcome
from course_lib.ranks.processes.impatience import interrupts_come_later
from course_lib.ranks.processes.job import packed
from course_lib.ranks.processes.place import Place
from course_lib.ranks.processes.process import RankProcess

_LOOK_UP = 0.2  # seconds after which the caller sees a Ctrl-C; Windows does not wake it
_TO_REPORT = 0.1  # seconds for other ranks to report the same error
_TO_END = 1.0  # seconds for a process that is stopped, before it is killed


def run(
    function: Callable[..., Any],
    devices: Sequence[torch.device],
    args: tuple[Any, ...],
    timeout: float | None,
) -> list[Any]:
    """Run ``function(*args)`` in a process for each of ``devices``; what each returned.

    Raises:
        TimeoutError: a rank has not ended after ``timeout`` seconds.
        RuntimeError: a process died.
        TypeError: something cannot be sent from one process to another.

    What else a rank raises is raised here.
    """
    job = packed(function, args)
    with tempfile.TemporaryDirectory(prefix="course_ranks_") as name:
        folder = Path(name)
        places = [Place(rank, len(devices), each, folder) for rank, each in enumerate(devices)]
        places[0].job.write_bytes(job)
        ranks = [RankProcess(place) for place in places]
        try:
            for rank in ranks:
                rank.start()
            _wait_for(ranks, timeout)
        except KeyboardInterrupt as interrupt:
            _stop(ranks)
            interrupt.add_note(outcome.states(ranks))
            raise
        finally:
            _stop(ranks)
            print_in_rank_order(
                [place.printed(place.stdout) for place in places],
                [place.printed(place.stderr) for place in places],
            )
        return outcome.results(ranks, timeout)


def _wait_for(ranks: Sequence[RankProcess], timeout: float | None) -> None:
    """Until all have returned, or one has gone wrong, or ``timeout`` seconds are over."""

    def one_has_gone_wrong() -> bool:
        return any(rank.has_gone_wrong for rank in ranks)

    _look_until(one_has_gone_wrong, ranks, timeout)
    if one_has_gone_wrong():
        _look_until(lambda: False, ranks, _TO_REPORT)


def _look_until(
    is_enough: Callable[[], bool], ranks: Sequence[RankProcess], timeout: float | None
) -> None:
    end = float("inf") if timeout is None else time.monotonic() + timeout
    while True:
        for rank in ranks:
            rank.look()
        running = [rank for rank in ranks if not rank.is_over]
        left = end - time.monotonic()
        if not running or left <= 0 or is_enough():
            return
        wait([each for rank in running for each in rank.news], min(left, _LOOK_UP))


def _stop(ranks: Sequence[RankProcess]) -> None:
    """End all: who has returned has nothing left to do either."""
    with interrupts_come_later():
        for rank in ranks:
            rank.ask_to_end()
        deadline = time.monotonic() + _TO_END
        for rank in ranks:
            rank.end(deadline)
