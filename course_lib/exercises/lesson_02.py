"""Checks of lesson 02: an all-reduce, uneven shards, one exchange for many pieces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib import format_bytes, hardware, timeline
from course_lib.data_parallel import replicate, split_batch
from course_lib.exercises.verdict import Verdict, Wrong, check, right
from course_lib.models import MLP, parameter_count


@check
def check_mean(all_reduce_mean: Callable[[list[Tensor]], None]) -> Verdict:
    """Graded on the mean, bit-identical tensors, and the bytes that crossed the links."""
    with hardware.other_devices(4) as gpus:
        torch.manual_seed(0)
        originals = [torch.randn(1000) for _ in gpus]
        tensors = [tensor.to(gpu) for tensor, gpu in zip(originals, gpus, strict=True)]
        with timeline.trace() as t:
            all_reduce_mean(tensors)
        results = [tensor.cpu() for tensor in tensors]
        total, mean = sum(originals), sum(originals) / 4
        if all(torch.equal(a, b) for a, b in zip(results, originals, strict=True)):
            raise Wrong("the tensors are what they were: change them in place, with += or copy_.")
        for gpu, result in zip(gpus, results, strict=True):
            if torch.allclose(result, total, atol=1e-5):
                raise Wrong(f"on {gpu} there is the sum: divide by the number of tensors.")
            if not torch.allclose(result, mean, atol=1e-5):
                raise Wrong(f"on {gpu} there is not the mean of the four.")
        moved, target = sum(t.bytes_moved.values()), 6 * originals[0].nbytes
        facts = [("bytes moved", format_bytes(moved), f"at most {format_bytes(target)}")]
        if any(not torch.equal(results[0], result) for result in results):
            raise Wrong(
                "the tensors agree, but not to the last bit: a sum in another order is rounded "
                "differently. Compute it once, and copy it.",
                facts,
            )
        if moved > target:
            raise Wrong("more bytes crossed the links than 2 (N - 1) tensors have.", facts)
        return right("the mean on every GPU, to the last bit.", facts)


@check
def check_combine(combine: Callable[[list[Tensor | None], list[int]], Tensor]) -> Verdict:
    """Graded on the gradient for even, uneven and empty shards."""
    with hardware.other_devices(4) as gpus:
        for sizes in ([5, 5, 5, 5], [104, 103, 103, 103], [9, 1, 4, 2], [1, 1, 1, 0], [0, 2, 1, 0]):
            torch.manual_seed(0)
            examples = [torch.randn(size, 6) for size in sizes]
            gradients = [
                shard.mean(dim=0).to(gpu) if len(shard) else None
                for shard, gpu in zip(examples, gpus, strict=True)
            ]
            expected = torch.cat(examples).mean(dim=0)
            means = torch.stack([g.cpu() for g in gradients if g is not None])
            answer = combine(gradients, sizes)
            if not isinstance(answer, Tensor):
                raise Wrong(f"your function should return a tensor, and returned {answer!r:.60}.")
            answer = answer.cpu()
            if torch.allclose(answer, expected, atol=1e-6):
                continue
            hint = ""
            if torch.allclose(answer, means.mean(dim=0), atol=1e-5):
                hint = " This is the plain mean of the shards' means."
            elif torch.allclose(answer, means.sum(dim=0), atol=1e-5):
                hint = " This is the sum of the shards' means."
            elif torch.allclose(answer, expected * sum(sizes), atol=1e-3):
                hint = " This is the sum over all images; the mean is asked for."
            raise Wrong(f"for shards of {sizes} images it is not the whole batch's gradient.{hint}")
    return right("even, uneven and empty shards, all weighted by their share.")


@check
def check_once(accumulate_and_exchange: Callable) -> Verdict:
    """Graded on the gradients of every replica, and on the bytes of one exchange."""
    with hardware.other_devices(3) as gpus:
        torch.manual_seed(0)
        model = MLP(64, 32, 10)
        x, y = torch.randn(70, 64), torch.randint(10, (70,))
        pieces = [
            (split_batch(xs, gpus), split_batch(ys, gpus))
            for xs, ys in zip(x.split(25), y.split(25), strict=True)
        ]
        replicas = replicate(model, gpus)
        F.cross_entropy(model(x), y).backward()
        with timeline.trace() as t:
            accumulate_and_exchange(replicas, pieces, F.cross_entropy)
        moved, target = t.bytes_between_devices, 2 * 2 * 4 * parameter_count(model)
        facts = [("bytes moved", format_bytes(moved), format_bytes(target))]
        if any(p.grad is None for replica in replicas for p in replica.parameters()):
            raise Wrong("a replica has no gradients.", facts)
        if moved == 0:
            raise Wrong("nothing was exchanged: each replica has the gradient of its own shards.")
        if moved > target:
            raise Wrong(
                "the gradients were exchanged more than once. Besides the bytes, the second "
                "exchange adds up sums that were added up before.",
                facts,
            )
        for replica in replicas:
            _require_gradients(replica, model, facts)
        return right("three pieces, one exchange.", facts)


def _require_gradients(replica: nn.Module, model: nn.Module, facts: list) -> None:
    pairs = list(zip(replica.parameters(), model.parameters(), strict=True))

    def close(factor: float) -> bool:
        return all(torch.allclose(a.grad.cpu() / factor, b.grad, atol=1e-6) for a, b in pairs)

    if close(1.0):
        return
    scale = sum((a.grad.cpu() * b.grad).sum() for a, b in pairs) / sum(
        (b.grad**2).sum() for _, b in pairs
    )
    if scale > 1.5:
        raise Wrong(
            f"the gradient is about {scale:.0f} times too large: weight each shard's loss with "
            "its share of all the images.",
            facts,
        )
    raise Wrong(
        "close, but not the gradient of the mean over all images: a piece of 20 images must not "
        "count as much as one of 25, and every shard needs its own weight.",
        facts,
    )
