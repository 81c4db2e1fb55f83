"""``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``: a whole layer runs as one operator, as cuDNN runs it.

The CPU's operator runs on the numbers inside, and its autograd graph is kept for backward.
What is charged: the FLOPs of the products, each tensor's bytes once, and for training the memory
that cuDNN calls the reserve: each layer's gates, states and outputs for every step. PyTorch's own
decomposition into cells runs where one operator cannot: under autocast, ``torch.func`` and forward
mode, on other backings than the CPU, and for gradients of gradients.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd import forward_ad

from course_lib.virtual.arguments import mixed_devices
from course_lib.virtual.execution import finish
from course_lib.virtual.generators import device_generator
from course_lib.virtual.machine import DEVICE_TYPE, machine
from course_lib.virtual.operators import Operator, runs
from course_lib.virtual.tensor import VirtualTensor

aten = torch.ops.aten

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def register(library: torch.library.Library) -> None:
    """Register the layers for virtual GPUs."""
    for name in _GATES:
        for overload in ("input", "data"):
            func = getattr(getattr(aten, name), overload)
            library.impl(f"{name}.{overload}", partial(_run_layer, func), "AutogradPrivateUse1")
            runs(func)(_run_without_autograd)


def _run_without_autograd(operator: Operator, args: tuple, kwargs: dict) -> tuple:
    return _run_layer(operator.func, *args, **kwargs)


def _run_layer(func: torch._ops.OpOverload, *args: Any) -> tuple:
    call, tensors = _Call.of(func, args)
    if (
        machine.backing.type != "cpu"
        or torch.is_autocast_enabled(DEVICE_TYPE)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return _run_cells(func, args)
    for tensor in tensors:
        if tensor.device != tensors[0].device:
            raise mixed_devices(tensors[0].device, tensor.device)
        machine.check_made_here(tensor.allocation.memory)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Layer.apply(call, *tensors)
    with torch.no_grad():
        return _charge(call, tensors, call.run([tensor.held for tensor in tensors]))


def _run_cells(func: torch._ops.OpOverload, args: Any) -> tuple:
    """Run a layer as PyTorch's C++ does; ``decompose`` would take tracers' less exact one."""
    return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args)


@dataclass(frozen=True)
class _Call:
    """The call of a layer, its tensors aside.

    Attributes:
        func: the operator.
        sizes: how many sequences go on at each step, on the host, if they are packed.
        states: how many tensors the first state is made of; ``None`` if it is a tensor.
        settings: the arguments after the weights.
        index: of the virtual GPU.
        generator_state: of its generator before the call, where there is dropout.
    """

    func: torch._ops.OpOverload
    sizes: list[torch.Tensor]
    states: int | None
    settings: tuple
    index: int
    generator_state: torch.Tensor | None

    @classmethod
    def of(cls, func: torch._ops.OpOverload, args: tuple) -> tuple[_Call, list[VirtualTensor]]:
        """The call, and its tensors: the input, the first state, the weights."""
        is_packed = func._overloadname == "data"
        sizes, (state, weights, *settings) = args[1 : 1 + is_packed], args[1 + is_packed :]
        many = isinstance(state, (list, tuple))
        tensors = [args[0], *(state if many else [state]), *weights]
        index = next(tensor.device_index for tensor in tensors if isinstance(tensor, VirtualTensor))
        dropout, train = settings[2:4]
        kept = machine.generators[index].full_state() if dropout > 0 and train else None
        states = len(state) if many else None
        return cls(func, list(sizes), states, tuple(settings), index, kept), tensors

    def arguments(self, tensors: list[torch.Tensor]) -> list:
        """The operator's arguments, with ``tensors`` for those of the call."""
        state = tensors[1] if self.states is None else tensors[1 : 1 + self.states]
        return [tensors[0], *self.sizes, state, self.weights(tensors), *self.settings]

    def weights(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The weights and biases among the tensors of the call."""
        return tensors[1 + (1 if self.states is None else self.states) :]

    def run(self, inner: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run the CPU's operator."""
        is_random = self.generator_state is not None
        with (
            device_generator(self.index) if is_random else nullcontext(),
            torch.autocast("cpu", enabled=False),
        ):
            return self.func(*self.arguments(inner))

    def run_again(self, inner: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run it as it ran, with the same dropout, and leave the generator as it is."""
        if self.generator_state is None:
            return self.run(inner)
        generator = machine.generators[self.index]
        now = generator.full_state()
        generator.set_full_state(self.generator_state)
        try:
            return self.run(inner)
        finally:
            generator.set_full_state(now)

    def reserve(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Memory as large as what backward needs: per step and layer gates, state and output."""
        x, rows = tensors[0], self.weights(tensors)[0].shape[0]
        _, layers, _, _, bidirectional = self.settings[:5]
        hidden = rows // _GATES[self.func._opname]
        numbers = _steps(x) * layers * (2 if bidirectional else 1) * (rows + 2 * hidden)
        return torch.empty(numbers * x.element_size(), dtype=torch.uint8)


class _Layer(torch.autograd.Function):
    """A layer that learns."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: VirtualTensor) -> tuple:
        leaves, out = _graph(call.run, tensors)
        detached = [each.detach() for each in out]
        *wrapped, reserve = _charge(call, tensors, (*detached, call.reserve(leaves)))
        # Saved tensors go with the outer graph, and the reserve takes the inner one along.
        reserve.graph = leaves, out
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, reserve)
        return tuple(wrapped)

    @staticmethod
    def backward(ctx: Any, *grads: VirtualTensor) -> tuple:
        call = ctx.call
        *tensors, reserve = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *_gradients_with_graph(call, tensors, grads)
        # Hooks of saved tensors, as checkpointing uses them, keep the bytes and drop the graph.
        leaves, out = getattr(reserve, "graph", None) or _graph(call.run_again, tensors)
        learning = [leaf for leaf in leaves if leaf.requires_grad]
        used, given = _used(out, grads)
        inner_grads = [grad.held for grad in given]
        found = torch.autograd.grad(
            used, learning, inner_grads, retain_graph=True, allow_unused=True
        )
        wrapped = iter(_charge(call, tensors, found, (*given, reserve)))
        return None, *[next(wrapped) if leaf.requires_grad else None for leaf in leaves]


def _graph(run: Callable, tensors: Any) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Run the operator with a graph of its own: its leaves, and what came out."""
    leaves = [each.held.detach().requires_grad_(each.requires_grad) for each in tensors]
    with torch.enable_grad():
        return leaves, run(leaves)


def _gradients_with_graph(call: _Call, tensors: list, grads: tuple) -> list:
    """What can be differentiated again: the gradients of the cells."""
    if call.generator_state is not None:
        raise NotImplementedError(
            f"virtual GPUs have no gradients of the gradients of {call.func._opname} with dropout: "
            "use dropout=0, or put nn.Dropout between layers of your own"
        )
    learning = [tensor for tensor in tensors if tensor.requires_grad]
    out = _run_cells(call.func, call.arguments(tensors))
    used, given = _used(out, grads)
    found = iter(torch.autograd.grad(used, learning, given, create_graph=True, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in tensors]


def _used(out: tuple, grads: tuple) -> tuple[list, list]:
    """Those outputs that have a gradient, and the gradients."""
    pairs = [(each, grad) for each, grad in zip(out, grads, strict=True) if grad is not None]
    return [each for each, _ in pairs], [grad for _, grad in pairs]


def _charge(call: _Call, tensors: Any, out: tuple, also_read: tuple | None = None) -> tuple:
    """Wrap what came out and charge for it; what is ``also_read`` is so in backward."""
    operator = copy.copy(Operator.of(call.func))
    matrices = [weight.numel() for weight in call.weights(tensors) if weight.dim() == 2]
    flops = 2.0 * _steps(tensors[0]) * sum(matrices)
    if also_read is not None:
        operator.name += "_backward"
        flops *= 2  # the gradients of the input, and those of the weights
    operator.flops = lambda args, kwargs, out: flops
    memory = machine.memories[call.index]
    return finish(operator, [], {}, memory, [*tensors, *(also_read or ())], out)


def _steps(x: torch.Tensor) -> int:
    """How many inputs a layer takes one after the other, all sequences together."""
    return math.prod(x.shape[:-1])
