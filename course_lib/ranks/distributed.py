"""``torch.distributed`` in a run: each rank has its own groups, and all backends are this one.

Rests on ``torch.distributed.distributed_c10d``: ``_World``, ``BackendConfig``,
``_get_default_timeout``, ``Backend.default_device_backend_map`` and ``_new_process_group_helper``,
which takes a group that is written in Python as it is; on
``torch.distributed.rendezvous._rendezvous_handlers``, and on
``torch._C._distributed_c10d._set_thread_isolation_mode``, which lets every thread have a registry
of groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from unittest import mock
from urllib.parse import parse_qsl, urlparse

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import _rendezvous_handlers

from course_lib.ranks.process_group import RankGroup
from course_lib.ranks.rank_state import PARTS, attribute
from course_lib.virtual.spec import DEVICE_TYPE

if TYPE_CHECKING:
    from course_lib.ranks.running import Run

BACKEND = "virtual_ranks"

PARTS["groups"] = attribute(lambda: c10d, "_world")
PARTS["first group's backend"] = attribute(lambda: c10d, "_backend")
PARTS["first group's address"] = attribute(lambda: c10d, "_default_pg_init_method")


class World(c10d._World):
    """The groups that one rank knows: what PyTorch keeps in globals, for there is one process."""

    pg_map: Any = None
    pg_names: Any = None
    pg_group_ranks: Any = None
    pg_backend_config: Any = None
    group_count: Any = 0
    tags_to_pg: Any = None
    pg_to_tag: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.pg_map, self.pg_names, self.pg_group_ranks = {}, {}, {}
        self.pg_backend_config, self.tags_to_pg, self.pg_to_tag = {}, {}, {}


@contextmanager
def used_by(run: Run) -> Iterator[None]:
    """Let ``torch.distributed`` in the block, on the threads of ``run``, mean its ranks."""

    def make_group(options: Any, backend_options: Any) -> RankGroup:
        ranks = list(options.global_ranks_in_group) or list(range(len(run.gpus)))
        if not options.global_ranks_in_group:
            _check_numbers(run, options.group_rank, options.group_size)
        communicator, exchange = run.meeting_points(options.group_id, ranks)
        return RankGroup(run, communicator, exchange, options.group_rank, options.store)

    def meet_by_environment(url: str, *args: Any, **kwargs: Any) -> Iterator[tuple]:
        asked = dict(parse_qsl(urlparse(url).query))
        _check_numbers(
            run, int(asked.get("rank", run.rank)), int(asked.get("world_size", len(run.gpus)))
        )
        yield run.store(), run.rank, len(run.gpus)

    _register_once()
    name = BACKEND.upper()
    plugin = c10d.Backend._plugins[name]._replace(creator_fn=make_group)
    handlers = dict.fromkeys(("env", "tcp", "file"), meet_by_environment)
    with ExitStack() as stack:
        changed: list[AbstractContextManager] = [
            mock.patch.dict(c10d.Backend._plugins, {name: plugin}),
            mock.patch.dict(
                c10d.Backend.default_device_backend_map, {"cpu": BACKEND, DEVICE_TYPE: BACKEND}
            ),
            mock.patch.dict(_rendezvous_handlers, handlers),
            mock.patch.object(c10d.BackendConfig, "__init__", _configure_for_ranks),
            mock.patch.object(c10d, "_get_default_timeout", _timeout_of_any),
        ]
        for change in changed:
            stack.enter_context(change)
        in_cpp: Any = _distributed_c10d
        in_cpp._set_thread_isolation_mode(True)
        stack.callback(in_cpp._set_thread_isolation_mode, False)
        yield


def _check_numbers(run: Run, rank: int, world_size: int) -> None:
    """Raise if a program says that a rank is another one, or one of more or of fewer."""
    if (rank, world_size) != (run.rank, len(run.gpus)):
        raise ValueError(
            f"init_process_group says rank {rank} of {world_size}, and this is rank {run.rank} of "
            f"{len(run.gpus)}: leave rank= and world_size= out, and the backend 'mpi'"
        )


def _configure_for_ranks(self: Any, backend: str) -> None:
    """Whatever the program asks for (``"nccl"``, ``"gloo"``, nothing), it gets these ranks."""
    self.device_backend_map = {"cpu": BACKEND, DEVICE_TYPE: BACKEND}


def _timeout_of_any(backend: Any) -> timedelta:
    """Nobody waits for it; PyTorch's own warns of ``"nccl"`` where that is not compiled in."""
    return dist.default_pg_timeout


def _register_once() -> None:
    if BACKEND.upper() in c10d.Backend._plugins:
        return
    before = dict(c10d.Backend.default_device_backend_map)
    dist.Backend.register_backend(BACKEND, _no_run, extended_api=True, devices=["cpu", DEVICE_TYPE])
    c10d.Backend.default_device_backend_map.clear()
    c10d.Backend.default_device_backend_map.update(before)


def _no_run(*args: Any) -> Any:
    raise RuntimeError("virtual ranks are there inside of course_lib.ranks.run() only")


def prepare_thread() -> None:
    """What each rank's thread must be told once."""
    torch.autograd.set_multithreading_enabled(False)
