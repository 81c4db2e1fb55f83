"""Local training: replicas that train by themselves, and meet every so many steps.

Between two meetings nothing is sent. At a meeting the replicas' parameters are averaged (local SGD:
Stich, "Local SGD converges fast and communicates little", 2019), or how far they have come, on
average, is taken for a gradient, by an outer optimizer with momentum (DiLoCo: Douillard and others,
2023). Local SGD is the second with a plain outer step of size 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from course_lib.parallel.collectives import ring_all_reduce
from course_lib.parallel.inputs import require_one_a_replica
from course_lib.parallel.kinds import Loss, Tensors

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]


def average(parameters: Iterable[Tensor]) -> Optimizer:
    """The outer optimizer of local SGD: go to where the replicas are on average."""
    return SGD(parameters, lr=1.0)


def diloco(parameters: Iterable[Tensor]) -> Optimizer:
    """The outer optimizer of DiLoCo, with the constants of its paper."""
    return SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


class LocalTraining:
    """Trains replicas by themselves, and lets them meet.

    Every device keeps where the last meeting left the parameters, and makes the outer step for
    itself; the average that it makes it of has the same bits on all, so they stay equal. Buffers,
    such as BatchNorm's, are not averaged.

    Args:
        replicas: of one model, one a device.
        make_inner: makes a replica's own optimizer.
        period: steps from meeting to meeting.
        make_outer: makes the optimizer of the meetings, :func:`average` or :func:`diloco`.

    Raises:
        ValueError: there are no replicas, or ``period`` is below 1.
    """

    def __init__(
        self,
        replicas: Sequence[nn.Module],
        make_inner: MakeOptimizer,
        period: int,
        make_outer: MakeOptimizer = average,
    ) -> None:
        if not replicas:
            raise ValueError("local training needs at least one replica")
        if period < 1:
            raise ValueError(f"replicas meet every step or more rarely: period={period}")
        self.replicas, self.period, self.steps = list(replicas), period, 0
        self.inner = [make_inner(replica.parameters()) for replica in replicas]
        self._anchors = [row_of(replica).requires_grad_() for replica in replicas]
        self._outer = [make_outer([anchor]) for anchor in self._anchors]

    @property
    def anchors(self) -> list[Tensor]:
        """Where the last meeting left the parameters, a row on each device; the same on all."""
        return [anchor.detach() for anchor in self._anchors]

    def step(self, inputs: Tensors, targets: Tensors, loss_function: Loss) -> list[Tensor]:
        """One step of each replica on its own batch, and every ``period`` steps a meeting.

        Args:
            inputs, targets: one a replica, on its device.
            loss_function: the mean loss of one replica's batch.

        Returns:
            Each replica's loss, a scalar on its device.

        Raises:
            TypeError: inputs or targets are a single tensor.
            ValueError: there is not one batch for each replica.
        """
        require_one_a_replica(self.replicas, inputs=inputs, targets=targets)
        losses = []
        for replica, optimizer, x, y in zip(
            self.replicas, self.inner, inputs, targets, strict=True
        ):
            optimizer.zero_grad()
            loss = loss_function(replica(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        self.steps += 1
        if self.steps % self.period == 0:
            self.meet()
        return losses

    def meet(self) -> None:
        """Make the outer step, and go on from there."""
        moved = [
            anchor - row_of(replica)
            for anchor, replica in zip(self.anchors, self.replicas, strict=True)
        ]
        ring_all_reduce(moved)
        self.outer_step(moved)
        for anchor, replica in zip(self.anchors, self.replicas, strict=True):
            nn.utils.vector_to_parameters(anchor.clone(), replica.parameters())

    def outer_step(self, moved: Tensors) -> None:
        """Move each anchor by the outer optimizer.

        Args:
            moved: on each device the sum of how far the replicas have come, anchor minus place.
        """
        for anchor, optimizer, distance in zip(self._anchors, self._outer, moved, strict=True):
            anchor.grad = distance / len(self.replicas)
            optimizer.step()


def row_of(replica: nn.Module) -> Tensor:
    """All parameters of a replica in one row, a copy."""
    return nn.utils.parameters_to_vector(replica.parameters()).detach()
