"""Works: what a rank holds of an operation that others must take part in.

``wait`` makes the rank's current stream wait, not its host, as with NCCL. There must be something
to wait for: so the rank's thread stops until all have come, which takes no simulated time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.futures import Future

from course_lib.ranks.baton import Baton
from course_lib.virtual.machine import machine
from course_lib.virtual.streams import Event


class Pending(Protocol):
    """An operation of several ranks, seen from one of them."""

    def is_over(self) -> bool:
        """Whether all have come."""

    def end(self) -> Event | None:
        """When this rank's part is done; ``None`` if no device takes part."""

    def host_seconds(self) -> float:
        """When the last host came."""

    def __str__(self) -> str:
        """What is missing."""


class Work(torch.distributed.Work):
    """What ``async_op=True`` and ``isend`` return.

    Args:
        outputs: what its future gives.
        blocks_host: whether ``wait`` makes the host wait too, as a barrier does.
    """

    def __init__(
        self, baton: Baton, pending: Pending, outputs: Sequence[Tensor], blocks_host: bool = False
    ) -> None:
        super().__init__()
        self._baton, self._pending, self._outputs = baton, pending, list(outputs)
        self._blocks_host = blocks_host

    def wait(self, timeout: Any = None) -> bool:
        """Let the current stream go on after the operation."""
        self._baton.wait_until(self._pending)
        end = self._pending.end()
        clock = machine.clock
        if end is not None:
            stream = end._stream
            end.wait(clock.current[stream.device_index])
            if self._blocks_host:
                end.synchronize()
        if end is None or self._blocks_host:
            clock.host = max(clock.host, self._pending.host_seconds())
        return True

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        if not self._pending.is_over():
            self._baton.let_others_run()  # who asks again and again would keep them from coming
        if not self._pending.is_over():
            return False
        end = self._pending.end()
        return end is None or end.query()

    def is_success(self) -> bool:
        return self.is_completed()

    def exception(self) -> None:
        return None

    def result(self) -> list[Tensor]:
        return self._outputs

    def get_future(self) -> Future:
        """A future of the outputs.

        C++ code waits for it with no thought of the baton, so it is done when it is returned; but
        asked for by a node of a backward pass, where neither the rank nor its stream must stop if
        computing is to go on beside (not even that of the rank that comes last, for which all is
        over at once), it is done when the pass ends, before whoever asked for it waits.
        """
        future: Future = Future()
        if torch._C._current_autograd_node() is None:
            self._finish(future)
        else:
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: self._finish(future))
        return future

    def _finish(self, future: Future) -> None:
        self.wait()
        future.set_result(self._outputs)


class Together(torch.distributed.Work):
    """Several works as one."""

    def __init__(self, works: Sequence[torch.distributed.Work]) -> None:
        super().__init__()
        self._works = list(works)

    def wait(self, timeout: Any = None) -> bool:
        return _all(work.wait() for work in self._works)

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        return self.is_completed()

    def result(self) -> list[Tensor]:
        return [tensor for work in self._works for tensor in work.result()]

    def get_future(self) -> Future:
        self.wait()
        future: Future = Future()
        future.set_result(self.result())
        return future


def _all(values: Any) -> bool:
    return all(list(values))  # every one is asked
