"""A mesh of devices: data, pipeline and tensor parallelism at once.

What lesson 09 derives. Each device has a place in a grid, and works in three groups: with its
tensor group on one layer, with its pipeline group on one batch, with its data group on one step.
Which devices are in a group is a matter of placement: those whose numbers are neighbours have the
fastest links, so the index that runs fastest goes to the method that sends most.

    convention                        from the slowest index to the fastest
    ================================  =====================================
    Llama 3 (2024)                    data, pipeline, context, tensor
    Megatron-LM, ``tp-cp-ep-dp-pp``   pipeline, data, expert, context, tensor
    torchtitan                        pipeline, data, context, tensor

All three have tensor parallelism innermost. PyTorch's own is
``torch.distributed.device_mesh.init_device_mesh``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import product

import torch
from torch import Tensor, nn

from course_lib.models import GPT
from course_lib.parallel.counting import counts_of
from course_lib.parallel.gradient_buckets import GradientBuckets
from course_lib.parallel.inputs import require_devices, require_gpt, require_tokens
from course_lib.parallel.kinds import Devices
from course_lib.parallel.split_parameter import Shards
from course_lib.parallel.tensor_parallel import ColumnLinear, CopiedNorm, ParallelBlock
from course_lib.parallel.vocabulary import VocabularyEmbedding, vocabulary_cross_entropy

DATA, PIPELINE, TENSOR = AXES = ("data", "pipeline", "tensor")


class Mesh:
    """Devices in a grid.

    Args:
        devices: as many as ``data * pipeline * tensor``, in the order of the machine.
        order: the three axes, from the one whose index runs slowest to the fastest.

    Raises:
        TypeError: an axis is no whole number.
        ValueError: another number of devices, or an order that is none.
    """

    def __init__(
        self,
        devices: Devices,
        data: int,
        pipeline: int,
        tensor: int,
        order: Sequence[str] = AXES,
    ) -> None:
        self.shape = {DATA: data, PIPELINE: pipeline, TENSOR: tensor}
        if not all(isinstance(size, int) for size in self.shape.values()):
            raise TypeError(f"the axes of a mesh have whole numbers of devices: {self.shape}")
        if sorted(order) != sorted(AXES):
            raise ValueError(f"an order of a mesh has each of {AXES} once: {tuple(order)}")
        if min(self.shape.values()) < 1 or len(devices) != data * pipeline * tensor:
            raise ValueError(
                f"a mesh of data {data} x pipeline {pipeline} x tensor {tensor} needs as many "
                f"devices as that, and there are {len(devices)}"
            )
        self.order = tuple(order)
        self.devices = require_devices(devices)

    def rank(self, data: int, pipeline: int, tensor: int) -> int:
        """Which device stands at a place: its position in ``devices``.

        Raises:
            ValueError: there is no such place.
        """
        place, rank = {DATA: data, PIPELINE: pipeline, TENSOR: tensor}, 0
        for axis in self.order:
            if place[axis] not in range(self.shape[axis]):
                raise ValueError(f"there is no place {place} in a mesh of {self.shape}")
            rank = rank * self.shape[axis] + place[axis]
        return rank

    def groups(self, axis: str) -> list[list[int]]:
        """The ranks that differ in their index along ``axis`` and in no other, group by group.

        Raises:
            ValueError: there is no such axis.
        """
        if axis not in self.order:
            raise ValueError(f"a mesh has the axes {AXES}, and not {axis!r}")
        others = [each for each in self.order if each != axis]
        return [
            [self.rank(**dict(zip(others, place, strict=True)), **{axis: index})
             for index in range(self.shape[axis])]
            for place in product(*(range(self.shape[each]) for each in others))
        ]  # fmt: skip


# For each replica its microbatches: tokens, targets, and the share of what the loss counts.
Placed = list[list[tuple[Tensor, Tensor, float]]]


class MeshReplica(nn.Module):
    """A GPT as a pipeline, each stage of which is tensor-parallel.

    Args:
        groups: the devices of each stage, which share its layers.
    """

    def __init__(self, gpt: GPT, groups: Sequence[Devices]) -> None:
        super().__init__()
        embedding, blocks, head = gpt.parts()
        count = len(groups)
        if len(blocks) < count:
            raise ValueError(f"{len(blocks)} blocks cannot fill {count} pipeline stages")
        edges = [len(blocks) * stage // count for stage in range(count + 1)]
        self.groups = groups
        self.token = VocabularyEmbedding(embedding.token, groups[0])
        self.position = Shards(embedding.position.weight, groups[0])
        self.stages = nn.ModuleList(
            nn.Sequential(*(ParallelBlock(b, group) for b in blocks[edges[p] : edges[p + 1]]))
            for p, group in enumerate(groups)
        )
        self.norm = CopiedNorm(head.norm, groups[-1])
        self.head = ColumnLinear(head.linear, groups[-1])

    def forward(self, tokens_BT: Tensor) -> list[Tensor]:
        """The scores, [B, T, a part of V], on each device of the last stage."""
        T = tokens_BT.shape[1]
        embedded = zip(self.token(tokens_BT.T), self.position, strict=True)
        xs_TBD = [x_TBD + position_TD[:T, None] for x_TBD, position_TD in embedded]
        for group, stage in zip(self.groups, self.stages, strict=True):
            xs_TBD = stage([x.to(device) for x, device in zip(xs_TBD, group, strict=True)])
        return [scores_TBV.transpose(0, 1) for scores_TBV in self.head(self.norm(xs_TBD))]


class MeshGPT(nn.Module):
    """A GPT that trains on a mesh; any optimizer can step its parameters.

    Args:
        gpt: it stays as it is.
        bucket_bytes: how many bytes of gradients a data group sums at once, at least.

    Attributes:
        replicas: one for each data index.
    """

    def __init__(self, gpt: GPT, mesh: Mesh, bucket_bytes: int = 200_000) -> None:
        super().__init__()
        require_gpt(gpt)
        self.mesh = mesh
        data, stages, ranks = (range(mesh.shape[axis]) for axis in AXES)
        self._groups = [
            [[mesh.devices[mesh.rank(d, p, t)] for t in ranks] for p in stages] for d in data
        ]
        self.replicas = nn.ModuleList(MeshReplica(gpt, groups) for groups in self._groups)
        self._buckets: list[GradientBuckets] = []
        if len(data) > 1:
            parts = zip(*(_parameters_by_device(replica) for replica in self.replicas), strict=True)
            self._buckets = [GradientBuckets(list(group), bucket_bytes) for group in parts]

    def place(self, tokens_BT: Tensor, targets_BT: Tensor, microbatches: int) -> Placed:
        """Put a batch where a step needs it: tokens where a replica begins, targets where it ends.

        Once, before the steps: the host waits for every copy from its own memory, and replicas
        whose microbatches come from there take turns.

        Args:
            microbatches: into how many each replica cuts its part.

        Raises:
            TypeError: tokens or targets are no tensors of whole numbers.
            ValueError: they are not of one shape, or fewer examples than microbatches.
        """
        require_tokens(tokens_BT)
        require_tokens(targets_BT, "targets")
        if tokens_BT.shape != targets_BT.shape or microbatches < 1:
            raise ValueError(
                f"tokens {list(tokens_BT.shape)} need targets of that shape, not "
                f"{list(targets_BT.shape)}, and at least one microbatch: {microbatches}"
            )
        count = len(self.replicas) * microbatches
        if len(tokens_BT) < count:
            raise ValueError(f"{len(tokens_BT)} examples cannot fill {count} microbatches")
        parts = targets_BT.tensor_split(count)
        counts = counts_of(parts)
        xs = tokens_BT.tensor_split(count)
        placed: Placed = [[] for _ in self.replicas]
        for number, (x, y, its_count) in enumerate(zip(xs, parts, counts, strict=True)):
            place = number // microbatches
            groups = self._groups[place]
            share = its_count / max(sum(counts), 1)
            placed[place].append((x.to(groups[0][0]), y.to(groups[-1][0]), share))
        return placed

    def forward_backward(self, placed: Placed) -> list[Tensor]:
        """The loss and the gradients of a batch: complete on all devices, and equal in replicas.

        In a replica all microbatches go forward, then all backward (GPipe). During the last of
        these, each device sums its gradients with those of its data group.

        Args:
            placed: what :meth:`place` returned.

        Returns:
            The parts of the mean loss of all replicas and microbatches, scalars on their devices.
        """
        parts = []
        for replica, batch in zip(self.replicas, placed, strict=True):
            losses = [
                [loss * share for loss in vocabulary_cross_entropy(replica(x), y)]
                for x, y, share in batch
            ]
            for left, of_a_microbatch in zip(reversed(range(len(batch))), losses, strict=True):
                with ExitStack() as waiting:
                    for buckets in self._buckets if left else ():
                        waiting.enter_context(buckets.accumulate())
                    torch.autograd.backward(of_a_microbatch)
                parts.append(of_a_microbatch[0].detach())
        for buckets in self._buckets:
            buckets.finish()
        return parts


def _parameters_by_device(replica: nn.Module) -> list[nn.ParameterList]:
    by_device: dict[torch.device, nn.ParameterList] = {}
    for parameter in replica.parameters():
        by_device.setdefault(parameter.device, nn.ParameterList()).append(parameter)
    return list(by_device.values())
