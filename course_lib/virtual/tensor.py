"""The virtual GPU's tensor: real numbers inside, a device's rules around them.

``VirtualTensor`` is a wrapper subclass: to PyTorch it is a tensor on ``vgpu:1``, and inside it
holds an ordinary CPU tensor with the numbers. PyTorch's dispatcher hands every operator that
touches one to ``__torch_dispatch__``, below autograd, so that autograd, hooks, optimisers and
modules work as on any device. Each call then goes through the same five steps, in
:func:`execute`: unwrap the arguments, check that they share a device, run the operator on the
numbers inside, account for memory and time, wrap what came out.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from course_lib.virtual import hazards
from course_lib.virtual.cost import bytes_formula, flops_formula, runs_nothing
from course_lib.virtual.machine import DEVICE_TYPE, machine
from course_lib.virtual.memory import Allocation
from course_lib.virtual.pinned import is_pinned

aten = torch.ops.aten

_make_wrapper = torch.Tensor._make_wrapper_subclass
_is_alias_of = torch._C._is_alias_of
_DEVICES: dict[int, torch.device] = {}


class VirtualTensor(torch.Tensor):
    """A tensor on a virtual GPU. Made by :func:`wrap` and by nothing else.

    Attributes:
        inner: the CPU tensor with the numbers.
        index: which virtual GPU it is on.
        allocation: the memory that it keeps in use, shared with its views.
    """

    inner: torch.Tensor
    index: int
    allocation: Allocation

    # Nothing here changes what a Python-level function means, and asking costs 5 us a call.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        operator = _operators.get(id(func)) or Operator.of(func)
        return operator.handler(operator, args, kwargs or {})

    def __repr__(self, *, tensor_contents: str | None = None) -> str:
        machine.clock.current[self.index].synchronize()
        numbers = repr(self.inner).replace(f", device='{self.inner.device}'", "")
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

    def numpy(self, *, force: bool = False):
        if not force:
            raise TypeError(
                f"can't convert {self.device} device type tensor to numpy. "
                "Use Tensor.cpu() to copy the tensor to host memory first."
            )
        return self.detach().cpu().numpy()

    def __array__(self, dtype=None, copy=None):
        return self.numpy()

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("only a tensor that is no result of others can be deep-copied")
        result = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            result = torch.nn.Parameter(result, self.requires_grad)
        else:  # a parameter's copy has no gradient, a tensor's has
            result.requires_grad_(self.requires_grad)
            result.grad = copy.deepcopy(self.grad, memo)
        memo[id(self)] = result
        return result

    def __reduce_ex__(self, protocol: int) -> tuple:
        # Saved as the CPU tensor and the name of the device, as PyTorch does for other devices
        # whose memory it cannot read; torch.load(weights_only=True) knows the function.
        numbers = self.detach().cpu()
        rebuild = torch._utils._rebuild_device_tensor_from_cpu_tensor
        return rebuild, (numbers, self.dtype, str(self.device), self.requires_grad)

    def new_tensor(self, data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        # PyTorch would ask its guard for the current device, and mean this tensor's.
        return super().new_tensor(data, device=self.device if device is None else device, **options)

    def pin_memory(self, device: Any = None) -> torch.Tensor:
        raise RuntimeError(f"cannot pin a tensor on {self.device}: only CPU tensors can be pinned")

    def record_stream(self, stream: Any) -> None:
        """Nothing to do: memory here is reused in the order of the program."""

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def _set_data(self, value: torch.Tensor) -> None:
        if not isinstance(value, VirtualTensor):
            raise RuntimeError(
                f"cannot set .data of a tensor on {self.device} to one on {value.device}: "
                f"move it first, with .to('{self.device}')"
            )
        torch._C.TensorBase.data.__set__(self, value)
        self.inner, self.index, self.allocation = value.inner, value.index, value.allocation

    # ``x.data = y`` replaces what PyTorch sees; the numbers inside must follow.
    data = property(torch._C.TensorBase.data.__get__, _set_data)


def device_of(index: int) -> torch.device:
    """``torch.device("vgpu", index)``, made once."""
    device = _DEVICES.get(index)
    if device is None:
        device = _DEVICES[index] = torch.device(DEVICE_TYPE, index)
    return device


def wrap(inner: torch.Tensor, index: int, allocation: Allocation | None = None) -> VirtualTensor:
    """A tensor on ``vgpu:index`` around ``inner``; it takes new memory unless told whose it views.

    Raises:
        torch.OutOfMemoryError: the device is full.
    """
    layout = inner.layout
    if layout is not torch.strided:
        raise NotImplementedError(f"virtual GPUs hold dense tensors only, not {layout}")
    if allocation is None:
        allocation = machine.memories[index].allocate(inner.untyped_storage().nbytes())
    # Positional arguments, because parsing names would take as long as all the rest.
    outer = _make_wrapper(
        VirtualTensor,
        inner.shape,
        inner.stride(),
        inner.storage_offset(),
        None,
        inner.dtype,
        layout,
        _DEVICES.get(index) or device_of(index),
    )
    outer.inner = inner
    outer.index = index
    outer.allocation = allocation
    return outer


class Operator:
    """What :func:`execute` must know of one operator, looked up once and kept."""

    def __init__(self, func: torch._ops.OpOverload) -> None:
        schema = func._schema
        returned = [str(value.type) for value in schema.returns]
        # What calling ``func`` calls in the end, without the detour.
        self.run: Callable = _QUICKER.get(func, func._op)
        self.handler: Callable = _HANDLERS.get(func, execute)
        self.name: str = func._opname
        self.runs_nothing = runs_nothing(func)
        self.flops = flops_formula(func)
        self.bytes_moved = bytes_formula(func)
        self.is_mutable: bool = schema.is_mutable
        self.writes = [
            argument.name if argument.kwarg_only else position
            for position, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        # Only _unsafe_view and its like say that what they return is new, and return a view.
        self.returns_new = (
            set(returned) == {"Tensor"}
            and all(value.alias_info is None for value in schema.returns)
            and not func._can_decompose()
            and "unsafe" not in self.name
        )
        self.may_resize = self.name == "resize_" or any(
            argument.is_out for argument in schema.arguments
        )
        self.is_random = torch.Tag.nondeterministic_seeded in func.tags
        # The host cannot go on without the number, or the shape.
        self.host_waits = torch.Tag.dynamic_output_shape in func.tags or (
            not self.is_mutable and not any("Tensor" in kind for kind in returned)
        )
        self.takes_host_indices = func._overloadpacket in (
            aten.index,
            aten.index_put,
            aten.index_put_,
            aten._index_put_impl_,
        )

    @classmethod
    def of(cls, func: torch._ops.OpOverload) -> Operator:
        if id(func) not in _operators:
            _operators[id(func)] = cls(func)
        return _operators[id(func)]


# By id, because hashing an operator takes a call to Python; operators live for ever.
_operators: dict[int, Operator] = {}


def execute(operator: Operator, args: tuple, kwargs: dict) -> Any:
    """Run one operator whose tensors are on one virtual GPU."""
    tensors: list[VirtualTensor] = []
    host_tensors: list[torch.Tensor] = []
    inner_args = []
    for value in args:
        if type(value) is VirtualTensor:  # nearly always, and not worth a call
            tensors.append(value)
            inner_args.append(value.inner)
        else:
            inner_args.append(_unwrap(value, tensors, host_tensors))
    inner_kwargs = {}
    for name, value in kwargs.items():
        inner_kwargs[name] = _unwrap(value, tensors, host_tensors)
    index = tensors[0].index
    for tensor in tensors:
        if tensor.index != index:
            raise _mixed_devices(device_of(index), tensor.device)
    if host_tensors:
        _check_host_tensors(operator, index, host_tensors)
    if "device" in kwargs:
        index = _target_of(kwargs["device"], index)
        inner_kwargs["device"] = machine.backing if index is not None else kwargs["device"]
        if index is None:
            return operator.run(*inner_args, **inner_kwargs)
    if operator.host_waits:
        _check_has_numbers(operator.name)
    if operator.is_random:
        with device_generator(index):
            out = operator.run(*inner_args, **inner_kwargs)
    else:
        out = operator.run(*inner_args, **inner_kwargs)
    return finish(operator, inner_args, inner_kwargs, index, tensors, out)


def finish(
    operator: Operator,
    inner_args: list,
    inner_kwargs: dict,
    index: int,
    inputs: list[VirtualTensor],
    out: Any,
) -> Any:
    """Wrap what an operator returned, and charge memory and clock for it."""
    written: list[VirtualTensor]
    if operator.returns_new:
        if type(out) is tuple:  # a gradient that nobody asked for is None
            wrapped = tuple([each if each is None else wrap(each, index) for each in out])
            written = [each for each in wrapped if each is not None]
        else:
            wrapped = wrap(out, index)
            written = [wrapped]
    else:
        written = []
        wrapped = _wrap_output(out, index, inputs, written)
        if operator.is_mutable:
            if operator.may_resize:
                _follow_resized(inputs)
            written += _written_in_place(operator, inner_args, inner_kwargs, inputs)
    if operator.runs_nothing or not (written or operator.host_waits):
        return wrapped  # memory reserved, or a view: nothing runs on the device
    clock = machine.clock
    nbytes = operator.bytes_moved(inputs, written)
    if operator.flops is None:
        ticket = clock.compute(operator.name, index, 0.0, nbytes, 1.0)
    else:
        flops = operator.flops(inner_args, inner_kwargs, out)
        peak = machine.spec.peak_flops(inputs[0].dtype)
        ticket = clock.compute(operator.name, index, flops, nbytes, peak)
    if clock.has_side_streams:
        hazards.check(ticket, inputs, written)
    else:
        for tensor in written:
            tensor.allocation.writer = ticket
    if operator.host_waits:
        clock.current[index].synchronize()
    return wrapped


def _written_in_place(
    operator: Operator, inner_args: list, inner_kwargs: dict, inputs: list[VirtualTensor]
) -> list[VirtualTensor]:
    """Those of ``inputs`` that the operator changes."""
    if operator.writes == [0] and isinstance(inner_args[0], torch.Tensor):
        return [inputs[0]]
    changed = set()
    for place in operator.writes:
        if isinstance(place, str):
            value = inner_kwargs.get(place)
        else:
            value = inner_args[place] if place < len(inner_args) else None
        values = value if isinstance(value, (list, tuple)) else [value]
        changed.update(id(tensor) for tensor in values)
    return [tensor for tensor in inputs if id(tensor.inner) in changed]


def _check_has_numbers(name: str) -> None:
    """Raise a clear error if someone wants to read a number where there are none."""
    if machine.backing.type == "meta":
        raise RuntimeError(
            f"{name} reads numbers, and these virtual GPUs have none (backing='meta'): they keep "
            "shapes, memory and time. Leave the read out, or use devices(...) without backing=."
        )


def _follow_resized(tensors: list[VirtualTensor]) -> None:
    """Give each tensor whose inner one was resized its new shape, and new memory if it grew."""
    for outer in tensors:
        inner = outer.inner
        if inner.shape != outer.shape:
            grew = inner.untyped_storage().nbytes() > outer.allocation.nbytes
            outer.data = wrap(inner, outer.index, None if grew else outer.allocation)


@contextmanager
def device_generator(index: int) -> Iterator[None]:
    """Let the device's random number generator stand in for that of the backing."""
    if machine.backing.type == "meta":
        yield
        return
    own, standard = machine.generators[index], machine.standard_generator()
    with _dice:
        saved = standard.get_state()
        standard.set_state(own.get_state())
        try:
            yield
        finally:
            own.set_state(standard.get_state())
            standard.set_state(saved)


