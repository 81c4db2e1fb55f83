"""Storages: a piece of a virtual GPU's memory, as programs see it that look below tensors.

``x.untyped_storage()`` of a virtual tensor is a :class:`VirtualStorage`: made when somebody asks,
one for each piece of memory, so that all views of it give the same. What it says of itself (size,
address) is true; to read or write bytes it makes a tensor of them, which the clock and the links
then see. ZeRO's engines free and take memory through ``untyped_storage().resize_``.

The address is that of the numbers on the host, or on the real GPU. Where there are no numbers it is
a number of its own all the same, because programs tell tensors apart by it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.storage import TypedStorage, _StorageBase

from course_lib.virtual.machine import DEVICE_TYPE
from course_lib.virtual.memory import Allocation
from course_lib.virtual.room import check_room, refuse_if_host_is_full

# No two pieces of memory without numbers are nearer to each other than 1 MB.
_ADDRESSES_APART = 1 << 16


class VirtualStorage(torch.UntypedStorage):
    """The storage of virtual tensors.

    Attributes:
        held: the storage with the numbers.
        allocation: the memory that it keeps in use, as every tensor on it does.
    """

    held: torch.UntypedStorage
    allocation: Allocation

    @classmethod
    def around(
        cls, inner: torch.UntypedStorage, allocation: Allocation, device: torch.device
    ) -> VirtualStorage:
        """The one storage of ``allocation``, whose numbers are in ``inner``."""
        storage: Any = allocation.storage() if allocation.storage is not None else None
        if storage is None:
            make = torch._C._construct_storage_from_data_pointer
            storage = make(inner.data_ptr(), device, inner.nbytes())
            storage.__class__ = cls
            storage.held, storage.allocation = inner, allocation
            allocation.storage = weakref.ref(storage)
        return storage

    def nbytes(self) -> int:
        return self.held.nbytes()

    size = __len__ = nbytes

    def data_ptr(self) -> int:
        if self.held.device.type == "meta" and self.nbytes():
            return id(self.allocation) * _ADDRESSES_APART
        return self.held.data_ptr()

    @property
    def _cdata(self) -> int:
        return id(self.allocation)  # whoever asks later, of a storage made anew, gets the same

    def resizable(self) -> bool:
        return True

    def resize_(self, nbytes: int) -> VirtualStorage:
        """Let the storage have ``nbytes``: memory is taken or freed, the first bytes stay.

        Raises:
            torch.OutOfMemoryError: the device is full.
        """
        memory = self.allocation.memory
        if nbytes > self.allocation.nbytes:
            check_room(nbytes, memory)
        try:
            self.held.resize_(nbytes)
        except RuntimeError as error:
            refuse_if_host_is_full(error, memory)
            raise
        self.allocation.resize(nbytes)
        return self

    def as_bytes(self) -> torch.Tensor:
        """All of it as a tensor of bytes, of the same memory."""
        return _as_bytes(self)

    def __getitem__(self, key: int | slice) -> Any:
        part = self.as_bytes()[key]
        return part.clone().untyped_storage() if isinstance(key, slice) else part.item()

    def __setitem__(self, key: int | slice, value: int) -> None:
        self.as_bytes()[key] = value

    def fill_(self, value: int) -> VirtualStorage:
        self.as_bytes().fill_(value)
        return self

    def copy_(self, source: Any, non_blocking: bool | None = None) -> Any:
        self.as_bytes().copy_(_as_bytes(source), bool(non_blocking))
        return self

    def clone(self) -> Any:
        return self.as_bytes().clone().untyped_storage()

    def new(self) -> Any:
        return torch.empty(0, dtype=torch.uint8, device=self.device).untyped_storage()

    def cpu(self) -> torch.UntypedStorage:
        return self.as_bytes().cpu().untyped_storage()

    def tolist(self) -> list[int]:
        return self.as_bytes().tolist()

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def _write_file(self, *where: Any) -> None:
        self.cpu()._write_file(*where)

    def _set_from_file(self, *where: Any) -> VirtualStorage:
        on_host = torch.UntypedStorage(self.nbytes())
        on_host._set_from_file(*where)
        return self.copy_(on_host)


# In a file it is an untyped storage like any other, with a device's name beside it.
VirtualStorage.__name__ = "UntypedStorage"


def prepare() -> None:
    """Let PyTorch's own storages go to virtual GPUs and be told from others. To be called once."""
    pytorch: Any = torch
    untyped_class: Any = torch.UntypedStorage
    typed_class: Any = TypedStorage
    is_storage = torch.is_storage
    to, wrapped = torch.storage._to, TypedStorage._new_wrapped_storage

    def to_device(self: _StorageBase, device: torch.device, non_blocking: bool = False) -> Any:
        if device.type != DEVICE_TYPE:
            return to(self, device, non_blocking)
        return _as_bytes(self).to(device, non_blocking=non_blocking).untyped_storage()

    def move(self: _StorageBase, device: Any = None, non_blocking: bool = False) -> Any:
        device = torch.device(DEVICE_TYPE, device) if isinstance(device, int) else device
        return self.to(device=device or DEVICE_TYPE, non_blocking=non_blocking)

    def wrapped_also_virtual(self: TypedStorage, storage: torch.UntypedStorage) -> TypedStorage:
        if not isinstance(storage, VirtualStorage):
            return wrapped(self, storage)
        return TypedStorage(wrap_storage=storage, dtype=self.dtype, _internal=True)

    untyped_class.__new__ = _new_storage
    pytorch.is_storage = lambda obj: isinstance(obj, VirtualStorage) or is_storage(obj)
    torch.storage._to = to_device
    setattr(_StorageBase, DEVICE_TYPE, move)
    typed_class._new_wrapped_storage = wrapped_also_virtual


def _as_bytes(storage: Any) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _new_storage(cls: type, *args: Any, device: Any = None, **kwargs: Any) -> torch.UntypedStorage:
    """``torch.UntypedStorage(8, device="vgpu:1")``, for which C++ has no allocator to ask."""
    if device is None or torch.device(device).type != DEVICE_TYPE:
        make: Any = torch._C.StorageBase.__new__
        return make(cls, *args, device=device, **kwargs)
    content = args[0] if args else 0
    if isinstance(content, int):
        return torch.empty(content, dtype=torch.uint8, device=device).untyped_storage()
    return torch.tensor(content, dtype=torch.uint8, device=device).untyped_storage()
