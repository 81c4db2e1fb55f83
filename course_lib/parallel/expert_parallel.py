"""Expert parallelism: the experts of a layer dealt to several GPUs, and tokens that travel there.

Every GPU has its own tokens, as in data parallelism, a copy of the router, and some of the experts.
An all-to-all brings each token to its experts, and another one brings what they made of it back;
their backward passes are all-to-alls in the other direction. GShard (Lepikhin and others, 2020) is
the paper, DeepSpeed-MoE and Megatron-LM are engines for it.

With fixed places in every expert (``experts.Router``) all messages have a size that is known before
the router has spoken, so that the host never waits.
"""

from __future__ import annotations

from copy import deepcopy

from torch import Tensor, nn

from course_lib.parallel.collectives import ring_all_reduce
from course_lib.parallel.experts import MixtureOfExperts, Routing, combine, dispatch, run_experts
from course_lib.parallel.inputs import require_one_each
from course_lib.parallel.kinds import Devices, Tensors
from course_lib.parallel.regions import exchange
from course_lib.parallel.sums import are_sums, mark_as_sums


class ExpertParallel(nn.Module):
    """A mixture of experts over several devices.

        outputs, balances = layer(inputs)           # tensors, one a device
        torch.autograd.backward([loss(...) for ...])
        layer.reduce_gradients()

    Args:
        moe: it stays as it is.
        devices: one a rank; rank r has experts r E/N to (r + 1) E/N - 1.

    Raises:
        ValueError: the experts do not divide among the devices.
    """

    def __init__(self, moe: MixtureOfExperts, devices: Devices) -> None:
        super().__init__()
        if len(moe.experts) % len(devices):
            raise ValueError(
                f"{len(moe.experts)} experts do not divide among {len(devices)} devices"
            )
        self.devices = list(devices)
        each = len(moe.experts) // len(devices)
        self.routers = nn.ModuleList(deepcopy(moe.router).to(device) for device in devices)
        parts = [moe.experts[rank * each : (rank + 1) * each] for rank in range(len(devices))]
        self.experts = nn.ModuleList(
            nn.ModuleList(deepcopy(expert).to(device) for expert in part)
            for part, device in zip(parts, devices, strict=True)
        )

    def forward(self, xs_TD: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        """Each device's outputs, [T, D], and its auxiliary loss.

        Args:
            xs_TD: each device's tokens, as many on all.

        Raises:
            TypeError: it is a single tensor.
            ValueError: there is not one for each device, or one has more tokens than another.
        """
        require_one_each(xs_TD, len(self.devices), "this layer")
        if len({len(x_TD) for x_TD in xs_TD}) > 1:
            tokens = [len(x_TD) for x_TD in xs_TD]
            raise ValueError(f"every device needs as many tokens as the others, not {tokens}")
        count = len(self.devices)
        routings: list[Routing] = [
            router(x_TD) for router, x_TD in zip(self.routers, xs_TD, strict=True)
        ]
        parts = [
            dispatch(x_TD, routing).chunk(count)
            for x_TD, routing in zip(xs_TD, routings, strict=True)
        ]
        worked = [self._work(rank, arrived_NRD) for rank, arrived_NRD in enumerate(exchange(parts))]
        returned = exchange([out_NRD.unbind() for out_NRD in worked])
        outputs = [
            combine(rows_NRD.flatten(0, 1), routing)
            for rows_NRD, routing in zip(returned, routings, strict=True)
        ]
        return outputs, [routing.balance for routing in routings]

    def _work(self, rank: int, arrived_NRD: Tensor) -> Tensor:
        """What a rank's experts make of what came from all N ranks: as many rows, in order."""
        experts = self.experts[rank]
        assert isinstance(experts, nn.ModuleList)  # which a ModuleList of them does not tell
        out = run_experts(experts, rows_by_expert(arrived_NRD, len(experts)))
        return rows_by_source(out, len(experts), len(arrived_NRD))

    def reduce_gradients(self) -> None:
        """Add up the routers' gradients, as data parallelism does. Experts need no such thing: all
        tokens that visited one are in its gradient.

        Once after a backward pass; a second call changes nothing. Frozen routers have nothing to
        add up.

        Raises:
            RuntimeError: a backward pass has added to gradients that were summed already.
        """
        for parameters in zip(*[router.parameters() for router in self.routers], strict=True):
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients and not are_sums(gradients):
                ring_all_reduce(gradients)
                mark_as_sums(gradients)


def rows_by_expert(rows_NRD: Tensor, experts: int) -> tuple[Tensor, ...]:
    """For each expert its rows of all N sources, [N C, D], out of [N, E C, D]."""
    count, _, width = rows_NRD.shape
    by_expert = rows_NRD.view(count, experts, -1, width).transpose(0, 1)
    return by_expert.reshape(experts, -1, width).unbind()


def rows_by_source(rows_RD: Tensor, experts: int, count: int) -> Tensor:
    """And back: from all experts' rows, [E N C, D], to those of each source, [N, E C, D]."""
    by_expert = rows_RD.view(experts, count, -1, rows_RD.shape[-1])
    return by_expert.transpose(0, 1).flatten(1, 2)


def exchange_bytes(devices: int, rows: int, width: int, itemsize: int = 4) -> int:
    """Bytes that one exchange moves between the devices in all: each keeps one part in ``devices``.

    A step has four: there and back, forward and backward.

    Args:
        rows: E x C of each device.
    """
    return (devices - 1) * rows * width * itemsize
