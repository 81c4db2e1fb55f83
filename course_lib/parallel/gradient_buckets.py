"""Gradient buckets: the exchange of data parallelism, hidden behind its backward pass.

What lesson 03 derives. ``torch.nn.parallel.DistributedDataParallel`` does the same (Li and others,
"PyTorch Distributed", 2020).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from course_lib.hardware import current_stream, event
from course_lib.parallel.collectives import ring_all_reduce
from course_lib.parallel.data_parallel import parameter_copies
from course_lib.parallel.sums import mark_as_sums
from course_lib.parallel.transfers import SideStreams


class GradientBuckets:
    """All-reduce gradients in buckets, while backward is still computing the others.

    A hook notices each gradient when it is complete and copies it into its bucket. When the last
    one of a bucket has come, on all replicas, a ring all-reduce of the bucket is enqueued on side
    streams. After backward, call :meth:`finish`. ``DistributedDataParallel`` does the same.

    Gradients that were reduced may stay and be added to: what comes new is summed over the
    replicas, what they have in common is not. Sums are made in the dtype of the gradients.

    Args:
        replicas: one model a device.
        bucket_bytes: how many bytes a bucket holds at least, apart from the last one. The first
            bucket has the last parameters, whose gradients come first.

    Raises:
        ValueError: ``bucket_bytes`` is not positive, no parameter requires a gradient, or the
            replicas have different parameters.
    """

    def __init__(self, replicas: Sequence[nn.Module], bucket_bytes: int) -> None:
        if not isinstance(bucket_bytes, int | float) or not bucket_bytes > 0:
            raise ValueError(f"a bucket holds at least one byte: bucket_bytes={bucket_bytes!r}")
        copies = parameter_copies(replicas)
        learning = [parameters for parameters in copies if parameters[0].requires_grad]
        self._frozen = [parameters for parameters in copies if not parameters[0].requires_grad]
        if not learning:
            raise ValueError("buckets need parameters that require a gradient, and there are none")
        self.devices = [parameter.device for parameter in learning[0]]
        self.buckets = [_Bucket(group) for group in _groups(learning[::-1], bucket_bytes)]
        self._sides = SideStreams(self.devices)
        self._is_on = self._is_finished = True
        for number, bucket in enumerate(self.buckets):
            for index, parameters in enumerate(bucket.group):
                for rank, parameter in enumerate(parameters):
                    self._add_hooks(parameter, number, index, rank)

    def _add_hooks(self, parameter: nn.Parameter, number: int, index: int, rank: int) -> None:
        # Parameters must not keep alive the buckets, which hold the parameters; nor may the hooks
        # refer to parameters, since those that something refers to cannot move.
        myself = weakref.ref(self)

        def before_it_is_added(gradient: Tensor) -> None:
            buckets = myself()
            if buckets is not None:
                bucket = buckets.buckets[number]
                bucket.keep_once(rank, bucket.group[index][rank])

        def when_it_is_complete(parameter: Tensor) -> None:
            buckets = myself()
            if buckets is None:
                return
            buckets._is_finished = False
            if buckets._is_on:
                buckets._put(buckets.buckets[number], rank, parameter)

        parameter.register_hook(before_it_is_added)
        parameter.register_post_accumulate_grad_hook(when_it_is_complete)

    def _put(self, bucket: _Bucket, rank: int, parameter: Tensor) -> None:
        if parameter not in bucket.missing[rank]:  # its step was dropped, or it is refused
            self._sides.join()
        bucket.put(rank, parameter)
        if bucket.is_complete():
            self._reduce(bucket)

    def _reduce(self, bucket: _Bucket) -> None:
        with self._sides.beside(bucket.buffers, bucket.ready):
            ring_all_reduce(bucket.buffers)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Leave the gradients of backward passes in this block where they are, to be added to.

        All but the last of several backward passes belong in it; DDP calls it ``no_sync``. A block
        inside another one changes nothing.
        """
        was_on, self._is_on = self._is_on, False
        try:
            yield
        finally:
            self._is_on = was_on

    def finish(self) -> None:
        """Reduce what is left, and let the devices go on when all buckets are done.

        Left are gradients that the last backward pass did not touch, but one before it in
        :meth:`accumulate` did. A replica without a gradient that others have takes part with
        zeros. Without a backward pass since the last call, this does nothing.

        Raises:
            RuntimeError: a parameter requires a gradient that did not when the buckets were made.
        """
        if any(parameter.requires_grad for copies in self._frozen for parameter in copies):
            raise RuntimeError(
                "a parameter learns that was frozen when the buckets were made, and is in none of "
                "them: make new GradientBuckets after unfreezing"
            )
        if self._is_finished:
            return
        self._is_finished = True
        for bucket in self.buckets:
            if not bucket.is_complete():
                bucket.put_missing()
                self._reduce(bucket)
            bucket.expect_all(reduced=True)
            for copies in bucket.group:
                mark_as_sums([each.grad for each in copies if each.grad is not None])
        self._sides.join()

    def reset(self) -> None:
        """Drop a step that was interrupted: its gradients, and what has come of them so far."""
        self._sides.join()
        for bucket in self.buckets:
            bucket.expect_all()
            for copies in bucket.group:
                for parameter in copies:
                    parameter.grad = None
        self._is_finished = True


