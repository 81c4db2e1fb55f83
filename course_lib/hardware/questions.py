"""What there is to know about one device: whether it is real, its node, its memory."""

from __future__ import annotations

import torch

from course_lib.virtual.machine import DEVICE_TYPE, machine
from course_lib.virtual.paper_tensor import PaperDevice, PaperTensor


def is_virtual(device: torch.device | str) -> bool:
    """Whether ``device`` is a virtual GPU, or the name of one."""
    if isinstance(device, str):  # PyTorch does not know the name before devices() was called
        return device.partition(":")[0] == DEVICE_TYPE
    if not isinstance(device, torch.device):
        raise TypeError(f"a device is a torch.device or its name, such as 'cuda:0': {device!r}")
    return device.type == DEVICE_TYPE


def existing(device: torch.device | str) -> torch.device:
    """``device`` with its index.

    Raises:
        RuntimeError: it is no GPU, or not there.
    """
    if is_virtual(device):
        if isinstance(device, str):
            machine.check_index(0)
            device = torch.device(device)
        index = machine.clock.current_device if device.index is None else device.index
        machine.check_index(index)
        return torch.device(DEVICE_TYPE, index)
    device = torch.device(device)
    if device.type != "cuda":
        raise RuntimeError(f"this is for GPUs, real or virtual, and not for {str(device)!r}")
    count = torch.cuda.device_count()
    index = device.index
    if index is None and count:
        index = torch.cuda.current_device()
    if index is None or index >= count:
        raise RuntimeError(
            f"{device} does not exist: this machine has {count} real GPU{'' if count == 1 else 's'}"
        )
    return torch.device("cuda", index)


def is_tensor(value: object) -> bool:
    """Whether it is a tensor, of PyTorch or on paper."""
    return isinstance(value, (torch.Tensor, PaperTensor))


def node_of(device: torch.device | str | PaperDevice) -> int:
    """The node that ``device`` stands in, from 0. Real GPUs are those of one machine: 0."""
    if isinstance(device, PaperDevice):
        return device.machine.nodes.node_of(device.index)
    gpu = existing(device)
    return machine.clock.nodes.node_of(gpu.index) if is_virtual(gpu) else 0


def holds_numbers(device: torch.device) -> bool:
    """Whether tensors on ``device`` have numbers, and not only a shape."""
    return device.type != "meta" and not (is_virtual(device) and machine.backing.type == "meta")


def memory_in_use(device: torch.device | str) -> int:
    """Bytes that tensors on ``device`` hold at this moment."""
    gpu = existing(device)
    return torch.get_device_module(gpu).memory_allocated(gpu)


def peak_memory(device: torch.device | str) -> int:
    """The most bytes in use on ``device`` since the last :func:`reset_peak_memory`."""
    gpu = existing(device)
    return torch.get_device_module(gpu).max_memory_allocated(gpu)


def reset_peak_memory(device: torch.device | str) -> None:
    """Start measuring :func:`peak_memory` anew, from what is in use now."""
    gpu = existing(device)
    torch.get_device_module(gpu).reset_peak_memory_stats(gpu)


def memory_capacity(device: torch.device | str) -> int:
    """Bytes of memory that ``device`` has."""
    gpu = existing(device)
    if is_virtual(gpu):
        return int(machine.spec.memory)
    return torch.cuda.get_device_properties(gpu).total_memory
