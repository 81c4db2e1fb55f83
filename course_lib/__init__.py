"""Data and model parallelism, by hand: the companion package of the course.

``course_lib.devices(4)`` gives four GPUs, real or virtual; ``course_lib.trace()`` shows what they
did. The rest is in modules named after what they hold.
"""

from course_lib import tried_versions  # noqa: F401  (first: it warns before another one fails)
from course_lib.hardware import (
    current_stream,
    devices,
    event,
    host_seconds,
    is_virtual,
    memory_capacity,
    memory_in_use,
    node_of,
    peak_memory,
    reset_peak_memory,
    side_stream,
    synchronize,
)
from course_lib.timeline import Trace, region, trace
from course_lib.virtual.hazards import StreamHazard
from course_lib.virtual.memory import format_bytes
from course_lib.virtual.network import ETHERNET, INFINIBAND_HDR, INFINIBAND_NDR, Network
from course_lib.virtual.paper import PaperMachine
from course_lib.virtual.spec import A100, A100_PCIE, CLASSROOM, GB200, H100, H200, LAPTOP, Spec

__all__ = [
    "A100",
    "A100_PCIE",
    "CLASSROOM",
    "ETHERNET",
    "GB200",
    "H100",
    "H200",
    "INFINIBAND_HDR",
    "INFINIBAND_NDR",
    "LAPTOP",
    "Network",
    "PaperMachine",
    "Spec",
    "StreamHazard",
    "Trace",
    "current_stream",
    "devices",
    "event",
    "format_bytes",
    "host_seconds",
    "is_virtual",
    "memory_capacity",
    "memory_in_use",
    "node_of",
    "peak_memory",
    "region",
    "reset_peak_memory",
    "side_stream",
    "synchronize",
    "trace",
]
