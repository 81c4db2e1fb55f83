"""Which gradients are sums over all devices already, so that none is summed twice.

A sum that is summed once more counts N times, and nothing in its numbers says so.
"""

from __future__ import annotations

from course_lib.parallel.kinds import Tensors


def mark_as_sums(gradients: Tensors) -> None:
    """Note on each gradient that it is a sum, for as long as nobody changes it in place."""
    for gradient in gradients:
        # By this number autograd counts such changes.
        vars(gradient)["summed_at"] = gradient._version


def are_sums(gradients: Tensors) -> bool:
    """Whether copies of one gradient, one a device, are the sums that they were marked as.

    Raises:
        RuntimeError: they are sums to which more has been added since, on each device its own.
    """
    marks = [getattr(each, "summed_at", None) for each in gradients]
    if all(mark is None for mark in marks):
        return False
    if any(mark != each._version for mark, each in zip(marks, gradients, strict=True)):
        raise RuntimeError(
            "gradients that were summed over the devices have changed since, and would count more "
            "than once: sum them once a step, after its last backward pass, and begin the next one "
            "with zero_grad(set_to_none=True)"
        )
    return True
