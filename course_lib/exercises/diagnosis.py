"""What many checks look at: values that are none, work on the host, things that must not change.

What says *require* raises :class:`~course_lib.exercises.verdict.Wrong` with one sentence, or does
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from course_lib.exercises.verdict import Wrong
from course_lib.timeline import Trace

Facts = list[tuple[str, str, str]]


def require_tensors(values: object, shapes: Sequence[tuple[int, ...]], where: str = "") -> None:
    """Raise unless ``values`` are tensors of these shapes, one for each GPU.

    Args:
        where: the case at hand, for a verdict on a shape, as in ``"with 2 GPUs, "``.
    """
    if values is None:
        raise Wrong("your function returned None: is a return statement missing?")
    if not isinstance(values, (list, tuple)) or len(values) != len(shapes):
        raise Wrong(f"return a list of {len(shapes)} tensors for {len(shapes)} GPUs.")
    for rank, (value, shape) in enumerate(zip(values, shapes, strict=True)):
        if not isinstance(value, Tensor):
            raise Wrong(
                f"for GPU {rank} there is a {type(value).__name__}, and should be a tensor."
            )
        if tuple(value.shape) != shape:
            raise Wrong(
                f"{where}GPU {rank}'s tensor has shape {tuple(value.shape)}, and should have "
                f"{shape}."
            )


def require_finite(tensors: Iterable[Tensor], what: str) -> None:
    """Raise if a number among ``tensors`` is NaN or infinite: no comparison would name that.

    Args:
        what: the tensors in a few words, as in ``"the gradients"``.
    """
    for tensor in tensors:
        if not torch.isfinite(tensor.detach().cpu()).all():
            raise Wrong(f"there is a number that is NaN or infinite in {what}.")


def gradient_of(
    tensor: Tensor, without: str = "there is no gradient.", facts: Facts | None = None
) -> Tensor:
    """The gradient that backward left in ``tensor``; raises if there is none.

    Args:
        without: what the verdict says then.
    """
    if tensor.grad is None:
        raise Wrong(without, facts)
    return tensor.grad


def bytes_over_host(t: Trace) -> int:
    """Bytes that were copied to or from the host."""
    return sum(nbytes for route, nbytes in t.bytes_moved.items() if "host" in route)


def require_not_over_host(t: Trace, what: str, facts: Facts, least: int = 1) -> None:
    """Raise if at least ``least`` bytes went to or from the host.

    Args:
        what: what should have stayed on the GPUs, as in ``"gradients"``.
    """
    if bytes_over_host(t) >= least:
        raise Wrong(f"{what} went over the host: move them from GPU to GPU.", facts)


class Unchanged:
    """Numbers that an answer must leave as they are; made before it runs, asked after.

    Args:
        kept: models and tensors, by what to call them, as in ``{"the parameters": model}``.
    """

    def __init__(self, kept: Mapping[str, nn.Module | Tensor]) -> None:
        self._kept = {what: _tensors_of(value) for what, value in kept.items()}
        self._before = {
            what: [tensor.detach().cpu().clone() for tensor in tensors]
            for what, tensors in self._kept.items()
        }

    def require(self) -> None:
        """Raise if any of them changed."""
        for what, tensors in self._kept.items():
            now = [tensor.detach().cpu() for tensor in tensors]
            if not all(torch.equal(*pair) for pair in zip(now, self._before[what], strict=True)):
                raise Wrong(f"{what} changed, and should be what they were before your function.")


def _tensors_of(value: nn.Module | Tensor) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value.parameters())


def known_mistake(matches: Callable[[Tensor], bool], mistakes: Mapping[str, Tensor]) -> str:
    """The sentence of the first of ``mistakes`` that the answer matches, or ``""``.

    A mistake that gives the right result as well in the case at hand is none: leave it out.

    Args:
        matches: whether the answer is this tensor.
        mistakes: what each known mistake comes to, by the sentence that names it.
    """
    return next((sentence for sentence, wrong in mistakes.items() if matches(wrong)), "")
