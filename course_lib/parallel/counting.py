"""What a mean loss counts, and how the losses of a batch's parts add up to the loss of the whole.

A mean over a batch is the sum of its parts' means, each weighted by its share of what the mean
counts. For a loss over classes or tokens that is the number of targets, less those that the loss
ignores (padding), and not the number of examples: parts with more padding must count less. Every
method that computes a loss in parts (shards, microbatches, parts of a sequence) weights it here.

No weight helps a loss that compares the examples of a batch with each other, as contrastive losses
do: :func:`require_mean_of_parts` refuses it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from course_lib.hardware import holds_numbers
from course_lib.parallel.kinds import Devices, Loss

# The default of ``ignore_index`` in PyTorch's losses. A loss that ignores something else needs its
# targets changed: ``targets.masked_fill(targets == pad, -100)``.
IGNORED = -100


class CountedShards(list[Tensor]):
    """Parts of a batch, one a device, that know what a mean loss counts in each of them.

    They are counted on the host, before they move: on a device the host would have to wait for
    the answer.

    Attributes:
        counts: for each part what :func:`count_targets` says.
    """

    def __init__(self, parts: Sequence[Tensor], devices: Devices) -> None:
        self.counts = [count_targets(part) for part in parts]
        super().__init__(part.to(device) for part, device in zip(parts, devices, strict=True))


def count_targets(targets: Tensor) -> int:
    """How many targets a mean loss is over.

    Classes and tokens (whole numbers, of any shape) count one each, those that are ignored (-100)
    nothing. Of targets in floating point (regression, class probabilities) an example counts one.
    The host waits for targets that are on a device; where there are no numbers, all count.

    Raises:
        TypeError: ``targets`` is no tensor.
    """
    if not isinstance(targets, Tensor):
        raise TypeError(
            f"the targets of a shard are one tensor, not a {type(targets).__name__}: what a mean "
            "loss counts is counted there"
        )
    if targets.is_floating_point():
        return len(targets) if targets.dim() else 1
    # Bytes and booleans cannot be -100; as a byte it would be 156.
    if targets.dtype.is_signed and holds_numbers(targets.device):
        return int((targets != IGNORED).sum())
    return targets.numel()


def counts_of(parts: Sequence[Tensor]) -> list[int]:
    """For each part of a batch what a mean loss counts in it.

    The host waits for parts on devices, if they are not :class:`CountedShards`.

    Raises:
        TypeError: it is a single tensor, or a part is none.
    """
    if isinstance(parts, Tensor):  # which would be taken for its rows
        raise TypeError("targets are a list with one tensor a device: cut them as the inputs are")
    if isinstance(parts, CountedShards):
        return parts.counts
    return [count_targets(part) for part in parts]


def total_count(counts: Sequence[int], whole: int | None) -> int:
    """What the mean is over: these parts, or a ``whole`` batch of which they are a piece.

    Raises:
        ValueError: the whole counts less than its parts, such as examples instead of targets.
    """
    if whole is None:
        return sum(counts)
    if whole < sum(counts):
        raise ValueError(
            f"batch_size={whole} is less than the {sum(counts)} targets counted in a piece of the "
            "batch: say how many targets the whole batch has, padding aside"
        )
    return whole


def part_of_mean(
    loss_function: Loss, outputs: Tensor, targets: Tensor, count: int, total: int
) -> Tensor:
    """The part that some outputs and targets have in a mean over ``total`` targets.

    The parts of a batch add up to its mean loss, and so do their gradients. A part that counts
    nothing adds zero, where its own mean would be 0/0.

    Args:
        loss_function: makes the mean loss of (outputs, targets).
        count: what the mean counts in these targets.

    Raises:
        ValueError: the loss function makes more than one number.
    """
    if count == 0:
        return outputs[:0].sum()  # zero, and not a constant: a backward pass goes through it
    mean = loss_function(outputs, targets)
    if mean.numel() != 1:
        raise ValueError(
            f"a loss function makes one number, the mean, and this one made {list(mean.shape)}: "
            'give it reduction="mean"'
        )
    return mean * (count / total)


def require_mean_of_parts(loss_function: Loss, outputs: Tensor, targets: Tensor) -> None:
    """Check on a batch that the loss of the whole is the mean of its parts' losses, as counted.

    It is not for a loss that compares examples with each other, nor for one with a weight for each
    class, which counts weights and not targets. Such a loss needs the outputs of all shards:
    :func:`course_lib.parallel.regions.gather_sequence` gathers them, and brings gradients back.

    Args:
        outputs: at least two examples, along the first dimension. The more, the sharper.

    Raises:
        ValueError: there are fewer examples, or the loss of the whole and the mean of its parts
            differ.
    """
    if len(outputs) < 2:
        raise ValueError(f"a loss is tried on two examples or more: outputs has {len(outputs)}")
    outputs = outputs.detach()
    total = count_targets(targets)
    whole = loss_function(outputs, targets).item()
    for count in range(2, min(len(outputs), 4) + 1):  # classes can weigh as much in both halves
        cut = zip(outputs.tensor_split(count), targets.tensor_split(count), strict=True)
        parts = sum(
            part_of_mean(loss_function, o, y, count_targets(y), total).item() for o, y in cut
        )
        if not abs(whole - parts) <= 1e-4 * max(1.0, abs(whole)):
            raise ValueError(
                f"this loss is not a mean over examples or targets: the batch's is {whole:.4g}, "
                f"the weighted mean of its {count} parts {parts:.4g}; compute it from the gathered "
                "outputs of all shards"
            )
