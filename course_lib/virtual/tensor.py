"""The virtual GPU's tensor: real numbers inside, a device's rules around them.

``VirtualTensor`` is a wrapper subclass: to PyTorch it is a tensor on ``vgpu:1``, and inside it
holds an ordinary CPU tensor with the numbers. PyTorch's dispatcher hands every operator that
touches one to ``__torch_dispatch__``, below autograd, so that autograd, hooks, optimisers and
modules work as on any device. ``operators`` says who runs it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import cache
from typing import Any, SupportsIndex

import torch
from torch.storage import TypedStorage

from course_lib.virtual import hazards
from course_lib.virtual.machine import DEVICE_TYPE, machine
from course_lib.virtual.memory import Allocation, Memory
from course_lib.virtual.operators import Operator, known_operators
from course_lib.virtual.storages import VirtualStorage

_make_wrapper = torch.Tensor._make_wrapper_subclass
_data: Any = torch._C.TensorBase.data

# What every virtual tensor has, and what PyTorch marks a parameter with.
OF_VIRTUAL_TENSORS = {"held", "allocation", "_is_param"}


class VirtualTensor(torch.Tensor):
    """A tensor on a virtual GPU. Made by :func:`wrap` and by nothing else.

    Attributes:
        held: the CPU tensor with the numbers.
        allocation: the memory that it keeps in use, shared with its views.
    """

    held: torch.Tensor
    allocation: Allocation

    # Nothing here changes what a Python-level function means, and asking costs 5 us a call.
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a class method, as PyTorch asks for one
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if len(types) > 1:  # a tensor with others inside, as DTensor's: it takes itself apart
            return NotImplemented
        operator = known_operators.get(id(func)) or Operator.of(func)
        return operator.handler(operator, args, {} if kwargs is None else kwargs)

    @property
    def device_index(self) -> int:
        """Which virtual GPU it is on."""
        return self.allocation.memory.index

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # untyped
        machine.check_made_here(self.allocation.memory)
        stream = machine.clock.current[self.device_index]
        if machine.clock.has_side_streams:
            hazards.check((stream, stream.count, "repr"), [self], [])
        stream.synchronize()
        numbers = repr(self.held).replace(f", device='{self.held.device}'", "")
        suffix = f", device='{self.device}'"
        if self.grad_fn is not None:
            suffix += f", grad_fn=<{type(self.grad_fn).__name__}>"
        elif self.requires_grad:
            suffix += ", requires_grad=True"
        text = f"{numbers[:-1]}{suffix})"
        if isinstance(self, torch.nn.Parameter):
            return f"Parameter containing:\n{text}"
        return text

    def __format__(self, spec: str) -> str:
        # f"{loss:.3f}" reads the number, as for any device.
        return format(self.item(), spec) if self.dim() == 0 else super().__format__(spec)

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(
                f"can't convert {self.device} device type tensor to numpy. "
                "Use Tensor.cpu() to copy the tensor to host memory first."
            )
        return self.detach().cpu().numpy()

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("only a tensor that is no result of others can be deep-copied")
        result: torch.Tensor
        if isinstance(self, torch.nn.Parameter):
            result = torch.nn.Parameter(self.detach().clone(), self.requires_grad)
        else:  # views of one memory are that in the copy too; unlike a parameter's, gradients stay
            plain = self.detach().resolve_conj().resolve_neg()
            storage = copy.deepcopy(plain.untyped_storage(), memo)
            result = torch.empty(0, dtype=self.dtype, device=self.device)
            result.set_(storage, plain.storage_offset(), plain.shape, plain.stride())
            result.requires_grad_(self.requires_grad)
            result.grad = copy.deepcopy(self.grad, memo)
            result.__dict__.update(copy.deepcopy(self._own_attributes(), memo))
        memo[id(self)] = result
        return result

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        # As PyTorch does it; its own method knows wrapper subclasses by their class alone.
        hooks: OrderedDict = OrderedDict()  # are not saved
        own = self._own_attributes()
        what: tuple
        if isinstance(self, torch.nn.Parameter):
            what = (self.detach(), self.requires_grad, hooks)
            if own:
                return torch._utils._rebuild_parameter_with_state, (*what, own)
            return torch._utils._rebuild_parameter, what
        plain = self.detach().resolve_conj().resolve_neg()
        storage = TypedStorage(
            wrap_storage=plain.untyped_storage(), dtype=self.dtype, _internal=True
        )
        form = plain.storage_offset(), tuple(plain.shape), plain.stride()
        rebuild, what = torch._utils._rebuild_tensor_v2, (storage, *form, self.requires_grad, hooks)
        if own:
            return torch._tensor._rebuild_from_type_v2, (rebuild, torch.Tensor, what, own)
        return rebuild, what

    def _own_attributes(self) -> dict[str, Any]:
        """What the program has set on this tensor, as in ``p.sequence_parallel = True``."""
        return {name: own for name, own in vars(self).items() if name not in OF_VIRTUAL_TENSORS}

    def untyped_storage(self) -> VirtualStorage:
        return VirtualStorage.around(self.held.untyped_storage(), self.allocation, self.device)

    def data_ptr(self) -> int:
        if self.numel() == 0:
            return 0
        offset = int(self.storage_offset()) * self.element_size()
        return self.untyped_storage().data_ptr() + offset

    def new_tensor(  # type: ignore[override]  # PyTorch takes data alone by its place
        self, data: Any, *, device: Any = None, **options: Any
    ) -> torch.Tensor:
        # PyTorch would ask its guard for the current device, and mean this tensor's.
        return super().new_tensor(data, device=self.device if device is None else device, **options)

    def new(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and type(args[0]) in (list, tuple):  # data, and not a shape
            return self.new_tensor(args[0], dtype=self.dtype)
        with torch.get_device_module(DEVICE_TYPE).device(self.device):  # as above
            return super().new(*args, **kwargs)

    def pin_memory(self, device: Any = None) -> torch.Tensor:
        raise RuntimeError(f"cannot pin a tensor on {self.device}: only CPU tensors can be pinned")

    def record_stream(self, stream: Any) -> None:
        """Nothing to do: memory here is reused in the order of the program."""

    def as_subclass(self, cls: Any) -> Any:
        return self if cls is torch.Tensor else super().as_subclass(cls)

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def follow(self, inner: torch.Tensor, allocation: Allocation) -> None:
        """Be a tensor around ``inner``, whose form may be another than this one's."""
        form = wrap(inner, allocation.memory, allocation)
        with torch._C._DisableTorchDispatch():
            _data.__set__(self, form)
        self.held, self.allocation = inner, allocation


