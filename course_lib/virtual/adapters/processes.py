"""Other processes: what they exchange is on the CPU, and no virtual GPU is in two of them.

``init_process_group()`` without a backend picks one by the accelerator, and PyTorch knows none for
virtual GPUs: it is ``gloo``, as without them. Such a group refuses a virtual GPU as its
``device_id``, which groups of ``course_lib.ranks`` take. A worker of a ``DataLoader`` that returns
tensors on a virtual GPU ended with a segmentation fault. They are refused where a batch is put
together, and where a tensor arrives: an error where it is sent would be lost, and the other side
would wait.

Rests on ``torch.distributed.distributed_c10d``: ``BackendConfig`` and
``_new_process_group_helper``; on ``torch.UntypedStorage._new_shared`` and
``multiprocessing.reduction.ForkingPickler``.
"""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from typing import Any, NoReturn

import torch

from course_lib.virtual.machine import DEVICE_TYPE, machine
from course_lib.virtual.tensor import VirtualTensor


def prepare() -> None:
    """Change PyTorch as the module's text says. To be called once."""
    _refuse_to_share()
    if not torch.distributed.is_available():
        return
    _refuse_to_bind()
    config: Any = torch.distributed.distributed_c10d.BackendConfig
    undefined = torch.distributed.Backend.UNDEFINED
    configure = config.__init__

    def configure_for_the_cpu(self: Any, backend: str) -> None:
        is_ours = torch._C._get_accelerator().type == DEVICE_TYPE
        configure(self, "cpu:gloo" if is_ours and backend == undefined else backend)

    config.__init__ = configure_for_the_cpu


def _refuse_to_bind() -> None:
    c10d: Any = torch.distributed.distributed_c10d
    make_group = c10d._new_process_group_helper

    def make_group_on_the_cpu(*args: Any, device_id: Any = None, **kwargs: Any) -> Any:
        is_a_rank = machine.clock.own_device is not None
        if device_id is not None and device_id.type == DEVICE_TYPE and not is_a_rank:
            raise RuntimeError(
                f"device_id={device_id} is a virtual GPU, and processes exchange on the CPU: leave "
                "device_id out, or run ranks on virtual GPUs, by course_lib.ranks.run(function)"
            )
        return make_group(*args, device_id=device_id, **kwargs)

    c10d._new_process_group_helper = make_group_on_the_cpu


def _refuse_to_share() -> None:
    storages: Any = torch.UntypedStorage
    share = storages._new_shared

    def share_others(cls: type, size: int, *, device: Any = "cpu") -> torch.UntypedStorage:
        if torch.device(device).type == DEVICE_TYPE:
            _refuse()
        return share(size, device=device)

    storages._new_shared = classmethod(share_others)
    ForkingPickler.register(VirtualTensor, lambda tensor: (_refuse, ()))


def _refuse() -> NoReturn:
    raise RuntimeError(
        "a process cannot send a tensor on a virtual GPU: no other process has that GPU. Let "
        "workers return CPU tensors, and move each batch with .to(device) where it arrives."
    )
