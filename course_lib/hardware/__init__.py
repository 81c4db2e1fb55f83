"""Which GPUs to use, real or virtual. Nothing above this package needs to know which they are.

``choosing`` gives them, ``queues`` has their streams and events, ``questions`` says what there is
to know about one.
"""

from course_lib.hardware.choosing import devices, fresh_devices, real_devices, real_gpus
from course_lib.hardware.questions import (
    holds_numbers,
    is_tensor,
    is_virtual,
    memory_capacity,
    memory_in_use,
    node_of,
    peak_memory,
    reset_peak_memory,
)
from course_lib.hardware.queues import (
    Event,
    Stream,
    current_stream,
    event,
    host_seconds,
    side_stream,
    synchronize,
)
from course_lib.virtual.spec import Spec

__all__ = [
    "Event",
    "Spec",
    "Stream",
    "current_stream",
    "devices",
    "event",
    "fresh_devices",
    "holds_numbers",
    "host_seconds",
    "is_tensor",
    "is_virtual",
    "memory_capacity",
    "memory_in_use",
    "node_of",
    "peak_memory",
    "real_devices",
    "real_gpus",
    "reset_peak_memory",
    "side_stream",
    "synchronize",
]
