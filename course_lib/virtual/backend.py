"""Tell PyTorch that a device type ``vgpu`` exists.

Rests on ``torch.utils.backend_registration._setup_privateuseone_for_python_backend`` (PyTorch
2.11 and later), which gives a device type written in Python what otherwise needs C++. It can be
done once in a process, and is done when the first virtual GPUs are asked for.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch._decomp.decompositions import gru_impl, lstm_impl
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from course_lib.virtual import autocast
from course_lib.virtual.machine import DEVICE_TYPE, machine
from course_lib.virtual.tensor import (
    Operator,
    copy_,
    device_generator,
    finish,
    index_of,
    refuse_generator,
)

aten = torch.ops.aten


class _DeviceModule:
    """What ``torch.vgpu`` is; the names are those of ``torch.cuda``."""

    _initialized = True

    def is_available(self) -> bool:
        return machine.device_count > 0

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return machine.device_count

    def current_device(self) -> int:
        return machine.current_device

    def set_device(self, device: Any) -> None:
        machine.current_device = _index(device)

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        outer, machine.current_device = machine.current_device, _index(device)
        try:
            yield
        finally:
            machine.current_device = outer

    def synchronize(self, device: Any = None) -> None:
        if device is None:
            machine.synchronize()
        else:
            machine.clock.wait(_index(device))

    def memory_allocated(self, device: Any = None) -> int:
        return machine.memories[_index(device)].in_use

    def max_memory_allocated(self, device: Any = None) -> int:
        return machine.memories[_index(device)].peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        memory = machine.memories[_index(device)]
        memory.peak = memory.in_use

    def manual_seed_all(self, seed: int) -> None:
        for generator in machine.generators:
            generator.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return machine.generators[_index(device)].get_state()

    def set_rng_state(self, new_state: torch.Tensor, device: Any = None) -> None:
        machine.generators[_index(device)].set_state(new_state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _index(device: Any) -> int:
    """A device given as ``"vgpu:1"``, as a ``torch.device``, as ``1`` or not at all."""
    if device is None:
        return machine.current_device
    return index_of(
        torch.device(DEVICE_TYPE, device) if isinstance(device, int) else torch.device(device)
    )


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return True

    def is_built(self) -> bool:
        return True

    def has_primary_context(self, index: int) -> bool:
        return True


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self):
        # When an operator fails during backward, the engine asks this on its way out, while
        # Python's error is still set. No Python function can return then, and PyTorch would end
        # the process. So the error is taken out here; _prepare_backward raises it again.
        try:
            _raise_pending_error()
        except BaseException as error:
            _failure.error = error
        return _PRIVATE_USE_1


# Called through ctypes, any C function raises the error that is set.
_raise_pending_error = ctypes.pythonapi.PyErr_Occurred
_PRIVATE_USE_1 = torch._C._autograd.DeviceType.PrivateUse1


class _Failure(threading.local):
    """The error that ended a backward pass on this thread."""

    error: BaseException | None = None


_failure = _Failure()


@cache
def register() -> list[torch.library.Library]:
    """Make ``torch.device("vgpu:0")`` a device. Calling it again does nothing.

    Returns:
        The libraries of registered operators, which PyTorch forgets when they are destroyed.
    """
    _setup_privateuseone_for_python_backend(
        DEVICE_TYPE, backend_module=_DeviceModule(), hook=_Hooks(), device_guard=_Guard()
    )
    # Without this, Module.to() gives two tensors for a parameter that two layers share.
    torch.__future__.set_swap_module_params_on_conversion(True)
    _prepare_backward()
    library = torch.library.Library("aten", "IMPL")
    _register_operators(library)
    _register_attention(library)
    _register_recurrent(library)
    # torch.tensor(..., device="vgpu:1") copies with the Python dispatcher switched off.
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    # What torch.load does with map_location="vgpu:2": tensors are rebuilt from the CPU's numbers.
    torch.serialization.register_package(9, lambda storage: None, _keep_storage)
    return [library, *autocast.register()]


def _keep_storage(storage: Any, location: str) -> Any:
    return storage if location.startswith(DEVICE_TYPE) else None


def _prepare_backward() -> None:
    """Let the thread that calls backward compute every device's gradients itself.

    PyTorch's autograd engine has one thread for each device, and asks a guard written in C++
    which thread that is; a guard written in Python can only answer "device 0". Without those
    threads the question does not arise, and the simulated order of work is always the same.
    The setting belongs to a thread, so every thread makes it as it enters backward.
    """
    run_backward = torch.autograd._engine_run_backward

    def run_on_this_thread(*args: Any, **kwargs: Any) -> Any:
        torch._C._set_multithreading_enabled(False)
        try:
            return run_backward(*args, **kwargs)
        except SystemError:  # the engine failed, and _Guard took its error out
            if _failure.error is None:
                raise
        try:
            raise _failure.error
        finally:
            _failure.error = None  # a local name would keep the traceback's tensors alive

    torch.autograd._engine_run_backward = run_on_this_thread


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
            library.impl(name, partial(_create, func), "PrivateUse1")
        elif on_cpu and composite:
            # silu_backward and two more: a device without a kernel of its own gets the composite
            # one, which rounds differently. It is enough that there is a kernel.
            library.impl(name, _never_called, "PrivateUse1")


def _never_called(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("__torch_dispatch__ comes before this kernel")


def _create(func: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Run a factory on the CPU and put what it made on the device."""
    index = index_of(kwargs["device"])
    if kwargs.get("generator") is not None:
        refuse_generator(kwargs["generator"])
    operator = Operator.of(func)
    with device_generator(index) if operator.is_random else nullcontext():
        try:
            out = func(*args, **{**kwargs, "device": "cpu"})
        except RuntimeError as error:
            if "can't allocate memory" in str(error):
                raise torch.OutOfMemoryError(str(error)) from None
            raise
    return finish(operator, [], {}, index, [], out)


def _register_recurrent(library: torch.library.Library) -> None:
    """LSTM and GRU are one fused operator on a GPU; here they are the products they consist of."""
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        library.impl("lstm.input", lstm_impl, key)
        library.impl("gru.input", gru_impl, key)


def _copy_from(source: torch.Tensor, destination: torch.Tensor, non_blocking: bool = False):
    return copy_(Operator.of(aten.copy_.default), (destination, source, non_blocking), {})


def _register_attention(library: torch.library.Library) -> None:
    """``scaled_dot_product_attention`` picks its algorithm by device; pick what the CPU would."""

    def attention(
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    ):
        tensors = (query, key, value, attn_mask)
        inner = [getattr(tensor, "inner", tensor) for tensor in tensors]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            allowed = attn_mask
            attn_mask = torch.zeros_like(allowed, dtype=query.dtype)
            attn_mask.masked_fill_(allowed.logical_not(), float("-inf"))
        choice = torch._fused_sdp_choice(
            *inner, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        learns_mask = attn_mask is not None and attn_mask.requires_grad
        if not learns_mask and choice == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value:
            return aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]

    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        library.impl("scaled_dot_product_attention", attention, key)
