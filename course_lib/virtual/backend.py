"""Tell PyTorch that a device type ``vgpu`` exists.

Rests on ``torch.utils.backend_registration._setup_privateuseone_for_python_backend`` (PyTorch
2.11 and later), which gives a device type written in Python what otherwise needs C++. It can be
done once in a process, and is done when the first virtual GPUs are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from course_lib.virtual import accelerator, autocast, compiler, interrupt, modules, pinned
from course_lib.virtual.machine import DEVICE_TYPE, machine
from course_lib.virtual.streams import Stream
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
        return machine.clock.current_device

    def set_device(self, device: Any) -> None:
        machine.clock.current_device = _index(device)

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        clock = machine.clock
        outer, clock.current_device = clock.current_device, _index(device)
        try:
            yield
        finally:
            clock.current_device = outer

    def synchronize(self, device: Any = None) -> None:
        if device is None:
            machine.synchronize()
        else:
            machine.clock.synchronize(_index(device))

    def current_stream(self, device: Any = None) -> Stream:
        return machine.clock.current[_index(device)]

    def default_stream(self, device: Any = None) -> Stream:
        return machine.clock.streams[_index(device)][0]

    def set_stream(self, stream: Stream) -> None:
        if not isinstance(stream, Stream):
            raise TypeError(
                f"a stream of a virtual GPU comes from course_lib.stream(device): {stream!r}"
            )
        stream.__enter__()  # and nothing leaves it

    def memory_allocated(self, device: Any = None) -> int:
        return machine.memories[_index(device)].in_use

    def max_memory_allocated(self, device: Any = None) -> int:
        return machine.memories[_index(device)].peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        memory = machine.memories[_index(device)]
        memory.peak = memory.in_use

    def memory_reserved(self, device: Any = None) -> int:
        return self.memory_allocated(device)  # nothing is cached

    def max_memory_reserved(self, device: Any = None) -> int:
        return self.max_memory_allocated(device)

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        memory = machine.memories[_index(device)]
        return int(memory.capacity) - memory.in_use, int(memory.capacity)

    def empty_cache(self) -> None:
        """Nothing is cached."""

    def get_device_name(self, device: Any = None) -> str:
        return f"virtual {machine.spec.name} {_index(device)}"

    def manual_seed(self, seed: int) -> None:
        machine.generators[machine.clock.current_device].manual_seed(seed)

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
        return machine.clock.current_device
    return index_of(
        torch.device(DEVICE_TYPE, device) if isinstance(device, int) else torch.device(device)
    )


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
        DEVICE_TYPE, backend_module=_DeviceModule(), hook=_Hooks(), device_guard=_Guard()
    )
    modules.prepare()
    accelerator.prepare()
    compiler.prepare()
    _prepare_backward()
    interrupt.install()
    library = torch.library.Library("aten", "IMPL")
    _register_operators(library)
    _register_attention(library)
    _register_recurrent(library)
    # torch.tensor(..., device="vgpu:1") copies with the Python dispatcher switched off.
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    # What torch.load does with map_location="vgpu:2": tensors are rebuilt from the CPU's numbers.
    torch.serialization.register_package(9, lambda storage: None, _keep_storage)
    return [library, *autocast.register(), pinned.register()]


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
        except SystemError:  # the engine failed, and its error was taken out
            if interrupt.failure.error is None:
                raise
        try:
            raise interrupt.failure.error
        finally:
            interrupt.failure.error = None  # a local name would keep the traceback's tensors alive

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
    """Run a factory where the numbers are, and put what it made on the device."""
    index = index_of(kwargs["device"])
    if kwargs.get("generator") is not None:
        refuse_generator(kwargs["generator"])
    operator = Operator.of(func)
    with device_generator(index) if operator.is_random else nullcontext():
        try:
            out = operator.run(*args, **{**kwargs, "device": machine.backing})
        except RuntimeError as error:
            if "can't allocate memory" in str(error):
                raise torch.OutOfMemoryError(str(error)) from None
            raise
    return finish(operator, [], {}, index, [], out)


def _register_recurrent(library: torch.library.Library) -> None:
    """On a GPU a cell of an LSTM or a GRU is one kernel; here it is what the CPU computes."""
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        library.impl("_thnn_fused_lstm_cell", _lstm_cell, key)
        library.impl("_thnn_fused_gru_cell", _gru_cell, key)


def _lstm_cell(from_input, from_hidden, cell, input_bias=None, hidden_bias=None):
    gates = _biased(from_hidden, hidden_bias) + _biased(from_input, input_bias)
    let_in, keep, new, let_out = gates.chunk(4, 1)
    cell = keep.sigmoid() * cell + let_in.sigmoid() * new.tanh()
    return let_out.sigmoid() * cell.tanh(), cell, gates


def _gru_cell(from_input, from_hidden, hidden, input_bias=None, hidden_bias=None):
    input_gates = _biased(from_input, input_bias).chunk(3, 1)
    hidden_gates = _biased(from_hidden, hidden_bias).chunk(3, 1)
    reset, update = ((hidden_gates[i] + input_gates[i]).sigmoid() for i in (0, 1))
    new = (input_gates[2] + hidden_gates[2] * reset).tanh()
    return (hidden - new) * update + new, new


def _biased(gates: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return gates if bias is None else gates + bias


def _copy_from(source: torch.Tensor, destination: torch.Tensor, non_blocking: bool = False):
    return copy_(Operator.of(aten.copy_.default), (destination, source, non_blocking), {})


def _like_on_cpu(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A CPU tensor of the same form, numbers aside, to ask what the CPU would do with it."""
    if tensor is None or machine.backing.type == "cpu":
        return getattr(tensor, "inner", tensor)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


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
        inner = [_like_on_cpu(tensor) for tensor in tensors]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            allowed = attn_mask
            attn_mask = torch.zeros_like(allowed, dtype=query.dtype)
            attn_mask.masked_fill_(allowed.logical_not(), float("-inf"))
        choice = torch._fused_sdp_choice(
            *inner, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        learns_mask = attn_mask is not None and attn_mask.requires_grad
        on_cuda = machine.backing.type == "cuda"  # where the CPU's algorithm does not run
        flash = torch.nn.attention.SDPBackend.FLASH_ATTENTION.value
        if choice == flash and not (learns_mask or on_cuda):
            return aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]

    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        library.impl("scaled_dot_product_attention", attention, key)
