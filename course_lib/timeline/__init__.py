"""What ran where and when, which bytes moved, how much memory was held, and pictures of it.

Record a step, then draw it::

    with course_lib.trace() as t:
        train_step()
    t.plot()
"""

from course_lib.timeline.recorders import region, trace
from course_lib.timeline.recording import MemoryHistory, Trace

__all__ = ["MemoryHistory", "Trace", "region", "trace"]
