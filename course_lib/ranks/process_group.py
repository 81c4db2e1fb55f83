"""The process group: what ``torch.distributed`` and the engines above it call.

PyTorch's own groups are in C++, and hand each call to a backend that they choose by the device of
the tensors. This one is in Python, so every method is here: what is left out would run in C++, and
look for a backend that is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

from course_lib.ranks import calls
from course_lib.ranks.calls import Call
from course_lib.ranks.errors import MismatchError
from course_lib.ranks.group_identity import GroupIdentity
from course_lib.ranks.meetings import Communicator, Part
from course_lib.ranks.point_to_point import RECEIVE, SEND, Exchange
from course_lib.ranks.reductions import Reduction
from course_lib.ranks.where import line_here
from course_lib.ranks.works import Pending, Together, Work
from course_lib.virtual.machine import machine

if TYPE_CHECKING:
    from course_lib.ranks.running import Run


class RankGroup(GroupIdentity):
    """One rank's view of a group of ranks.

    Args:
        communicator, exchange: what the ranks of the group share.
        rank: its rank in the group.
    """

    def __init__(
        self, run: Run, communicator: Communicator, exchange: Exchange, rank: int, store: dist.Store
    ) -> None:
        super().__init__(run, communicator, rank, store)
        self._exchange = exchange
        self._together: list[dist.Work] | None = None

    # ------------------------------------------------------------------ collectives

    def allreduce(self, tensors: Any, opts: Any = ReduceOp.SUM, timeout: Any = None) -> dist.Work:
        tensors = _list(tensors)
        reduction = self._reduction(opts, tensors)
        return self._meet(
            Call("all_reduce", calls.all_reduce, inputs=tensors, reduction=reduction), tensors
        )

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = ReduceOp.SUM) -> dist.Work:
        return self.allreduce(tensors, opts)

    def reduce(
        self, tensors: Any, opts: Any = 0, op: Any = ReduceOp.SUM, timeout: Any = None
    ) -> dist.Work:
        tensors = _list(tensors)
        root = self._root("reduce", opts)
        reduction = self._reduction(opts if _has_op(opts) else op, tensors)
        call = Call("reduce", calls.reduce, inputs=tensors, reduction=reduction, root=root)
        return self._meet(call, tensors)

    def broadcast(self, tensors: Any, opts: Any = 0, timeout: Any = None) -> dist.Work:
        tensors = _list(tensors)
        root = self._root("broadcast", opts)
        call = Call("broadcast", calls.broadcast, inputs=tensors, root=root)
        return self._meet(call, tensors)

    def allgather(
        self, output_tensors: list[list[Tensor]], input_tensors: Any, opts: Any = None
    ) -> dist.Work:
        (inputs,), (outputs,) = _list(input_tensors), output_tensors
        return self._all_gather(outputs, inputs)

    def all_gather_single(
        self, output: Tensor, input: Tensor, opts: Any = None, timeout: Any = None
    ) -> dist.Work:
        self._check_multiple("all_gather_single", output, input)
        return self._meet(Call("all_gather_single", calls.all_gather, [input], [output]), [output])

    def _all_gather(self, outputs: list[Tensor], tensor: Tensor) -> dist.Work:
        self._check_count("all_gather", outputs)
        call = Call("all_gather", calls.all_gather, [tensor], outputs, agree_on_shape=False)
        return self._meet(call, outputs)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        pairs = zip(outputs, inputs, strict=True)
        return Together([self.all_gather_single(output, each) for output, each in pairs])

    def allgather_coalesced(
        self, output_lists: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        works = []
        for place, tensor in enumerate(inputs):
            outputs = [each[place] for each in output_lists]
            works.append(self._all_gather(outputs, tensor))
        return Together(works)

    def reduce_scatter(
        self, output_tensors: Any, input_tensors: Any, opts: Any = ReduceOp.SUM, timeout: Any = None
    ) -> dist.Work:
        (output,), (inputs,) = _list(output_tensors), input_tensors
        self._check_count("reduce_scatter", inputs)
        return self._reduce_scatter("reduce_scatter", output, list(inputs), opts)

    def reduce_scatter_single(
        self, output: Tensor, input: Tensor, opts: Any = ReduceOp.SUM, timeout: Any = None
    ) -> dist.Work:
        self._check_multiple("reduce_scatter_single", input, output)
        return self._reduce_scatter("reduce_scatter_single", output, [input], opts)

    def _reduce_scatter(
        self, name: str, output: Tensor, inputs: list[Tensor], opts: Any
    ) -> dist.Work:
        reduction = self._reduction(opts, inputs)
        return self._meet(Call(name, calls.reduce_scatter, inputs, [output], reduction), [output])

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = ReduceOp.SUM
    ) -> dist.Work:
        pairs = zip(outputs, inputs, strict=True)
        return Together([self.reduce_scatter_single(output, each, opts) for output, each in pairs])

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        opts: Any = None,
        timeout: Any = None,
    ) -> dist.Work:
        outputs = self._split("output", output, output_split_sizes)
        inputs = self._split("input", input, input_split_sizes)
        return self._all_to_all("all_to_all_single", outputs, inputs, [output])

    def alltoall(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None, timeout: Any = None
    ) -> dist.Work:
        return self._all_to_all("all_to_all", outputs, inputs, outputs)

    def _all_to_all(
        self, name: str, outputs: list[Tensor], inputs: list[Tensor], results: list[Tensor]
    ) -> dist.Work:
        self._check_count(name, outputs)
        self._check_count(name, inputs)
        call = Call(name, calls.all_to_all, inputs, outputs, agree_on_shape=False)
        return self._meet(call, results)

    def gather(
        self, output_tensors: Any, input_tensors: Any, opts: Any = 0, timeout: Any = None
    ) -> dist.Work:
        root, outputs = self._root("gather", opts), _flattened(output_tensors)
        if self._rank == root:
            self._check_count("gather", outputs)
        inputs = _flattened(input_tensors)
        call = Call("gather", calls.gather, inputs, outputs, root=root, agree_on_shape=False)
        return self._meet(call, outputs)

    def scatter(
        self, output_tensors: Any, input_tensors: Any, opts: Any = 0, timeout: Any = None
    ) -> dist.Work:
        root, inputs = self._root("scatter", opts), _flattened(input_tensors)
        if self._rank == root:
            self._check_count("scatter", inputs)
        outputs = _flattened(output_tensors)
        call = Call("scatter", calls.scatter, inputs, outputs, root=root, agree_on_shape=False)
        return self._meet(call, outputs)

    def barrier(self, opts: Any = None, timeout: Any = None) -> dist.Work:
        clock = machine.clock
        clock.current[self._communicator.devices[self._rank].index].synchronize()
        return self._meet(Call("barrier", calls.barrier), [], blocks_host=True)

    # The older names, which PyTorch's own code still calls.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    # ------------------------------------------------------------------ two ranks

    def send(self, tensors: Any, dstRank: int, tag: int = 0) -> dist.Work:
        return self._post(SEND, tensors, dstRank, tag)

    def recv(self, tensors: Any, srcRank: int, tag: int = 0) -> dist.Work:
        return self._post(RECEIVE, tensors, srcRank, tag)

    def recv_anysource(self, tensors: Any, tag: int) -> dist.Work:
        raise NotImplementedError(
            "ranks on virtual GPUs cannot receive from any source: name it, as in recv(x, src=0)"
        )

    def _post(self, side: str, tensors: Any, other: int, tag: int) -> dist.Work:
        (tensor,) = _list(tensors)
        self._check_rank(side, other)
        self._check_running()
        post = self._exchange.post(side, tensor, self._rank, other, tag, line_here())
        return self._made(post, [tensor])

    # ------------------------------------------------------------------ what is not there

    def monitored_barrier(self, *args: Any, **kwargs: Any) -> None:
        self.barrier().wait()  # which names every rank that does not come

    def split_group(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("ranks on virtual GPUs cannot split_group: call new_group")

    def merge_remote_group(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("ranks on virtual GPUs cannot merge groups: call new_group")

    # ------------------------------------------------------------------ several calls as one

    def _start_coalescing(self, device: torch.device) -> None:
        self._together = []

    def _end_coalescing(self, device: torch.device) -> dist.Work:
        works, self._together = self._together or [], None
        return Together(works)

    # ------------------------------------------------------------------ how it is done

    def _meet(self, call: Call, outputs: list[Tensor], blocks_host: bool = False) -> dist.Work:
        call.line = line_here()
        self._check_running()
        try:
            meeting, number = self._communicator.arrive(self._rank, call)
        except MismatchError as error:
            self._run.note_fault(error)
            raise
        part = Part(self._communicator, meeting, self._rank, call.name, number)
        return self._made(part, outputs, blocks_host)

    def _made(self, pending: Pending, outputs: list[Tensor], blocks_host: bool = False) -> Work:
        work = Work(self._run.baton, pending, outputs, blocks_host)
        self._run.remember(pending)
        if self._together is not None:
            self._together.append(work)
        return work

    def _check_running(self) -> None:
        """Raise if the ranks have ended: nobody would come."""
        self._run.baton.in_turn()

    def _reduction(self, opts: Any, tensors: Sequence[Tensor]) -> Reduction:
        reduction = Reduction(opts.reduceOp if _has_op(opts) else opts, self.size())
        for tensor in tensors:
            reduction.check(tensor)
        return reduction

    def _root(self, name: str, opts: Any) -> int:
        root = opts if isinstance(opts, int) else opts.rootRank
        self._check_rank(name, root)
        return root

    def _check_rank(self, name: str, rank: Any) -> None:
        """Raise unless ``rank`` is one of this group; a list would take -1 for the last."""
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"{name}: a rank is a whole number, and {rank!r} is none")
        if not 0 <= rank < self.size():
            raise ValueError(
                f"{name}: there is no rank {rank} among the {self.size()} of the group: they are "
                f"0 to {self.size() - 1}"
            )

    def _check_count(self, name: str, tensors: Sequence[Tensor]) -> None:
        if len(tensors) != self.size():
            raise ValueError(
                f"{name} takes a tensor for each of the {self.size()} ranks of the group, "
                f"not {len(tensors)}"
            )

    def _check_multiple(self, name: str, whole: Tensor, part: Tensor) -> None:
        if whole.numel() != part.numel() * self.size() or whole.dtype != part.dtype:
            raise ValueError(
                f"{name}: one tensor must hold {self.size()} times the numbers of the other, and "
                f"of the same dtype: they are {calls.form_of(whole)} and {calls.form_of(part)}"
            )

    def _split(self, name: str, tensor: Tensor, sizes: Sequence[int] | None) -> list[Tensor]:
        count = self.size()
        if tensor.dim() == 0:
            raise ValueError(
                f"all_to_all_single: the {name} is a single number, and has no rows to split: give "
                f"it a row for each rank, as in x.expand({count}).contiguous()"
            )
        if not sizes:
            if len(tensor) % count:
                raise ValueError(
                    f"all_to_all_single: {count} ranks do not divide the {len(tensor)} rows of "
                    f"the {name}: give {name}_split_sizes"
                )
            sizes = [len(tensor) // count] * count
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError(
                f"all_to_all_single: {name}_split_sizes={list(sizes)} must be whole numbers of "
                "rows, none of them below zero"
            )
        if len(sizes) != count or sum(sizes) != len(tensor):
            raise ValueError(
                f"all_to_all_single: {name}_split_sizes={list(sizes)} must be {count} numbers "
                f"with the sum {len(tensor)}"
            )
        return list(tensor.split(list(sizes)))


def _has_op(opts: Any) -> bool:
    return hasattr(opts, "reduceOp")


def _list(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _flattened(tensors: Any) -> list[Tensor]:
    """A tensor, a list of them or a list of one list, as a list."""
    if isinstance(tensors, Tensor):
        return [tensors]
    return [each for item in tensors for each in _flattened(item)]
