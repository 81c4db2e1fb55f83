"""The doctor's instruments: each looks at one thing, and says what is not as it should be.

None of them sees everything. What a comparison of parameters passes, the meters may see (the same
bytes four times over), the buffers (statistics that were updated twice), the masks (one dropout on
all devices) or the waits; and the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, pairwise

import torch
from torch import Tensor

from course_lib.doctor.watching import Run

Instrument = Callable[[Run], str | None]

# How far a parameter may be from where it should be, as a part of the way that it has gone. Sums in
# another order put a GPT that AdamW trains off by less than a tenth of this (tests/test_doctor.py).
TOLERANCE = 0.01

# As a part of all gradients' norm: a gradient that was never longer is what rounding left of zero,
# such as that of the bias of attention's keys. AdamW makes whole steps of it, in any direction.
NOTHING = 1e-6

# How many times as much as it should be a meter may read: recomputation takes 4/3 of the
# operations, and ZeRO's third stage sends 3/2 of the bytes.
MORE = 1.6


def replicas_agree(run: Run) -> str | None:
    """Whether all replicas have the same parameters."""
    first, *others = [state.parameters for state in run.now.replicas]
    for name in first:
        for rank, state in enumerate(others, 1):
            off = _off(state[name], first[name], run.start.parameters[name])
            if off > TOLERANCE:
                return f"{name} of rank {rank} is not rank 0's: {_in_words(off)}"
    return None


def as_on_one_device(run: Run) -> str | None:
    """Whether the first replica has the parameters that one device has, and the step its loss."""
    if run.now.alone is None:
        return None
    here, right = run.now.replicas[0].parameters, run.now.alone.parameters
    wrong = {name: _off(here[name], right[name], run.start.parameters[name]) for name in right}
    wrong = {
        name: off for name, off in wrong.items() if off > TOLERANCE and not _is_rounding(run, name)
    }
    if not wrong:
        return _loss(run)
    name, off = next(iter(wrong.items()))
    worst = max(wrong, key=lambda name: wrong[name])
    also = f"; the worst {worst}: {_in_words(wrong[worst])}" if worst != name else ""
    return (
        f"{len(wrong)} of {len(right)} parameters are not one device's, the first of them {name}: "
        f"{_in_words(off)}{also}"
    )


def buffers(run: Run) -> str | None:
    """Whether buffers, which no optimizer touches, are the same everywhere, and one device's."""
    first, *others = [state.buffers for state in run.now.replicas]
    pairs = [(f"of rank {rank}", state, "rank 0's") for rank, state in enumerate(others, 1)]
    if run.now.alone is not None:
        pairs.append(("here", run.now.alone.buffers, "one device's"))
    for where, state, whose in pairs:
        for name in first:
            if first[name].is_floating_point():  # a count of batches is not what training uses
                off = _off(first[name], state[name], run.start.buffers[name])
                if off > TOLERANCE:
                    return f"{name} {where} is not {whose}: {_in_words(off)}"
    return None


def from_the_start(run: Run) -> str | None:
    """Whether every parameter that moves on one device moves here."""
    if run.now.alone is None:
        return None
    start, here, right = run.start.parameters, run.now.replicas[0], run.now.alone
    still = [
        name
        for name in right.parameters
        if torch.equal(here.parameters[name], start[name])
        and not torch.equal(right.parameters[name], start[name])
    ]
    if not still:
        return None
    return f"{len(still)} of {len(start)} parameters have not moved, the first of them {still[0]}"


def gradient_norm(run: Run) -> str | None:
    """Whether the gradients that the step left are as long as one device's."""
    if run.now.alone is None or not run.now.alone.norm or not run.now.replicas[0].norm:
        return None
    here, right = run.now.replicas[0].norm, run.now.alone.norm
    if abs(here / right - 1) <= TOLERANCE:
        return None
    return f"the norm of all gradients is {here:.3g}, one device's {right:.3g}: {here / right:.3g}x"


def masks(run: Run) -> str | None:
    """Whether replicas, which see other examples, drop other places."""
    ranked = list(enumerate(run.now.masks))
    for (rank, ours), (other, theirs) in combinations(ranked, 2):
        if any(_dropped_alike(*a, *b) for a, b in zip(ours, theirs, strict=False)):
            return f"ranks {rank} and {other} dropped the same places of different examples"
    return None


def examples(run: Run) -> str | None:
    """Whether no two replicas are given the same, and a step that shuffles does it anew."""
    given = run.now.inputs
    for (rank, ours), (other, theirs) in combinations(list(enumerate(given)), 2):
        if ours and _same(ours, theirs):
            return f"ranks {rank} and {other} were given the same examples"
    for number, moment in enumerate(run.moments[:-1] if run.shuffles else [], 1):
        for rank, (now, then) in enumerate(zip(given, moment.inputs, strict=False)):
            if len(now) > 1 and _same(now, then):
                return f"rank {rank} was given its {len(now)} pieces as in step {number}"
    return None


