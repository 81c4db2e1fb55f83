"""Collectives: what each of them does once all ranks are there.

A call is what one rank says: which operation, on which tensors. The functions here take the calls
of all ranks, in rank order, and do the work on a ring: the one of
:mod:`course_lib.parallel.ring`, which the course's own collectives are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from course_lib.parallel.node_collectives import all_to_all_rounds
from course_lib.parallel.ring import Ring
from course_lib.ranks.errors import MismatchError
from course_lib.ranks.reductions import Reduction


@dataclass
class Call:
    """One rank's part in a collective.

    Attributes:
        name: as in ``torch.distributed``.
        run: what is done when all ranks are there.
        inputs, outputs: what it reads and writes: a tensor, or one for each rank. A whole tensor
            stands for its equal parts where there should be one for each.
        reduction: of those that reduce.
        root: rank in the group from which, or to which, the numbers go.
        agree_on_shape: whether all ranks must give inputs of one shape.
        line: where in the program it was made.
    """

    name: str
    run: Callable[[Ring, Sequence[Call]], None]
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    reduction: Reduction | None = None
    root: int | None = None
    agree_on_shape: bool = True
    line: str = ""

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.inputs, *self.outputs]

    def must_agree(self) -> tuple[Any, ...]:
        """What is the same on all ranks if their calls belong together."""
        reduction = self.reduction.name if self.reduction else None
        form: Any = {(tensor.dtype, tensor.device.type) for tensor in self.tensors[:1]}
        if self.agree_on_shape:
            form = [(tensor.dtype, tensor.device.type, tensor.shape) for tensor in self.inputs]
        return self.name, reduction, self.root, form

    def __str__(self) -> str:
        words = self.name
        if self.reduction is not None and self.reduction.name != "SUM":
            words += f" ({self.reduction.name})"
        if self.root is not None:
            words += f" with root {self.root}"
        tensors = self.inputs or self.outputs
        if tensors:
            first = tensors[0]
            dtype = str(first.dtype).removeprefix("torch.")
            many = f"{len(tensors)} tensors of " if len(tensors) > 1 else ""
            on_host = " on the CPU" if first.device.type == "cpu" else ""
            words += f" of {many}{dtype} {tuple(first.shape)}{on_host}"
        return words


def all_reduce(ring: Ring, calls: Sequence[Call]) -> None:
    """Every rank's tensors become the sums of all: 2 (N - 1) / N of their bytes from each."""
    reduction = _reduction(calls)
    for tensors in zip(*[call.inputs for call in calls], strict=True):
        chunks = [_flat(tensor).tensor_split(len(calls)) for tensor in tensors]
        ring.reduce_scatter(chunks, reduction.combine)
        _finish(ring, reduction, [chunks[rank][rank] for rank in range(len(calls))])
        ring.all_gather(chunks)


def reduce_scatter(ring: Ring, calls: Sequence[Call]) -> None:
    """Rank r gets the sum of all ranks' input r: (N - 1) / N of the bytes from each."""
    reduction = _reduction(calls)
    chunks = [_parts(call.inputs, len(calls)) for call in calls]
    outputs = [_flat(call.outputs[0]) for call in calls]
    _check_sizes(calls, lambda receiver, sender: (outputs[receiver], chunks[sender][receiver]))
    if len(calls) == 1:
        _copy(ring, 0, outputs[0], chunks[0][0])
    ring.reduce_scatter_into(outputs, chunks, reduction.combine)
    _finish(ring, reduction, outputs)


def all_gather(ring: Ring, calls: Sequence[Call]) -> None:
    """Every rank gets all inputs: (N - 1) / N of the bytes of the whole from each."""
    chunks = [_parts(call.outputs, len(calls)) for call in calls]
    inputs = [_flat(call.inputs[0]) for call in calls]
    _check_sizes(calls, lambda receiver, sender: (chunks[receiver][sender], inputs[sender]))
    for rank, tensor in enumerate(inputs):
        _copy(ring, rank, chunks[rank][rank], tensor)
    ring.next_round()
    ring.all_gather(chunks)


def broadcast(ring: Ring, calls: Sequence[Call]) -> None:
    """Every rank's tensor becomes that of the root: each passes it on once, in pieces."""
    root = _root(calls)
    for tensors in zip(*[call.inputs for call in calls], strict=True):
        ring.broadcast([_flat(tensor).tensor_split(len(calls)) for tensor in tensors], root)