_dice = threading.RLock()  # all threads share the standard generator


def _unwrap(value: Any, tensors: list[VirtualTensor], host_tensors: list[torch.Tensor]) -> Any:
    """``value`` with the inner tensor in place of each virtual one; the lists collect both."""
    kind = type(value)
    if kind is VirtualTensor:
        tensors.append(value)
        return value.inner
    if kind in _PLAIN:
        return value
    if kind is list or kind is tuple:
        return kind([_unwrap(item, tensors, host_tensors) for item in value])
    if kind is torch.Tensor or isinstance(value, torch.Tensor):
        host_tensors.append(value)
    elif kind is torch.Generator:
        refuse_generator(value)
    return value


def refuse_generator(generator: torch.Generator) -> None:
    """Raise an error, in the words of CUDA, and say what to do."""
    raise RuntimeError(
        f"Expected a '{DEVICE_TYPE}' device type for generator but found '{generator.device.type}'."
        " Leave generator= out: each virtual GPU has its own, seeded by torch.manual_seed."
    )


_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.memory_format}


def _check_host_tensors(operator: Operator, index: int, host_tensors: list[torch.Tensor]) -> None:
    """Numbers and indices on the CPU may join the tensors of a device, as on CUDA."""
    for tensor in host_tensors:
        if tensor.dim() > 0 and not operator.takes_host_indices:
            raise _mixed_devices(device_of(index), tensor.device)


