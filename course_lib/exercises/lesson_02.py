"""Checks of lesson 02: an all-reduce, uneven shards, one exchange for many pieces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib import format_bytes, hardware, timeline
from course_lib.exercises.verdict import Verdict, Wrong, check, right
from course_lib.models import MLP, parameter_count
from course_lib.parallel.data_parallel import replicate, split_batch


@check
def check_mean(all_reduce_mean: Callable[[list[Tensor]], None]) -> Verdict:
    """Graded on the mean, bit-identical tensors, and the bytes that crossed the links."""
    with hardware.fresh_devices(4) as gpus:
        originals = [torch.randn(1000) for _ in gpus]
        tensors = [tensor.to(gpu) for tensor, gpu in zip(originals, gpus, strict=True)]
        with timeline.trace() as t:
            all_reduce_mean(list(tensors))
        results = [tensor.cpu() for tensor in tensors]
        total, mean = sum(originals), sum(originals) / 4
        if all(torch.equal(a, b) for a, b in zip(results, originals, strict=True)):
            raise Wrong("the tensors are what they were: change them in place, with += or copy_.")
        for gpu, result, original in zip(gpus, results, originals, strict=True):
            if torch.equal(result, original):
                raise Wrong(
                    f"on {gpu} the tensor is what it was: write into it, with copy_. An = only "
                    "gives another tensor its name."
                )
            if torch.allclose(result, total, atol=1e-5):
                raise Wrong(f"on {gpu} there is the sum: divide by the number of tensors.")
            if not torch.allclose(result, mean, atol=1e-5):
                raise Wrong(f"on {gpu} there is not the mean of the four.")
        moved, target = sum(t.bytes_moved.values()), 6 * originals[0].nbytes
        facts = [("bytes moved", format_bytes(moved), f"at most {format_bytes(target)}")]
        if any("host" in route for route in t.bytes_moved):
            raise Wrong("tensors went over the host: move them from GPU to GPU.", facts)
        if any(not torch.equal(results[0], result) for result in results):
            raise Wrong(
                "the tensors agree, but not to the last bit: a sum in another order is rounded "
                "differently. Compute it once, and copy it.",
                facts,
            )
        if moved > target:
            raise Wrong(
                "more bytes crossed the links than 2 (N - 1) tensors have: add up on one GPU, and "
                "send the result to the others.",
                facts,
            )
        return right("the mean on every GPU, to the last bit.", facts)


@check
def check_combine(combine: Callable[[list[Tensor | None], list[int]], Tensor]) -> Verdict:
    """Graded on the gradient for even, uneven and empty shards."""
    with hardware.fresh_devices(4) as gpus:
        for sizes in ([5, 5, 5, 5], [104, 103, 103, 103], [9, 1, 4, 2], [1, 1, 1, 0], [0, 2, 1, 0]):
            examples = [torch.randn(size, 6) for size in sizes]
            gradients = [
                shard.mean(dim=0).to(gpu) if len(shard) else None
                for shard, gpu in zip(examples, gpus, strict=True)
            ]
            expected = torch.cat(examples).mean(dim=0)
            means = torch.stack([g.cpu() for g in gradients if g is not None])
            answer = _combined(combine, gradients, sizes)
            home = next(gradient.device for gradient in gradients if gradient is not None)
            if answer.device != home:
                raise Wrong(
                    f"for shards of {sizes} images the result should be on {home}, and is on "
                    f"{answer.device}."
                )
            if answer.shape != expected.shape:
                raise Wrong(
                    f"the result has shape {tuple(answer.shape)}, and should have the shape of "
                    f"each gradient, {tuple(expected.shape)}."
                )
            answer = answer.cpu().to(expected.dtype)
            if torch.allclose(answer, expected, atol=1e-6):
                continue
            hint = ""
            if torch.allclose(answer, means.mean(dim=0), atol=1e-5):
                hint = " This is the plain mean of the shards' means."
            elif torch.allclose(answer, means.sum(dim=0), atol=1e-5):
                hint = " This is the sum of the shards' means."
            elif torch.allclose(answer, means.sum(dim=0) / len(sizes), atol=1e-5):
                hint = " This is the sum of the shards' means, divided by the number of GPUs."
            elif torch.allclose(answer, expected * sum(sizes), atol=1e-3):
                hint = " This is the sum over all images; the mean is asked for."
            elif torch.allclose(answer, expected * sum(sizes) / len(sizes), atol=1e-3):
                hint = " Divide by the number of images, not by the number of GPUs."
            raise Wrong(f"for shards of {sizes} images it is not the whole batch's gradient.{hint}")
    return right("even, uneven and empty shards, all weighted by their share.")


def _combined(combine: Callable, gradients: list[Tensor | None], sizes: list[int]) -> Tensor:
    """What the answer returns; an error on an empty shard is told with its likely cause."""
    try:
        answer = combine(list(gradients), list(sizes))
    except (TypeError, AttributeError) as error:
        if all(gradient is not None for gradient in gradients):
            raise
        raise Wrong(
            f"for shards of {sizes} images your code stopped with {type(error).__name__}: the "
            "gradient of an empty shard is None, which must be skipped."
        ) from None
    if not isinstance(answer, Tensor):
        raise Wrong(f"your function should return a tensor, and returned {answer!r:.60}.")
    return answer


@check
def check_once(accumulate_and_exchange: Callable) -> Verdict:
    """Graded on the gradients of every replica, and on the bytes of one exchange."""
    with hardware.fresh_devices(3) as gpus:
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
            raise Wrong("a replica has no gradients: call .backward() on its losses.", facts)
        over_host = sum(nbytes for route, nbytes in t.bytes_moved.items() if "host" in route)
        if over_host >= 4 * parameter_count(model):
            raise Wrong("gradients went over the host: move them from GPU to GPU.", facts)
        if moved == 0:
            raise Wrong("nothing was exchanged: each replica has the gradient of its own shards.")
        if moved >= 2 * target:
            raise Wrong(
                "the gradients were exchanged more than once. Besides the bytes, the second "
                "exchange adds up sums that were added up before.",
                facts,
            )
        if moved > target:
            raise Wrong(
                "more bytes crossed the links than one exchange takes, 2 (N - 1) times the "
                "gradients: add up on one GPU, and send the result to the others.",
                facts,
            )
        busy = {span.device for span in t.spans if span.kind == "matmul"}
        for index, gpu in enumerate(gpus):
            if index not in busy:
                raise Wrong(f"{gpu} computed nothing: each replica runs its own shards.", facts)
        for replica in replicas:
            _require_gradients(replica, model, facts)
        gradients = [[p.grad.cpu() for p in replica.parameters()] for replica in replicas]
        for others in gradients[1:]:
            if not all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True)):
                raise Wrong("the replicas' gradients differ in the last bit: copy one result.")
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
    if scale < 0.67:
        raise Wrong(
            f"the gradient is about {scale:.2f} times what it should be. Is something divided "
            "after the weights, which already add up to one, or set to zero between the pieces?",
            facts,
        )
    raise Wrong(
        "close, but not the gradient of the mean over all images: a piece of 20 images must not "
        "count as much as one of 25, and every shard needs its own weight.",
        facts,
    )
