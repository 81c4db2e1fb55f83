"""Data parallelism as one rank sees it: its replica, its examples, and buckets of gradients.

``torch.nn.parallel.DistributedDataParallel`` does the same (Li and others, "PyTorch Distributed",
2020), and in addition what a model needs of which some ranks leave a part unused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn


def broadcast_model(model: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=0)


def bucket_groups(model: nn.Module, bucket_bytes: float) -> list[dict[str, nn.Parameter]]:
    """Parameters that learn, from last to first, in groups of at least so many bytes.

    All ranks make the same groups in the same order, since they have the same model.
    """
    groups: list[dict[str, nn.Parameter]] = []
    group: dict[str, nn.Parameter] = {}
    learning = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    for name, parameter in reversed(learning):
        group[name] = parameter
        if sum(each.nbytes for each in group.values()) >= bucket_bytes:
            groups.append(group)
            group = {}
    if group:
        groups.append(group)
    return groups


class Bucket:
    """Some gradients of this rank in one flat tensor: averaged when the last one has come.

    It knows the parameters by their names alone. Their hooks refer to it, and what a hook refers to
    must not refer back: Python never frees such a circle.

    Args:
        group: parameters of one dtype, on one device.
    """

    def __init__(self, group: dict[str, nn.Parameter]) -> None:
        first, *_ = group.values()
        sizes = [parameter.numel() for parameter in group.values()]
        self.flat = first.new_zeros(sum(sizes), requires_grad=False)
        parts = zip(group.items(), self.flat.split(sizes), strict=True)
        self.places = {name: part.view_as(parameter) for (name, parameter), part in parts}
        self.missing = set(group)
        self.work: dist.Work | None = None

    def require_missing(self, name: str) -> None:
        """Refuse a gradient that has come already: it would be added to what is being averaged.

        Raises:
            RuntimeError: it has come since the last :meth:`finish`.
        """
        if name not in self.missing:
            raise RuntimeError(
                f"a gradient of {name} came a second time before finish(): call finish() once a "
                "step, also if it is dropped, and run all backward passes of it but the last in "
                "no_sync()"
            )

    def put(self, name: str, parameter: nn.Parameter) -> None:
        """Take in a gradient; with the last one begin the all-reduce."""
        place = self.places[name]
        if parameter.grad is not place:
            assert parameter.grad is not None
            place.copy_(parameter.grad)
            parameter.grad = place
        self.missing.discard(name)
        if not self.missing:
            self.flat.div_(dist.get_world_size())
            self.work = dist.all_reduce(self.flat, async_op=True)

    def finish(self) -> None:
        """Let what comes next on the current stream find the averages.

        Raises:
            RuntimeError: a gradient has not come, so that the bucket was never sent.
        """
        if self.work is None:
            names = ", ".join(sorted(self.missing))
            raise RuntimeError(f"no gradient came in this backward pass for {names}")
        self.work.wait()
        self.work = None
        self.missing = set(self.places)


class AveragedGradients:
    """Averages a model's gradients over all ranks, in buckets, while backward runs.

    After backward, call :meth:`finish`; a second backward pass before it is refused, but for
    :meth:`no_sync`. Frozen parameters are left alone. Every other one must get a gradient on every
    rank, and gradients come in the same order everywhere, which holds for a model without branches.

    Args:
        bucket_bytes: how many bytes a bucket holds at least, apart from the last one.
    """

    def __init__(self, model: nn.Module, bucket_bytes: float) -> None:
        self.buckets = []
        self._frozen = [each for each in model.parameters() if not each.requires_grad]
        self._is_on = True
        for group in bucket_groups(model, bucket_bytes):
            bucket = Bucket(group)
            self.buckets.append(bucket)
            for name, parameter in group.items():
                hook = partial(self._on_gradient, bucket, name)
                parameter.register_post_accumulate_grad_hook(hook)

    def _on_gradient(self, bucket: Bucket, name: str, parameter: nn.Parameter) -> None:
        bucket.require_missing(name)
        if self._is_on:
            bucket.put(name, parameter)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in this block leave gradients on their rank, to be added to.

        A block inside another one changes nothing.
        """
        was_on, self._is_on = self._is_on, False
        try:
            yield
        finally:
            self._is_on = was_on

    def finish(self) -> None:
        """Wait for all buckets of this step.

        Raises:
            RuntimeError: a gradient has not come, or a parameter learns that was frozen.
        """
        if any(parameter.requires_grad for parameter in self._frozen):
            raise RuntimeError(
                "a parameter learns that was frozen when AveragedGradients was made, and is in no "
                "bucket: make it anew after unfreezing"
            )
        for bucket in self.buckets:
            bucket.finish()


def shard_of(batch: Tensor) -> Tensor:
    """This rank's examples of a batch that all ranks have."""
    return torch.tensor_split(batch, dist.get_world_size())[dist.get_rank()]
