"""Checks of lesson 03: a ring all-gather, a bucket that is ready, accumulation with buckets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib import CLASSROOM, format_bytes, hardware, timeline
from course_lib.exercises.verdict import Verdict, Wrong, check, right
from course_lib.models import MLP
from course_lib.parallel.data_parallel import replicate
from course_lib.parallel.gradient_buckets import GradientBuckets


@check
def check_gather(all_gather: Callable[[list[Tensor]], None]) -> Verdict:
    """Graded on the values, on missing waits, on the bytes each GPU sends and on the time."""
    for count, numel in ((1, 12), (4, 12), (3, 10)):  # 3 does not divide 10
        _require_chunks(all_gather, count, numel)
    _require_waits(all_gather)
    for count in (3, 4):
        facts = _require_speed(all_gather, count)
    return right("every GPU has every chunk, and all links worked at once.", facts)


def _require_chunks(all_gather: Callable[[list[Tensor]], None], count: int, numel: int) -> None:
    # The trace keeps warnings about missing waits from the learner: the verdict speaks of them.
    with hardware.fresh_devices(count) as gpus, timeline.trace():
        whole = torch.randn(numel).tensor_split(count)
        originals = [torch.randn(numel) for _ in gpus]
        for rank, original in enumerate(originals):
            original.tensor_split(count)[rank].copy_(whole[rank])
        tensors = [original.to(gpu) for original, gpu in zip(originals, gpus, strict=True)]
        all_gather(list(tensors))
        results = [tensor.cpu().tensor_split(count) for tensor in tensors]
    for rank, (chunks, original) in enumerate(zip(results, originals, strict=True)):
        for number, chunk in enumerate(chunks):
            if not torch.equal(chunk, whole[number]):
                same = torch.equal(chunk, original.tensor_split(count)[number])
                raise Wrong(
                    f"on {count} GPUs, with tensors of {numel} numbers, chunk {number} on GPU "
                    f"{rank} is {'what it was' if same else 'not that of its owner'}."
                )


def _require_waits(all_gather: Callable[[list[Tensor]], None]) -> None:
    """The tensors are written right before and right after, on the main streams."""
    with hardware.fresh_devices(3) as gpus, timeline.trace() as t:
        tensors = [torch.ones(12, device=gpu) for gpu in gpus]
        all_gather(list(tensors))
        for tensor in tensors:
            tensor.zero_()
    if t.hazards:
        raise Wrong(f"a wait is missing: {t.hazards[0]}")


def _require_speed(
    all_gather: Callable[[list[Tensor]], None], count: int
) -> list[tuple[str, str, str]]:
    """Check bytes and seconds; returns what it took."""
    numel = 120_000  # all counts here divide it
    spec = CLASSROOM.with_(launch_overhead=0.0)
    with hardware.fresh_devices(count, spec) as gpus:
        tensors = [torch.ones(numel, device=gpu) for gpu in gpus]
        with timeline.trace() as t:
            all_gather(list(tensors))
    sent, least = max(t.bytes_sent(gpu) for gpu in gpus), (count - 1) * numel // count * 4
    ideal = (count - 1) * (spec.latency + numel // count * 4 / spec.link_bandwidth)
    facts = [
        ("most bytes sent by one GPU", format_bytes(sent), f"at most {format_bytes(least)}"),
        ("time", f"{t.seconds * 1e3:.2f} ms", f"at most {ideal * 1.05e3:.2f} ms"),
    ]
    if any("host" in route for route in t.bytes_moved):
        raise Wrong("chunks went over the host: copy from GPU to GPU.", facts)
    if sent > least:
        raise Wrong(
            f"on {count} GPUs one sends more than (N - 1)/N of a tensor: send one chunk a round, "
            "not the whole tensor, in N - 1 rounds.",
            facts,
        )
    if t.seconds > ideal * 1.05:
        computing = max(
            sum(span.end - span.start for span in t.spans if span.devices == (rank,))
            for rank in range(count)
        )
        why = "in each round all GPUs must send at once, from a side stream to a side stream."
        if t.seconds - computing <= ideal * 1.05:
            why = "what arrives is copied once more. Let copy_ write straight into its place."
        raise Wrong(f"the values are right, and on {count} GPUs it takes too long: {why}", facts)
    return facts


@check
def check_ready(on_gradient: Callable[[_CountingBucket, int, str], None]) -> Verdict:
    """Graded on when the bucket is reduced, over two steps and in several orders."""
    names = ["2.bias", "2.weight", "0.bias"]
    orders = {
        "one GPU after the other": [(rank, name) for rank in range(3) for name in names],
        "all GPUs side by side": [(rank, name) for name in names for rank in range(3)],
        "the last GPU first": [(2 - rank, name) for rank in range(3) for name in reversed(names)],
    }
    for order, gradients in orders.items():
        buckets = [_CountingBucket(names), _CountingBucket(names)]  # their gradients come mixed
        for step in (1, 2):
            for place, (rank, name) in enumerate(gradients, start=1):
                for bucket in buckets:
                    on_gradient(bucket, rank, name)
                if place < len(gradients):
                    _require_reduced(buckets, step - 1, step, order, place, len(gradients))
            _require_reduced(buckets, step, step, order, place, len(gradients))
    return right("reduced once a step, with the last gradient of the last GPU, in any order.")


class _CountingBucket(SimpleNamespace):
    """What a hook sees of a bucket; counts how often it is reduced."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(names=list(names), count=3, arrived=set(), reduced=0)

    def reduce(self) -> None:
        self.reduced += 1


