"""Functions and values as bytes, for another process that has the same Python and packages.

``pickle`` sends a function by its name, and a function of a notebook's cell has none that another
process knows. ``cloudpickle`` sends the code itself, with the variables that it refers to. It says
``<dynamic-code>`` for the file that code is from; here it keeps its name, by which errors are shown
with their lines.
"""

from __future__ import annotations

import io
import marshal
from types import CodeType
from typing import Any

import cloudpickle


class _Pickler(cloudpickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, CodeType):
            return marshal.loads, (marshal.dumps(value),)
        return super().reducer_override(value)


def packed(value: Any) -> bytes:
    """What ``pickle.loads`` reads.

    Raises:
        Exception: of any kind, if something in ``value`` cannot be sent: an open file, a lock.
    """
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()
