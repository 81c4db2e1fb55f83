"""How the ranks of a run find each other: through a file in the folder of the run.

``torchrun`` has them meet at a port, which is the machine's and not theirs alone: of thirty
learners on one host, twenty-nine would find it taken. A file in a private folder is their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import _rendezvous_handlers

from course_lib.ranks.processes.place import Place


def meet_in_folder(place: Place) -> None:
    """Let ``init_process_group()`` without arguments mean the ranks of the run."""
    numbers = itertools.count()  # a group that is made after another must not read its addresses

    def meet(url: str, **options: Any) -> Iterator[tuple[dist.Store, int, int]]:
        path = place.store(next(numbers))
        yield dist.FileStore(str(path), place.world_size), place.rank, place.world_size

    _rendezvous_handlers["env"] = meet