def reduce(ring: Ring, calls: Sequence[Call]) -> None:
    """The root's tensor becomes the sum of all: each passes its part on once, in pieces."""
    reduction, root = _reduction(calls), _root(calls)
    chunks = [_flat(call.inputs[0]).tensor_split(len(calls)) for call in calls]
    ring.reduce(chunks, root, reduction.combine)
    if reduction.changes_result:
        with ring.on(root):
            reduction.finish(_flat(calls[root].inputs[0]))


def gather(ring: Ring, calls: Sequence[Call]) -> None:
    """The root gets the inputs of all."""
    root = _root(calls)
    outputs = calls[root].outputs
    _check_sizes(calls, lambda _, sender: (outputs[sender], calls[sender].inputs[0]), [root])
    for rank, call in enumerate(calls):
        _send(ring, rank, root, call.inputs[0], outputs[rank])


def scatter(ring: Ring, calls: Sequence[Call]) -> None:
    """Every rank gets its own of the root's inputs."""
    root = _root(calls)
    inputs = calls[root].inputs
    _check_sizes(calls, lambda receiver, _: (calls[receiver].outputs[0], inputs[receiver]))
    for rank, call in enumerate(calls):
        _send(ring, root, rank, inputs[rank], call.outputs[0])


def all_to_all(ring: Ring, calls: Sequence[Call]) -> None:
    """Rank r gets every rank's input r, each from its rank, in the rounds of the course's own."""
    _check_sizes(calls, lambda to, sender: (calls[to].outputs[sender], calls[sender].inputs[to]))
    for rank, call in enumerate(calls):
        _copy(ring, rank, call.outputs[rank], call.inputs[rank])
    for round_ in all_to_all_rounds(ring.devices):
        for rank, to in round_:
            _send(ring, rank, to, calls[rank].inputs[to], calls[to].outputs[rank])


def barrier(ring: Ring, calls: Sequence[Call]) -> None:
    """Nothing is sent: the hosts wait for each other, which ``meetings`` sees to."""


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(-1)


def _parts(tensors: Sequence[Tensor], count: int) -> list[Tensor]:
    """A row of numbers for each of ``count`` ranks."""
    if len(tensors) == count:
        return [_flat(tensor) for tensor in tensors]
    (whole,) = tensors
    return list(_flat(whole).tensor_split(count))


def _reduction(calls: Sequence[Call]) -> Reduction:
    reduction = calls[0].reduction
    assert reduction is not None
    return reduction


def _root(calls: Sequence[Call]) -> int:
    root = calls[0].root
    assert root is not None
    return root


def _finish(ring: Ring, reduction: Reduction, totals: Sequence[Tensor]) -> None:
    if not reduction.changes_result:
        return
    for rank, total in enumerate(totals):
        if total.numel():
            with ring.on(rank):
                reduction.finish(total)
    ring.next_round()


def _copy(ring: Ring, rank: int, destination: Tensor, source: Tensor) -> None:
    """Copy on one rank; nothing is to be done where an input is a part of its output already."""
    if destination.numel() and destination.data_ptr() != source.data_ptr():
        with ring.on(rank):
            destination.copy_(source)


def _send(ring: Ring, rank: int, to: int, source: Tensor, destination: Tensor) -> None:
    if rank == to:
        _copy(ring, rank, destination, source)
    elif source.numel():
        with ring.between(rank, to):
            destination.copy_(source.view_as(destination))


def _check_sizes(
    calls: Sequence[Call],
    pair: Callable[[int, int], tuple[Tensor, Tensor]],
    receivers: Sequence[int] | None = None,
) -> None:
    """Raise if a rank expects something else of another than that one sends.

    Args:
        pair: what a receiver expects of a sender, and what that one sends.
        receivers: which ranks receive; all, if not given.

    Raises:
        MismatchError: it names both sides.
    """
    for receiver in range(len(calls)) if receivers is None else receivers:
        for sender in range(len(calls)):
            expected, sent = pair(receiver, sender)
            if expected.numel() != sent.numel() or expected.dtype != sent.dtype:
                raise MismatchError(
                    f"{calls[receiver].name}: rank {receiver} of the group expects "
                    f"{form_of(expected)} from rank {sender}, which sends {form_of(sent)}\n"
                    f"    rank {receiver} at {calls[receiver].line}\n"
                    f"    rank {sender} at {calls[sender].line}"
                )


def form_of(tensor: Tensor) -> str:
    """A tensor in words: ``float32 (4, 8)``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