class _Bucket:
    """Some parameters' gradients, in one flat buffer a device.

    Attributes:
        group: for each parameter its copies, one a device.
        buffers: one a device, all gradients one after the other.
        views: for each device, the place of each parameter's gradient.
        missing: for each device, the parameters whose gradients have not come.
        reduced: for each device, the parameters whose gradients, if they are still there, are sums
            over all replicas.
        ready: for each device, the moment at which the last one is in the buffer.
    """

    def __init__(self, group: list[tuple[nn.Parameter, ...]]) -> None:
        self.group = group
        self.buffers, self.views = [], []
        for parameters in zip(*group, strict=True):
            sizes = [parameter.numel() for parameter in parameters]
            buffer = parameters[0].new_zeros(sum(sizes))
            self.buffers.append(buffer)
            places = zip(parameters, buffer.split(sizes), strict=True)
            self.views.append({parameter: place.view_as(parameter) for parameter, place in places})
        self.ready = [event(buffer.device) for buffer in self.buffers]
        self.expect_all()

    def expect_all(self, reduced: bool = False) -> None:
        self.missing = [set(views) for views in self.views]
        self.reduced = [set(views) if reduced else set() for views in self.views]

    def is_complete(self) -> bool:
        """Whether all gradients have come, and none was set to ``None`` since, with its step."""
        if any(self.missing):
            return False
        for views, missing in zip(self.views, self.missing, strict=True):
            missing.update(p for p, place in views.items() if p.grad is not place)
        return not any(self.missing)

    def keep_once(self, rank: int, parameter: Tensor) -> None:
        """Before something is added to a sum that all replicas have: keep it on the first alone."""
        if parameter in self.reduced[rank]:
            self.reduced[rank].discard(parameter)
            if rank > 0 and parameter.grad is not None:
                parameter.grad.zero_()

    def put(self, rank: int, parameter: Tensor) -> None:
        """Move the gradient of ``parameter`` into its place, and let it live there."""
        place = self.views[rank][parameter]
        if parameter not in self.missing[rank] and parameter.grad is place:
            raise RuntimeError(
                "a gradient came a second time before finish(): call finish() once a step, reset() "
                "to drop a step that was interrupted, and run all backward passes of a step but "
                "the last in `with buckets.accumulate():`"
            )
        if parameter.grad is not place:
            place.copy_(parameter.grad)
            parameter.grad = place
        self._arrived(rank, parameter)

    def put_missing(self) -> None:
        """Put what is missing: accumulated gradients, or zeros if only others have gradients.

        A gradient that no replica has stays ``None``.
        """
        for copies in self.group:
            is_used = any(parameter.grad is not None for parameter in copies)
            for rank, parameter in enumerate(copies):
                if parameter not in self.missing[rank]:
                    continue
                self.keep_once(rank, parameter)
                if parameter.grad is not None:
                    self.put(rank, parameter)
                    continue
                place = self.views[rank][parameter].zero_()
                if is_used:
                    parameter.grad = place
                self._arrived(rank, parameter)

    def _arrived(self, rank: int, parameter: Tensor) -> None:
        self.missing[rank].discard(parameter)
        if not self.missing[rank]:
            self.ready[rank].record(current_stream(parameter.device))


def _groups(
    parameters: list[tuple[nn.Parameter, ...]], least_bytes: int
) -> Iterator[list[tuple[nn.Parameter, ...]]]:
    """Cut a list into groups of at least so many bytes, each of one dtype."""
    group: list[tuple[nn.Parameter, ...]] = []
    for copies in parameters:
        is_full = sum(first.nbytes for first, *_ in group) >= least_bytes
        if group and (is_full or group[0][0].dtype != copies[0].dtype):
            yield group
            group = []
        group.append(copies)
    yield group