@cache
def device_of(index: int) -> torch.device:
    """``torch.device("vgpu", index)``, made once."""
    return torch.device(DEVICE_TYPE, index)


def wrap(
    inner: torch.Tensor, memory: Memory, allocation: Allocation | None = None
) -> VirtualTensor:
    """A tensor around ``inner``; it takes new bytes of ``memory`` unless told whose it views.

    Raises:
        torch.OutOfMemoryError: the device is full.
        NotImplementedError: ``inner`` is sparse or nested.
    """
    layout = inner.layout
    if layout is not torch.strided:
        raise not_dense(layout)
    try:
        shape = inner.shape
    except RuntimeError:  # nested tensors have none: to ask first would take longer
        raise not_dense("nested ones: pad them") from None
    if allocation is None:
        allocation = memory.allocate(inner.untyped_storage().nbytes())
    # Positional arguments, because parsing names would take as long as all the rest.
    outer = _make_wrapper(
        VirtualTensor,
        shape,
        inner.stride(),
        inner.storage_offset(),
        None,
        inner.dtype,
        layout,
        memory.device,
    )
    # At once, for then Python finds each of them sooner than if they had been set one by one.
    outer.__dict__ = {"held": inner, "allocation": allocation}
    return outer


def not_dense(what: Any) -> NotImplementedError:
    """The error of whatever would put sparse or nested tensors on a virtual GPU."""
    return NotImplementedError(f"virtual GPUs hold dense tensors only, not {what}")


def index_of(device: torch.device) -> int:
    """``torch.device("vgpu:2")`` as ``2``, after checking that there is such a device."""
    index = machine.clock.current_device if device.index is None else device.index
    machine.check_index(index)
    return index