def _require_reduced(
    buckets: list[_CountingBucket], times: int, step: int, order: str, come: int, expected: int
) -> None:
    for bucket in buckets:
        if bucket.reduced == times:
            continue
        again = " Is it still full from the step before?" if step == 2 else ""
        if come < expected:
            raise Wrong(
                f"in step {step}, with {order}, a bucket was reduced when {come} of its {expected} "
                f"gradients had come: the others are not in the sum.{again}"
            )
        raise Wrong(
            f"in step {step}, with {order}, all {expected} gradients had come, and the bucket was "
            f"reduced {bucket.reduced - times + 1} times, not once.{again}"
        )


@check
def check_accumulate(accumulate: Callable[..., None]) -> Verdict:
    """Graded on the gradients and on the bytes that crossed the links."""
    with hardware.fresh_devices(3) as gpus:
        model = MLP(16, 32, 4)
        batches = [[(torch.randn(6, 16), torch.randint(0, 4, (6,))) for _ in gpus] for _ in "1234"]
        replicas = replicate(model, gpus)
        buckets = GradientBuckets(replicas, bucket_bytes=1000)
        microbatches = [_on(gpus, shards) for shards in batches]
        with timeline.trace() as t:
            accumulate(replicas, buckets, microbatches, F.cross_entropy)
            gradients = [[p.grad for p in replica.parameters()] for replica in replicas]
            for rank, ours in enumerate(gradients):
                if any(gradient is None for gradient in ours):
                    raise Wrong(f"the replica on GPU {rank} has no gradients.")
                gradients[rank] = torch.cat([gradient.flatten() for gradient in ours])
        nbytes = sum(p.nbytes for p in model.parameters())
        moved, target = t.bytes_between_devices, 2 * (len(gpus) - 1) * nbytes
        facts = [("bytes moved", format_bytes(moved), f"at most {format_bytes(target)}")]
        if sum(n for route, n in t.bytes_moved.items() if "host" in route) >= nbytes:
            raise Wrong("gradients went over the host: the buckets move them.", facts)
        if moved > target:
            raise Wrong(
                "the links carry the gradients more than once. Besides, what is already the sum "
                "of all GPUs is then added up once more.",
                facts,
            )
        if not moved:
            raise Wrong("nothing was exchanged: each GPU has the gradient of its own shards.")
        expected = _gradients(model, batches)
        for rank, ours in enumerate(gradients):
            ours = ours.cpu()
            if not torch.allclose(ours, expected, atol=1e-6):
                raise Wrong(f"on GPU {rank}: {_likely(ours, expected, batches, model)}", facts)
        if t.hazards:
            raise Wrong(
                f"a wait is missing: {t.hazards[0]} Is finish() called after the last backward?",
                facts,
            )
        return right("the gradient of the mean over all examples, exchanged once.", facts)


def _on(gpus: list[torch.device], shards: list) -> tuple[list[Tensor], list[Tensor]]:
    xs = [x.to(gpu) for (x, _), gpu in zip(shards, gpus, strict=True)]
    ys = [y.to(gpu) for (_, y), gpu in zip(shards, gpus, strict=True)]
    return xs, ys


def _gradients(model: nn.Module, batches: list) -> Tensor:
    """Those of the mean loss over all examples, in one row."""
    single = copy.deepcopy(model)
    xs, ys = zip(*[shard for shards in batches for shard in shards], strict=True)
    F.cross_entropy(single(torch.cat(xs)), torch.cat(ys)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in single.parameters()])


def _likely(ours: Tensor, expected: Tensor, batches: list, model: nn.Module) -> str:
    """Which mistake the gradients look like."""
    parts, gpus = len(batches), len(batches[0])
    for factor, cause in (
        (parts * gpus, "the sum of all losses' gradients: divide each by microbatches times GPUs"),
        (parts, f"{parts} times too large: divide each loss by the number of microbatches as well"),
        (gpus, f"{gpus} times too large: divide each loss by the number of GPUs as well"),
    ):
        if torch.allclose(ours, expected * factor, atol=1e-5):
            return f"{cause}."
    for number, shards in enumerate(batches):
        mean = _gradients(model, [shards])
        if any(torch.allclose(ours * factor, mean, atol=1e-6) for factor in (1, parts)):
            return f"only microbatch {number} is in the gradients: the others' were lost."
    return "not the gradient of the mean over all examples."