def _mixed_devices(one: torch.device, other: torch.device) -> RuntimeError:
    """The error of an operator whose tensors are on two devices, in the words of CUDA."""
    return RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, "
        f"{one} and {other}!"
    )


def _target_of(device: torch.device | None, index: int) -> int | None:
    """Index of the virtual GPU that ``device=`` asks for, ``None`` for the host."""
    if device is None:
        return index
    return index_of(device) if device.type == DEVICE_TYPE else None


def index_of(device: torch.device) -> int:
    """``torch.device("vgpu:2")`` as ``2``, after checking that there is such a device."""
    index = machine.clock.current_device if device.index is None else device.index
    machine.check_index(index)
    return index


def _wrap_output(
    value: Any, index: int, owners: list[VirtualTensor], new_tensors: list[VirtualTensor]
) -> Any:
    """Wrap every tensor in ``value``.

    Args:
        owners: tensors whose memory ``value`` may share.
        new_tensors: collects the tensors that took memory of their own.
    """
    if isinstance(value, torch.Tensor):
        for owner in owners:
            inner = owner.inner
            if value is inner:
                return owner
            if _is_alias_of(value, inner):
                return _wrap_view(value, index, owner.allocation)
        new_tensors.append(wrap(value, index))
        return new_tensors[-1]
    if isinstance(value, (list, tuple)):
        # What one operator returns may share memory too, as the gradients of a chunk do.
        owners = list(owners)
        wrapped = []
        for item in value:
            wrapped.append(_wrap_output(item, index, owners, new_tensors))
            if isinstance(item, torch.Tensor):
                owners.append(wrapped[-1])
        return type(value)(wrapped)
    return value


