"""Local training whose meetings run beside the next steps: the outer step comes late.

At a meeting of :mod:`course_lib.parallel.local_training` all replicas wait for the sum of how far
they have come. Here they go on meanwhile, and make the outer step ``delay`` steps later, when the
sum has arrived: each replica is moved to where the outer step leads, plus what it has moved by
itself since it sent. Nothing that a replica has learnt is lost; it enters the next meeting.

With the plain outer step that is delayed averaging (Zhou and others, "DaSGD", 2020). Streaming
DiLoCo (Douillard and others, 2025) overlaps the outer step of DiLoCo in this way, with two
differences: it sends a part of the parameters at a time, and mixes the replica's own place with the
new one in place of adding its way to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from course_lib.parallel.collectives import ring_all_reduce
from course_lib.parallel.kinds import Loss, Tensors
from course_lib.parallel.local_training import LocalTraining, MakeOptimizer, average, row_of
from course_lib.parallel.transfers import SideStreams


class OverlappedTraining(LocalTraining):
    """Local training in which the sum of a meeting travels while the replicas train on.

    Args:
        replicas, make_inner, period, make_outer: as :class:`LocalTraining` takes them.
        delay: steps from the moment at which a replica sends to its outer step, below ``period``.

    Raises:
        ValueError: as there, or ``delay`` is not from 1 to ``period - 1``.
    """

    def __init__(
        self,
        replicas: Sequence[nn.Module],
        make_inner: MakeOptimizer,
        period: int,
        delay: int,
        make_outer: MakeOptimizer = average,
    ) -> None:
        super().__init__(replicas, make_inner, period, make_outer)
        if not 1 <= delay < period:
            raise ValueError(
                f"an outer step comes 1 to {period - 1} steps late, before the next meeting: "
                f"delay={delay}"
            )
        self.delay = delay
        self._sides = SideStreams([anchor.device for anchor in self.anchors])
        # Under way: where each replica was when it sent, and how far all have come.
        self._sent: list[tuple[Tensor, Tensor]] = []

    def step(self, inputs: Tensors, targets: Tensors, loss_function: Loss) -> list[Tensor]:
        """One step of each replica; the rest is as in :class:`LocalTraining`."""
        losses = super().step(inputs, targets, loss_function)
        if self._sent and self.steps % self.period == self.delay:
            self._arrive()
        return losses

    def meet(self) -> None:
        """Send how far each replica has come, on side streams, and go on."""
        places = [row_of(replica) for replica in self.replicas]
        moved = [anchor - place for anchor, place in zip(self.anchors, places, strict=True)]
        with self._sides.beside(moved):
            ring_all_reduce(moved)
        self._sent = list(zip(places, moved, strict=True))

    def _arrive(self) -> None:
        """Make the outer step, and carry over what each replica has moved since it sent."""
        self._sides.join()
        self.outer_step([moved for _, moved in self._sent])
        with torch.no_grad():
            for anchor, replica, (place, _) in zip(
                self.anchors, self.replicas, self._sent, strict=True
            ):
                since = row_of(replica) - place
                nn.utils.vector_to_parameters(anchor + since, replica.parameters())
        self._sent = []
