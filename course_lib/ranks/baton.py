"""The baton: threads of which one runs at a time, in an order that is always the same.

The thread that holds the baton runs until it must wait for another. Then it passes the baton to the
next one, in rank order, that can go on. So two runs of a program do the same things in the same
order, whatever the operating system does with the threads; and the moment in which nobody can go on
is a deadlock, which can be named at once.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from course_lib.ranks.errors import DeadlockError, RankStopped
from course_lib.ranks.where import line_of_thread

# Passes of the baton between two looks for garbage. Python's own depend on what it did before, and
# a device's peak memory would with them.
_COLLECT_EVERY = 512


# Seconds after which the main thread looks whether it was interrupted; Windows does not wake it.
_LOOK_UP = 0.2


class Wait(Protocol):
    """What a rank waits for."""

    def is_over(self) -> bool:
        """Whether the rank can go on."""

    def __str__(self) -> str:
        """It in words, after "waits"."""


class Runner:
    """One thread, and what it does.

    Args:
        rank: its place in the order.
        work: what it runs once it has the baton.
        enter, leave: called before it gets the baton each time, and after it gave it away.

    Attributes:
        wait: what it waits for; ``None`` if it can go on.
        fault: what this package raised in it. In a backward pass the way up is through C++, which
            may lose an error and say ``SystemError`` instead.
        error: what ended it, if it was not the end of its work.
    """

    def __init__(
        self,
        rank: int,
        work: Callable[[], None],
        enter: Callable[[], None],
        leave: Callable[[], None],
    ) -> None:
        self.rank, self.work, self.enter, self.leave = rank, work, enter, leave
        self.wait: Wait | None = None
        self.fault: BaseException | None = None
        self.error: BaseException | None = None
        self.has_ended = False
        self.turn = threading.Lock()  # taken until it is this one's turn
        self.turn.acquire()
        self.thread = threading.Thread(target=self._run, name=f"rank {rank}", daemon=True)
        self.baton: Baton

    def _run(self) -> None:
        self.turn.acquire()
        if not self.baton.is_stopping:
            try:
                self.work()
            except RankStopped:
                pass
            except SystemError as error:
                self.error = self.fault or error
                self.baton.note_failure(self)
            except BaseException as error:
                self.error = error
                self.baton.note_failure(self)
        self.has_ended = True
        self.baton.pass_on(self)


class Baton:
    """What some runners pass to each other.

    Attributes:
        is_stopping: whether one has failed, so that the others are to end.
        first_to_fail: that one.
        passes: how often it was passed on.
    """

    def __init__(self, runners: Sequence[Runner]) -> None:
        self.runners = list(runners)
        self.holder: Runner | None = None
        self.is_stopping = False
        self.first_to_fail: Runner | None = None
        self.passes = 0
        self._deadlock: str | None = None
        self._ended = threading.Event()
        for runner in runners:
            runner.baton = self

    def run_all(self) -> None:
        """Let all run until the last one has ended.

        Raises:
            KeyboardInterrupt: the program was interrupted; the runners go on until they are
                stopped, see :meth:`join`.
        """
        for runner in self.runners:
            runner.thread.start()
        self._give(self.runners[0])
        while not self.join(_LOOK_UP):
            pass

    def join(self, seconds: float | None = None) -> bool:
        """Wait until all threads have ended, so long at most; whether they have."""
        if not self._ended.wait(seconds):
            return False
        for runner in self.runners:
            runner.thread.join()
        return True

    def wait_until(self, wait: Wait) -> None:
        """Let others run until ``wait`` is over. Called by the holder.

        Raises:
            DeadlockError: nobody can go on.
            RankStopped: another rank failed.
        """
        runner = self.in_turn()
        if self.is_stopping:
            raise RankStopped
        if wait.is_over():
            return
        runner.wait = wait
        self.pass_on(runner)
        runner.turn.acquire()
        runner.wait = None
        if self._deadlock is not None:
            message, self._deadlock = self._deadlock, None
            runner.fault = DeadlockError(message)
            raise runner.fault
        if self.is_stopping:
            raise RankStopped

    def let_others_run(self) -> None:
        """Let all others go on as far as they can, and then this one. Called by the holder.

        Raises:
            RankStopped: another rank failed.
        """
        runner = self.in_turn()
        self.pass_on(runner)
        runner.turn.acquire()
        if self.is_stopping:
            raise RankStopped

    def in_turn(self) -> Runner:
        """The one that runs.

        Raises:
            RuntimeError: all have ended.
        """
        if self.holder is None:
            raise RuntimeError(
                "this belongs to ranks that have ended: groups, works and sharded models are there "
                "inside of ranks.run() only. Return whole tensors from it, such as full_tensor()"
            )
        return self.holder

    def pass_on(self, runner: Runner) -> None:
        """Give the baton to the next one who can go on, or end if all have."""
        runner.leave()
        self.passes += 1
        if self.passes % _COLLECT_EVERY == 0:
            gc.collect(1)
        left = [each for each in self._all_after(runner) if not each.has_ended]
        if not left:
            self.holder = None
            self._ended.set()
            return
        ready = [each for each in left if self.is_stopping or _can_go_on(each)]
        if not ready:
            ready = sorted(left, key=lambda each: each.rank)
            self._deadlock = self._describe()
        self._give(ready[0])

    def note_failure(self, runner: Runner) -> None:
        """Remember who failed first, and stop the others."""
        if self.first_to_fail is None:
            self.first_to_fail = runner
        self.is_stopping = True

    def _all_after(self, runner: Runner) -> list[Runner]:
        """All in rank order, beginning with the one after ``runner``, which is last."""
        return self.runners[runner.rank + 1 :] + self.runners[: runner.rank + 1]

    def _give(self, runner: Runner) -> None:
        self.holder = runner
        runner.enter()
        runner.turn.release()

    def _describe(self) -> str:
        lines = []
        for runner in self.runners:
            if runner.has_ended:
                lines.append(f"rank {runner.rank} has ended")
            else:
                place = line_of_thread(runner.thread.ident)
                lines.append(f"rank {runner.rank} waits {runner.wait}\n    at {place}")
        return "deadlock: no rank can go on.\n  " + "\n  ".join(lines)


def _can_go_on(runner: Runner) -> bool:
    return runner.wait is None or runner.wait.is_over()