def _wrap_view(inner: torch.Tensor, index: int, allocation: Allocation) -> VirtualTensor:
    view = wrap(inner, index, allocation)
    # x.conj() and its like compute nothing: they set a bit that later operators look at.
    if inner.is_conj():
        torch._C._set_conj(view, True)
    if inner.is_neg():
        torch._C._set_neg(view, True)
    return view


# The operators that do more than compute on one device.


def _index(operator: Operator, args: tuple, kwargs: dict) -> torch.Tensor:
    """``x[indices]``: with a mask of booleans the host waits to know how many were picked."""
    has_mask = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return execute(operator if has_mask else _without_waiting(operator), args, kwargs)


@cache
def _without_waiting(operator: Operator) -> Operator:
    operator = copy.copy(operator)
    operator.host_waits = False
    return operator


def _to_copy(operator: Operator, args: tuple, kwargs: dict) -> torch.Tensor:
    """``x.to(...)``: on the same device a kernel, between devices a copy over the link."""
    (source,) = args
    device = kwargs.get("device")
    if device is None or device == source.device:
        return execute(operator, args, {**kwargs, "device": source.device})
    destination = _target_of(device, source.index)
    if device.type == "meta":
        return operator.run(source.inner, **kwargs)  # the shape goes, and no number
    if destination is None:
        _check_has_numbers(".to('cpu')")
        inner = operator.run(source.inner, **{**kwargs, "device": "cpu"})
        _charge_copy(source, inner, host_waits=not kwargs.get("non_blocking"))
        return inner
    outer = wrap(operator.run(source.inner, **{**kwargs, "device": machine.backing}), destination)
    _charge_copy(source, outer)
    return outer


def copy_(operator: Operator, args: tuple, kwargs: dict) -> torch.Tensor:
    """``a.copy_(b)``: the one operator that may have its tensors on two devices."""
    destination, source = args[0], args[1]
    if not isinstance(destination, VirtualTensor):
        _check_has_numbers("copy_ to the host")
    elif isinstance(source, VirtualTensor) and destination.index == source.index:
        return execute(operator, args, kwargs)
    operator.run(_inner(destination), _inner(source), *args[2:], **kwargs)
    non_blocking = any(args[2:]) or kwargs.get("non_blocking", False)
    on_host = source if isinstance(destination, VirtualTensor) else destination
    _charge_copy(source, destination, host_waits=not (non_blocking and is_pinned(on_host)))
    return destination


