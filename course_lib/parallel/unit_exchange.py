"""What the devices of sharded training exchange, at each stage of ZeRO.

Parameters come when a unit needs them, gradients leave when backward has them: both on side
streams, while the devices compute.

In mixed precision a parameter takes 16 bytes: 2 for its bfloat16 value, 2 for its gradient, and 12
for the optimizer's state in float32, which is the master weight and AdamW's two moments. With N
devices, what each one holds, and what it sends in a step, as a multiple of the parameters:

    =====  ==========  =========  ===============  =================  =============
    stage  parameters  gradients  optimizer state  bytes a parameter  sent
    =====  ==========  =========  ===============  =================  =============
    0      all         all        all              16                 2 * (N - 1)/N
    1      all         all        1/N              4 + 12/N           2 * (N - 1)/N
    2      all         1/N        1/N              2 + 14/N           2 * (N - 1)/N
    3      1/N         1/N        1/N              16/N               3 * (N - 1)/N
    =====  ==========  =========  ===============  =================  =============
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral

import torch
from torch import Tensor

from course_lib.hardware import current_stream
from course_lib.parallel.collectives import all_gather, reduce_scatter, ring_all_reduce
from course_lib.parallel.flat_unit import FlatUnit
from course_lib.parallel.kinds import Devices
from course_lib.parallel.transfers import SideStreams


class UnitExchange:
    """Collectives over units, by the rules of one stage.

    Args:
        stage: 0 to 3, as :class:`course_lib.parallel.sharded_data_parallel.Sharded` takes it.
        dtype, reduce_dtype: of parameters, and of sums of gradients.
        prefetch: at stage 3, gather the next unit's parameters while this one's are at work.
    """

    def __init__(
        self,
        devices: Devices,
        stage: int,
        dtype: torch.dtype,
        reduce_dtype: torch.dtype,
        prefetch: bool,
    ) -> None:
        self.devices, self.stage, self.prefetch = devices, stage, prefetch
        self.dtype, self.reduce_dtype = dtype, reduce_dtype
        # Two, as FSDP2 has them: the additions of a sum wait for a core that computes, and in one
        # stream the next unit's parameters would wait behind them.
        self._gathers, self._sums = SideStreams(devices), SideStreams(devices)

    def join(self) -> None:
        """Let what the devices do from now on wait for all exchanges."""
        self._gathers.join()
        self._sums.join()

    def cut(self, row: Tensor) -> Sequence[Tensor]:
        """Each device's part of a row; at stage 0 all have all of it."""
        count = len(self.devices)
        return row.chunk(count) if self.stage else [row] * count

    def put_parameters(self, unit: FlatUnit) -> None:
        """Round the master weights to parameters, and put them where the stage has them."""
        # If both are in one dtype, they are the same memory.
        shards = [master.values.to(self.dtype) for master in unit.masters]
        if self.stage == 0:
            unit.set_rows(shards)
        elif self.stage == 3:
            unit.shards = shards
        else:
            unit.drop_rows()  # before there are new ones
            self._gather(unit, shards)

    def _gather(self, unit: FlatUnit, shards: list[Tensor]) -> None:
        """Put all shards on every device, while the devices compute.

        It waits for all that the devices were given so far. So a unit is fetched when the one
        before the present one is done and has left its memory: at most two are there at a time,
        however far ahead the host is.
        """
        with self._gathers.beside(shards):
            unit.set_rows(all_gather(shards))
        unit.arrived = self._gathers.record_events()

    @contextmanager
    def whole(self, unit: FlatUnit, following: FlatUnit | None) -> Iterator[None]:
        """Have all parameters of ``unit`` on every device, during the block at least."""
        if self.stage == 3 and not len(unit.rows[0]):
            self._gather(unit, unit.shards)
        if self.stage == 3 and self.prefetch and following:
            self._gather(following, following.shards)
        for device, arrived in zip(self.devices, unit.arrived, strict=True):
            arrived.wait(current_stream(device))
        try:
            yield
        finally:
            if self.stage == 3:
                unit.drop_rows()

    def sum_gradients(self, unit: FlatUnit) -> None:
        """Sum over the devices, and add to ``unit.gradients`` what the stage keeps of it."""
        gradients = [gradient.to(self.reduce_dtype) for gradient in unit.take_gradients()]
        with self._sums.beside(gradients):
            if self.stage == 0:
                ring_all_reduce(gradients)
            else:
                gradients = reduce_scatter(gradients)  # views: they keep the memory of the whole
            if self.stage >= 2:
                gradients = [part.clone() for part in gradients]
            for gradient, old in zip(gradients, unit.gradients, strict=False):  # at first, none
                gradient.add_(old)
        unit.gradients = gradients


def bytes_a_parameter(stage: int, device_count: int) -> float:
    """Bytes of parameters, gradients and optimizer state on each device, in mixed precision.

    Raises:
        ValueError: there is no such stage, or the devices are no whole number, 1 or above.
    """
    _require_stage(stage, device_count)
    n = device_count
    return (16.0, 4 + 12 / n, 2 + 14 / n, 16 / n)[stage]


def bytes_a_step(stage: int, device_count: int, nbytes: int, groups: int = 1) -> float:
    """Bytes that each device sends in a step, of a model of ``nbytes``.

    Sums come as a reduce-scatter and a gather; stage 3 gathers once more, for backward. With
    several groups of ``device_count`` devices (HSDP), each device sums its part with the others'.

    Raises:
        ValueError: there is no such stage, devices or groups are no whole number, 1 or above, or
            the bytes are negative.
    """
    _require_stage(stage, device_count, groups, nbytes)
    inside = (3 if stage == 3 else 2) * (device_count - 1) / device_count * nbytes
    return inside + 2 * (groups - 1) / groups * nbytes / device_count


def _require_stage(stage: int, device_count: int, groups: int = 1, nbytes: float = 0) -> None:
    counts = (stage, device_count, groups)
    are_whole = all(isinstance(each, Integral) and not isinstance(each, bool) for each in counts)
    if not are_whole or stage not in range(4) or min(device_count, groups) < 1 or not nbytes >= 0:
        raise ValueError(
            "stages are 0 to 3, of one device or more in one group or more, for 0 bytes or more: "
            f"stage {stage!r} of {device_count!r} devices in {groups!r} groups, {nbytes!r} bytes"
        )
