"""Recording: ``trace()`` and ``region()``, on virtual GPUs and on real ones.

On virtual GPUs the times are simulated; on real ones the same object is filled from
``torch.profiler``, and they are measured.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from course_lib import hardware
from course_lib.timeline import real_spans
from course_lib.timeline.recording import MemoryHistory, Trace
from course_lib.virtual.hazards import Hazard, StreamHazard
from course_lib.virtual.machine import DEVICE_TYPE, machine


@contextmanager
def trace(strict: bool = False) -> Iterator[Trace]:
    """Record what the GPUs do in the block; the recording is complete when the block ends.

    Args:
        strict: raise a :class:`~course_lib.StreamHazard` at the first operation that does not
            wait for another stream as it should, where otherwise it is noted in ``hazards``
            (virtual GPUs only).

    Raises:
        RuntimeError: there are no devices yet, or it is a rank that asks.
    """
    if not machine.device_count and not hardware.real_devices:
        raise RuntimeError("there is nothing to record yet: call course_lib.devices(4) first")
    if machine.clock.own_device is not None:
        raise RuntimeError("a rank cannot record all ranks: put trace() around ranks.run()")
    gc.collect()  # peak memory must not depend on when Python last looked for garbage
    hardware.synchronize()
    recording = _trace_virtual(strict) if machine.device_count else _trace_real()
    with recording as result:
        yield result


@contextmanager
def region(name: str) -> Iterator[None]:
    """Name what the program is doing, as in ``with course_lib.region("forward"):``."""
    clock = machine.clock
    outer, clock.region = clock.region, name
    try:
        with real_spans.annotate(name):
            yield
    finally:
        clock.region = outer


@contextmanager
def _trace_virtual(strict: bool) -> Iterator[Trace]:
    clock, count = machine.clock, machine.device_count
    result = Trace(DEVICE_TYPE, count, nodes=clock.nodes)
    began = clock.host

    def add_hazard(hazard: Hazard) -> None:
        result.hazards.append(hazard)
        if strict:
            raise StreamHazard(str(hazard))

    def watch(index: int, history: MemoryHistory) -> Callable[[int], None]:
        def add_change(nbytes: int) -> None:
            # The host reserves memory when it enqueues an operation, often long before the
            # device gets there. Drawn at the host's time, all would stand at the left edge.
            free_at, tasks = clock.current[index].end()
            if tasks:
                unsettled.append((history, len(history), tasks))
            history.append(max(clock.host, free_at) - began, nbytes)

        return add_change

    unsettled: list[tuple[MemoryHistory, int, list]] = []
    listeners = []
    for index, memory in enumerate(machine.memories[:count]):
        history = MemoryHistory((0.0, memory.in_use))
        listeners.append(watch(index, history))
        memory.listeners.append(listeners[-1])
        result.memory.append(history)
    clock.listeners.append(result.spans.append)
    clock.hazard_listeners.append(add_hazard)
    try:
        yield result
    finally:
        machine.synchronize()
        clock.listeners.remove(result.spans.append)
        clock.hazard_listeners.remove(add_hazard)
        for memory, listener in zip(machine.memories, listeners, strict=False):
            memory.listeners.remove(listener)
        result.seconds = clock.host - began
        for span in result.spans:
            span.start -= began
            span.end -= began
        for history, place, tasks in unsettled:
            seconds = clock.tasks.end_of(tasks) - began
            history.seconds[place] = max(history.seconds[place], seconds)
        for history in result.memory:
            history.append(result.seconds, history.nbytes[-1])
            result.peak_memory.append(max(history.nbytes))


@contextmanager
def _trace_real() -> Iterator[Trace]:
    gpus = hardware.real_devices
    result = Trace("cuda", len(gpus))
    for gpu in gpus:
        hardware.reset_peak_memory(gpu)
    try:
        with real_spans.record_spans(result.spans, gpus):
            yield result
    finally:
        result.seconds = max((span.end for span in result.spans), default=0.0)
        result.peak_memory = [hardware.peak_memory(gpu) for gpu in gpus]