def _inner(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.inner if isinstance(tensor, VirtualTensor) else tensor


def _charge_copy(source: torch.Tensor, destination: torch.Tensor, host_waits: bool = True) -> None:
    """Charge the clock for a copy; a tensor that is not virtual is on the host."""
    is_read, is_written = (isinstance(end, VirtualTensor) for end in (source, destination))
    clock = machine.clock
    ticket = clock.copy(
        source.index if is_read else None,
        destination.index if is_written else None,
        source.nbytes,
        host_waits,
    )
    if clock.has_side_streams:
        hazards.check(ticket, [source] * is_read, [destination] * is_written)
    elif is_written:
        destination.allocation.writer = ticket


def _item(operator: Operator, args: tuple, kwargs: dict) -> Any:
    """``x.item()``: the host waits for the device, then reads one number."""
    _check_has_numbers(".item()")
    (tensor,) = args
    stream = machine.clock.current[tensor.index]
    if machine.clock.has_side_streams:
        hazards.check((stream, stream.count, "item"), [tensor], [])
    stream.synchronize()
    return operator.run(tensor.inner)


def _change_shape_in_place(operator: Operator, args: tuple, kwargs: dict) -> VirtualTensor:
    """``x.t_()`` and the like: the shape changes inside, and outside where PyTorch looks."""
    self = args[0]
    operator.run(self.inner, *args[1:], **kwargs)
    inner = self.inner
    with torch.utils._mode_utils.no_dispatch():
        torch.as_strided_(self, inner.size(), inner.stride(), inner.storage_offset())
    return self


# Python's own bindings read their arguments faster than an operator does that is called by name:
# a microsecond for each of the operators that training consists of.
_QUICKER: dict[torch._ops.OpOverload, Callable] = {
    aten._softmax.default: torch._softmax,
    aten.add.Tensor: torch.add,
    aten.add_.Tensor: torch.Tensor.add_,
    aten.addmm.default: torch.addmm,
    aten.bmm.default: torch.bmm,
    aten.cat.default: torch.cat,
    aten.div.Tensor: torch.div,
    aten.mm.default: torch.mm,
    aten.mul.Tensor: torch.mul,
    aten.mul_.Tensor: torch.Tensor.mul_,
    aten.native_layer_norm.default: torch.native_layer_norm,
    aten.sub.Tensor: torch.sub,
    aten.t.default: torch.t,
    aten.transpose.int: torch.transpose,
    aten.view.default: torch.Tensor.view,
}


def _dropout(operator: Operator, args: tuple, kwargs: dict) -> tuple[VirtualTensor, VirtualTensor]:
    """``native_dropout``, what a GPU runs, keeps a mask of booleans; the numbers are the CPU's."""
    x, probability, training = args
    if not training or probability == 0:
        return execute(operator, args, kwargs)
    keep = torch.empty_like(x.inner)
    keep.bernoulli_(1 - probability, generator=machine.generators[x.index])
    out = (x.inner * (keep / (1 - probability)), keep.bool())
    return finish(operator, [], {}, x.index, [x], out)


def _dropout_backward(operator: Operator, args: tuple, kwargs: dict) -> VirtualTensor:
    """The gradient of dropout, rounded as the CPU's autograd rounds it."""
    grad, mask, scale = args
    divisor = 1 / scale if scale else math.inf  # nothing was kept: the gradient is zero
    out = grad.inner * (mask.inner.to(grad.dtype) / divisor)
    return finish(operator, [], {}, grad.index, [grad, mask], out)


_HANDLERS = {
    aten._to_copy.default: _to_copy,
    aten.copy_.default: copy_,
    aten.index.Tensor: _index,
    aten._local_scalar_dense.default: _item,
    aten.native_dropout.default: _dropout,
    aten.native_dropout_backward.default: _dropout_backward,
}
_HANDLERS.update(
    {
        overload: _change_shape_in_place
        for packet in ("t_", "transpose_", "squeeze_", "unsqueeze_", "swapaxes_", "as_strided_")
        for overload in (
            getattr(getattr(aten, packet), name) for name in getattr(aten, packet).overloads()
        )
    }
)
