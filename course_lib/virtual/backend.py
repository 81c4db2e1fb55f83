"""Tell PyTorch that a device type ``vgpu`` exists.

Rests on ``torch.utils.backend_registration._setup_privateuseone_for_python_backend`` (PyTorch
2.11 and later), which gives a device type written in Python what otherwise needs C++. It can be
done once in a process, and is done when the first virtual GPUs are asked for.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from course_lib.virtual import host_copies, pinned, storages
from course_lib.virtual.adapters import (
    accelerator,
    amp,
    attention,
    autocast,
    batch_norm,
    compiler,
    current_device,
    data_attribute,
    data_parallel,
    dlpack,
    generator_class,
    gradients,
    interrupt,
    layouts,
    losses,
    modules,
    processes,
    profiling,
    recurrent,
    recurrent_layers,
    stream_classes,
    transformer,
)
from course_lib.virtual.adapters.device_module import DeviceModule
from course_lib.virtual.copies import copy_, item
from course_lib.virtual.execution import finish
from course_lib.virtual.generators import check_generator, device_generator
from course_lib.virtual.machine import DEVICE_TYPE, machine
from course_lib.virtual.operators import Operator
from course_lib.virtual.room import check_factory, refuse_if_host_is_full
from course_lib.virtual.special_operators import set_
from course_lib.virtual.tensor import index_of

aten = torch.ops.aten


def _answers(value: Any) -> property:
    """A method, for C++ code to call, that answers ``value`` whatever it is asked.

    pybind11 looks the method up, then lets Python handle signals, then calls what it found.
    """

    @interrupt.uninterrupted
    def look_up(self: Any) -> Callable[..., Any]:
        interrupt.cpp.is_asking = True
        interrupt.take_error()  # _prepare_backward raises it again
        return answer

    @interrupt.uninterrupted
    def answer(*args: Any) -> Any:
        interrupt.cpp.is_asking = False
        return value

    return property(look_up)


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    is_available = is_built = has_primary_context = _answers(True)


class _Guard(torch._C._acc.DeviceGuard):
    type_ = _answers(torch._C._autograd.DeviceType.PrivateUse1)


@cache
def register() -> list[torch.library.Library]:
    """Make ``torch.device("vgpu:0")`` a device. Calling it again does nothing.

    Returns:
        The libraries of registered operators, which PyTorch forgets when they are destroyed.
    """
    _setup_privateuseone_for_python_backend(
        DEVICE_TYPE, backend_module=DeviceModule(), hook=_Hooks(), device_guard=_Guard()
    )
    amp.prepare()
    batch_norm.prepare()
    modules.prepare()
    accelerator.prepare()
    compiler.prepare()
    storages.prepare()
    host_copies.prepare()
    data_attribute.prepare()
    current_device.prepare()
    generator_class.prepare()
    stream_classes.prepare()
    dlpack.prepare()
    profiling.prepare()
    transformer.prepare()
    data_parallel.prepare()
    processes.prepare()
    gradients.prepare()
    _prepare_backward()
    interrupt.install()
    library = torch.library.Library("aten", "IMPL")
    _register_operators(library)
    attention.register(library)
    losses.register(library)
    recurrent.register(library)
    recurrent_layers.register(library)
    # torch.tensor(..., device="vgpu:1") copies with the Python dispatcher switched off.
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    # torch.tensor([loss, other_loss]) reads numbers in the same way, torch.tensor(storage) bytes.
    library.impl("_local_scalar_dense", _read, "PrivateUse1")
    library.impl("set_.source_Storage", _set_storage, "PrivateUse1")
    libraries = [library, *autocast.register(), *layouts.register(), pinned.register()]
    _pass_over_what_was_there()
    return libraries


def _pass_over_what_was_there() -> None:
    """Let Python not look through all of PyTorch whenever a recording looks for garbage.

    What was there before the first virtual GPU holds no memory of one. ``torch._dynamo``, which the
    first optimizer imports, is as large again as the rest of PyTorch: here it is passed over, too.
    """
    importlib.import_module("torch._dynamo")
    gc.collect()
    gc.freeze()


def _prepare_backward() -> None:
    """Let the thread that calls backward compute every device's gradients itself.

    PyTorch's autograd engine has one thread for each device, and asks a guard written in C++
    which thread that is; a guard written in Python can only answer "device 0". Without those
    threads the question does not arise, and the simulated order of work is always the same.
    The setting belongs to a thread, so every thread makes it as it enters backward.
    """
    autograd: Any = torch.autograd
    run_backward = autograd._engine_run_backward

    def run_on_this_thread(outputs: tuple, given: tuple, *args: Any, **kwargs: Any) -> Any:
        torch._C._set_multithreading_enabled(False)
        given = gradients.check_roots(outputs, given)
        try:
            return run_backward(outputs, given, *args, **kwargs)
        except SystemError:  # the engine failed, and its error was taken out
            if interrupt.failure.error is None:
                raise
        try:
            raise interrupt.failure.error
        finally:
            interrupt.failure.error = None  # a local name would keep the traceback's tensors alive

    autograd._engine_run_backward = run_on_this_thread


def _register_operators(library: torch.library.Library) -> None:
    """Register the operators that PyTorch would not hand to ``__torch_dispatch__`` by itself."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for full_name in torch._C._dispatch_get_all_op_names():
        if not full_name.startswith("aten::"):
            continue
        name = full_name.removeprefix("aten::")
        base, _, overload = name.partition(".")
        arguments = torch._C._get_schema(f"aten::{base}", overload).arguments
        takes_device = any(argument.name == "device" for argument in arguments)
        takes_tensor = any("Tensor" in str(argument.type) for argument in arguments)
        on_cpu = has_kernel(full_name, "CPU")
        composite = has_kernel(full_name, "CompositeImplicitAutograd")
        if takes_device and not takes_tensor and (on_cpu or not composite):
            # torch.zeros(..., device="vgpu:1"): there is no tensor to dispatch on.
            func = getattr(getattr(aten, base), overload or "default")
            if base == "_efficientzerotensor":
                func = aten.zeros.default  # zeros without memory, of which C++ alone can take care
            library.impl(name, partial(_create, func), "PrivateUse1")
        elif (on_cpu and composite) or name in _CHECKED_BY_THE_CPU:
            # silu_backward and two more: a device without a kernel of its own gets the composite
            # one, which rounds differently. It is enough that there is a kernel.
            library.impl(name, _never_called, "PrivateUse1")


# Composite operators that look at their numbers on the CPU alone.
_CHECKED_BY_THE_CPU = {"one_hot"}


def _never_called(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("__torch_dispatch__ comes before this kernel")


def _create(func: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Run a factory where the numbers are, and put what it made on the device."""
    index = index_of(kwargs["device"])
    generator = kwargs.get("generator")
    if generator is not None:
        check_generator(generator)
    operator = Operator.of(func)
    check_factory(operator, args, kwargs, machine.memories[index])
    with device_generator(index) if operator.is_random and generator is None else nullcontext():
        try:
            out = operator.run(*args, **{**kwargs, "device": machine.backing})
        except RuntimeError as error:
            refuse_if_host_is_full(error, machine.memories[index])
            raise
    return finish(operator, [], {}, machine.memories[index], [], out)


def _copy_from(source: torch.Tensor, destination: torch.Tensor, non_blocking: bool = False) -> Any:
    return copy_(Operator.of(aten.copy_.default), (destination, source, non_blocking), {})


def _read(number: torch.Tensor) -> Any:
    return item(Operator.of(aten._local_scalar_dense.default), (number,), {})


def _set_storage(tensor: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    return set_(Operator.of(aten.set_.source_Storage), (tensor, storage), {})
