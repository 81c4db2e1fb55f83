"""The key-value store that ranks share: ``torch.distributed`` keeps small things in one."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from course_lib.ranks.baton import Baton


class _Keys:
    """The wait for some keys of a store."""

    def __init__(self, data: dict[str, bytes], keys: list[str]) -> None:
        self._data, self._keys = data, keys

    def is_over(self) -> bool:
        return all(key in self._data for key in self._keys)

    def __str__(self) -> str:
        return f"for a key in the store that nobody has set: {self._keys}"


class SharedStore(dist.Store):
    """A store in this process; who waits for a key passes the baton on.

    Args:
        data: the same dictionary for all ranks.
    """

    def __init__(self, baton: Baton, data: dict[str, bytes]) -> None:
        super().__init__()
        self._baton, self._data = baton, data

    def set(self, key: str, value: Any) -> None:
        self._data[key] = _bytes(value)

    def get(self, key: str) -> bytes:
        self._baton.wait_until(_Keys(self._data, [key]))
        return self._data[key]

    def add(self, key: str, amount: int) -> int:
        total = int(self._data.get(key, b"0")) + amount
        self._data[key] = str(total).encode()
        return total

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        if self._data.get(key, b"") == _bytes(expected):
            self._data[key] = _bytes(desired)
        return self._data.get(key, _bytes(expected))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._baton.wait_until(_Keys(self._data, keys))

    def check(self, keys: list[str]) -> bool:
        return all(key in self._data for key in keys)

    def delete_key(self, key: str) -> bool:
        return self._data.pop(key, None) is not None

    def num_keys(self) -> int:
        return len(self._data)

    def set_timeout(self, timeout: timedelta) -> None:
        """A wait that cannot end is a deadlock, and named at once."""

    def clone(self) -> SharedStore:
        return SharedStore(self._baton, self._data)


def _bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