def waits(run: Run) -> str | None:
    """Whether each use of a tensor waits for the stream that makes it."""
    hazards = run.now.recording.hazards
    return str(hazards[0]) if hazards else None


def bytes_sent(run: Run) -> str | None:
    """Whether devices send each other what they must, and no more."""
    sent = run.now.recording.bytes_between_devices
    if len(run.now.replicas) > 1 and not sent:
        return "nothing was sent from device to device: each replica trains by itself"
    if run.bytes_a_step and sent > MORE * run.bytes_a_step:
        times = sent / run.bytes_a_step
        return f"{sent:,} bytes were sent from device to device: {times:.3g}x {run.bytes_a_step:,}"
    return None


def operations(run: Run) -> str | None:
    """Whether all devices together multiply as much as one device would."""
    here, right = run.now.recording.flops, run.now.flops
    if not right or not here > MORE * right:
        return None
    return f"{here:,.0f} operations in matrix products: {here / right:.3g}x one device's"


def memory(run: Run) -> str | None:
    """Whether devices do not hold more after each of the last four steps than before it."""
    if len(run.moments) < 4:  # new optimizer state, or a layer that is unfrozen, grows once
        return None
    left = [[history[-1][1] for history in each.recording.memory] for each in run.moments[-4:]]
    for index, held in enumerate(zip(*left, strict=True)):
        if all(then < here for then, here in pairwise(held)):
            return f"device {index} holds more after each step: {', '.join(map(str, held))} bytes"
    return None


def timeline(run: Run) -> str | None:
    """Whether devices are equally long at their matrix products."""
    t = run.now.recording
    taking_part = [index for index, held in enumerate(t.memory) if held[-1][1]]  # none on real GPUs
    seconds = [
        sum(span.end - span.start for span in t.spans if span.devices == (index,) and span.flops)
        for index in taking_part
    ]
    if not seconds or not max(seconds) > MORE * sum(seconds) / len(seconds):
        return None
    longest, mean = max(seconds), sum(seconds) / len(seconds)
    where, parts = taking_part[seconds.index(longest)], [f"{s / longest:.0%}" for s in seconds]
    return (
        f"device {where} multiplies {longest / mean:.3g}x as long as the mean: {', '.join(parts)}"
    )


INSTRUMENTS: dict[str, Instrument] = {
    "replica against replica": replicas_agree,
    "against one device": as_on_one_device,
    "buffers": buffers,
    "distance from the start": from_the_start,
    "gradient norm": gradient_norm,
    "masks": masks,
    "examples": examples,
    "waits": waits,
    "bytes": bytes_sent,
    "operations": operations,
    "memory": memory,
    "timeline": timeline,
}


def _loss(run: Run) -> str | None:
    """What is wrong with the loss that the step returned, if it returned one."""
    losses, right = run.now.losses, run.now.alone_loss
    if not losses or right is None or not math.isfinite(right):
        return None
    for rank, loss in enumerate(losses if len(losses) > 1 else []):
        if not math.isfinite(loss):
            return f"the loss of rank {rank} is {loss}, and one device's {right:.4g}"
    here = sum(losses)
    if math.isfinite(here) and abs(here - right) <= TOLERANCE * max(abs(right), NOTHING):
        return None
    parts = f", in {len(losses)} parts," if len(losses) > 1 else ""
    times = f": {here / right:.3g}x" if right and math.isfinite(here) else ""
    return f"the step returned a loss of {here:.4g}{parts} and one device's is {right:.4g}{times}"


def _dropped_alike(x: Tensor, y: Tensor, other_x: Tensor, other_y: Tensor) -> bool:
    """Whether two dropouts let the same through, where numbers came into both."""
    if x.shape != other_x.shape:
        return False
    both = x & other_x
    kept = y[both]
    return bool(torch.equal(kept, other_y[both]) and kept.any() and not kept.all())


def _same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )


def _off(here: Tensor, there: Tensor, start: Tensor) -> float:
    """How far two tensors are apart, as a part of the way that the second one has gone."""
    if here.shape != there.shape:
        return float("inf")
    here, there, start = here.double(), there.double(), start.double()
    apart, way = (here - there).norm(), (there - start).norm()
    if not torch.isfinite(apart):
        return float("inf")
    return (apart / way.clamp_min(1e-9)).item()


def _is_rounding(run: Run, name: str) -> bool:
    """Whether gradients of a parameter were there, and nothing but rounding, here and alone."""
    alone = [moment.alone for moment in run.moments if moment.alone is not None]
    here = [moment.replicas[0] for moment in run.moments]
    return any(state.gradients.get(name) for state in alone) and all(
        state.gradients.get(name, 0.0) <= NOTHING * state.norm for state in [*alone, *here]
    )


def _in_words(off: float) -> str:
    if off == float("inf"):
        return "not a number, or of another shape"
    if off > 1e4:
        return "it has moved, and the other has not"
    return f"off by {off:.2g} of the way it has gone"
