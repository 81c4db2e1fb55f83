"""How a run ended: what its ranks returned, or the one error that says what went wrong first."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Sequence
from typing import Any

from course_lib.ranks.processes import whereabouts
from course_lib.ranks.processes.process import RankProcess
from course_lib.ranks.processes.reports import Failed, Returned


def results(ranks: Sequence[RankProcess], timeout: float | None) -> list[Any]:
    """What each rank returned; all have ended.

    Raises:
        RuntimeError: a process died.
        TimeoutError: one had to be stopped.
        BaseException: what a rank raised.
    """
    # A process that dies takes its connections along, and others fail of that.
    lost = [rank for rank in ranks if rank.is_lost]
    if lost:
        raise RuntimeError(f"rank {lost[0].place.rank} {_death(lost[0])}\n{states(ranks)}")
    if any(isinstance(rank.report, Failed) for rank in ranks):
        raise _first_error(ranks)
    reports = [rank.report for rank in ranks if isinstance(rank.report, Returned)]
    if len(reports) < len(ranks):
        raise TimeoutError(f"not all ranks have ended after {timeout:g} seconds\n{states(ranks)}")
    return [pickle.loads(report.value) for report in reports]


def states(ranks: Sequence[RankProcess]) -> str:
    """What has become of each rank, a line each."""
    return "\n".join(f"  rank {rank.place.rank} {_state(rank)}" for rank in ranks)


def _state(rank: RankProcess) -> str:
    if isinstance(rank.report, Returned):
        return "had ended"
    if isinstance(rank.report, Failed):
        return f"had failed: {rank.report.words()}"
    return _death(rank) if rank.is_lost else whereabouts.read(rank.place)


def _death(rank: RankProcess) -> str:
    code = rank.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    said = rank.place.printed(rank.place.native).strip()
    return how + (f", and its last words were: {said}" if said else "")


def _first_error(ranks: Sequence[RankProcess]) -> BaseException:
    """That of the rank that failed first; of the lowest, if others failed in the same way."""
    errors = {
        rank.place.rank: (rank.report.moment, rank.report.made_anew())
        for rank in ranks
        if isinstance(rank.report, Failed)
    }
    _, first = min(errors.values(), key=lambda each: each[0])
    number, error = next((n, e) for n, (_, e) in errors.items() if type(e) is type(first))
    error.add_note(f"(rank {number} of {len(ranks)} failed first)")
    for rank in ranks:
        if isinstance(rank.report, Returned):
            error.add_note(f"(rank {rank.place.rank} had ended)")
    return error
