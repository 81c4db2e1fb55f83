"""``run``: one function, once a rank, on virtual GPUs, in threads of this process."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from course_lib import hardware, tracebacks
from course_lib.ranks import distributed, engines
from course_lib.ranks.baton import Baton, Runner
from course_lib.ranks.interrupting import end_interrupted
from course_lib.ranks.meetings import Communicator
from course_lib.ranks.output import print_in_rank_order
from course_lib.ranks.point_to_point import Exchange
from course_lib.ranks.rank_state import ProcessState, undo_environment
from course_lib.ranks.store import SharedStore
from course_lib.ranks.works import Pending
from course_lib.virtual.machine import DEVICE_TYPE, machine


def run(function: Callable[..., Any], gpus: list[torch.device], *args: Any) -> list[Any]:
    """Run ``function(*args)`` once a rank; see :func:`course_lib.ranks.run`."""
    _require_virtual(gpus)
    return Run(function, gpus, args).results()


def is_in_a_rank() -> bool:
    """Whether it is a virtual rank that asks."""
    return _Active.run is not None


def device() -> torch.device:
    """The GPU of the virtual rank that asks.

    Raises:
        RuntimeError: no rank asks.
    """
    if _Active.run is None:
        raise RuntimeError("ranks.device() is that of a rank: call it inside of ranks.run()")
    return _Active.run.gpus[_Active.run.rank]


class Run:
    """One call of :func:`run`, while it lasts.

    Attributes:
        gpus: one a rank.
        baton: who runs.
    """

    def __init__(
        self, function: Callable[..., Any], gpus: list[torch.device], args: tuple[Any, ...]
    ) -> None:
        self.gpus = gpus
        self._call = partial(function, *args)
        self._returned: list[Any] = [None] * len(gpus)
        self._data: dict[str, bytes] = {}
        self._stores: list[SharedStore] = []
        self._points: dict[str, tuple[Communicator, Exchange]] = {}
        self._pending: list[list[Pending]] = [[] for _ in gpus]
        own = ProcessState.as_it_is()
        self._own = own
        self._states = [own.for_rank(rank, len(gpus), gpu.index) for rank, gpu in enumerate(gpus)]
        for state in self._states:
            state.values.update(engines.state_of_a_rank(), groups=distributed.World())
        self.baton = Baton(
            [
                Runner(rank, self._live, state.put_in_place, state.take_out)
                for rank, state in enumerate(self._states)
            ]
        )

    @property
    def rank(self) -> int:
        """That of the rank that runs."""
        return self.baton.in_turn().rank

    def results(self) -> list[Any]:
        """Run all ranks; what each returned.

        Raises:
            BaseException: that of the rank that failed first.
        """
        clock = machine.clock
        collects = gc.isenabled()
        gc.disable()  # when Python looks for garbage must not depend on what was before
        clock.before_synchronize, was = self.finish_pending, clock.before_synchronize
        clock.has_side_streams = True  # from now on, what is enqueued later may be ready sooner
        held = self._bytes_in_use()
        _Active.run = self
        try:
            with distributed.used_by(self), engines.prepared():
                try:
                    self.baton.run_all()
                except KeyboardInterrupt:
                    end_interrupted(self.baton)
                    raise
        finally:
            _Active.run = None
            clock.before_synchronize = was
            self._own.meet(self._states)
            self._own.put_in_place()
            undo_environment(self._own.values["environment"], self._states)
            clock.drop_link_streams()
            if collects:
                gc.enable()
            self._print()
            self._let_go()
            if self._bytes_in_use() > held:
                gc.collect()  # of a process nothing is left either; a model of FSDP2 is a cycle
        self._raise_first()
        returned, self._returned = self._returned, []
        return returned

    def store(self) -> SharedStore:
        """A store of keys and values that all ranks share.

        It is kept: C++ code holds what is C++ of it alone, without the methods that are Python.
        """
        self._stores.append(SharedStore(self.baton, self._data))
        return self._stores[-1]

    def meeting_points(self, name: str, ranks: list[int]) -> tuple[Communicator, Exchange]:
        """Where the ranks of the group ``name`` meet: the same for all of them."""
        if name not in self._points:
            gpus = [self.gpus[rank] for rank in ranks]
            everyone = len(ranks) == len(self.gpus)
            title = "all ranks" if everyone else f"ranks {', '.join(map(str, ranks))}"
            self._points[name] = Communicator(title, ranks, gpus), Exchange(ranks, gpus)
        return self._points[name]

    def remember(self, pending: Pending) -> None:
        """Note that the rank that runs has begun ``pending``, until it is over."""
        mine = self._pending[self.rank]
        if not pending.is_over():
            mine[:] = [each for each in mine if not each.is_over()]
            mine.append(pending)

    def note_fault(self, error: BaseException) -> None:
        """Note what the rank that runs is about to raise, in case C++ loses it."""
        self.baton.in_turn().fault = error

    def finish_pending(self) -> None:
        """Let the rank that runs wait for all that it has begun."""
        mine = self._pending[self.rank]
        while mine:
            self.baton.wait_until(mine[-1])
            mine.pop()

    def _bytes_in_use(self) -> int:
        """On all GPUs of the run."""
        return sum(machine.memories[gpu.index].in_use for gpu in self.gpus)

    def _live(self) -> None:
        """What the thread of one rank does."""
        rank = self.rank
        torch.get_device_module(DEVICE_TYPE).set_device(self.gpus[rank])
        distributed.prepare_thread()
        try:
            self._returned[rank] = self._call()
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"rank {rank} ended with sys.exit({ended.code!r})") from None

    def _print(self) -> None:
        """What the ranks printed, in rank order."""
        print_in_rank_order(
            [state.values["stdout"].getvalue() for state in self._states],
            [state.values["stderr"].getvalue() for state in self._states],
        )

    def _let_go(self) -> None:
        """Keep no tensor: an error that was raised here keeps this object for as long as it is, and
        what DTensor remembers of a mesh, with the groups of the mesh, longer still."""
        for communicator, exchange in self._points.values():
            communicator.let_go()
            exchange.let_go()
        self._points.clear()
        self._pending.clear()
        self._stores.clear()
        for state in self._states:
            state.values.clear()
        for runner in self.baton.runners:
            _forget_locals(runner.error)
        if self.baton.first_to_fail is not None or self.baton.is_stopping:
            self._returned.clear()
        del self._call  # a function may hold tensors, as its arguments do

    def _raise_first(self) -> None:
        """Raise what ended the rank that failed first."""
        first = self.baton.first_to_fail
        error = first.error if first is not None else None
        for runner in self.baton.runners:
            runner.error = runner.fault = None
        if first is None or error is None:
            return
        error.add_note(f"(rank {first.rank} of {len(self.gpus)} failed first)")
        try:
            raise error.with_traceback(tracebacks.up_to_the_learner(error.__traceback__))
        finally:
            del error


class _Active:
    """The run that is going on."""

    run: Run | None = None


def _require_virtual(gpus: Sequence[torch.device]) -> None:
    for device in gpus:
        if not hardware.is_virtual(device):
            raise RuntimeError(
                f"ranks.run() runs on virtual GPUs, and {device} is none: "
                "take gpus = course_lib.devices(4, backing='cpu')"
            )
        if device.index is None:
            raise RuntimeError(f"{device} does not say which GPU: take '{device}:0' and so on")
        machine.check_index(device.index)
    if len(set(gpus)) < len(gpus):
        raise ValueError(f"each rank needs a GPU of its own, and one is there twice: {gpus}")


def _forget_locals(error: BaseException | None) -> None:
    """Free what the functions that ``error`` ended had in their variables: tensors, models."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
