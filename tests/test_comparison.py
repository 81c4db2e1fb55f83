"""Every method that lesson 09 compares is the same training; what it took is counted right."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from itertools import chain

import nbformat
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from course_lib import trace
from course_lib.hardware import fresh_devices, host_seconds, memory_in_use, peak_memory
from course_lib.models import GPT, next_token_loss, parameter_count
from course_lib.parallel import methods
from course_lib.parallel.comparison import Measurement, compare, largest, measure
from course_lib.parallel.methods import METHODS
from course_lib.parallel.proof import largest_difference
from course_lib.parallel.split_parameter import unsplit
from course_lib.virtual.machine import machine
from notebook_tools import NOTEBOOKS
from round_numbers import SPEC, seconds

VOCABULARY, LENGTH = 11, 8
each_method = pytest.mark.parametrize("name", METHODS)

# The class or function that each method makes its model with, and how to get that back whole.
MODELS: dict[str, tuple[str, Callable[[object, GPT], nn.Module]]] = {
    "data": ("replicate", lambda replicas, gpt: replicas[0]),
    "ZeRO 1": ("Sharded", lambda model, gpt: model.to_model()),
    "ZeRO 3": ("Sharded", lambda model, gpt: model.to_model()),
    "pipeline": ("Pipeline", lambda model, gpt: nn.Sequential(*chain(*model.stages))),
    "tensor": ("ParallelGPT", unsplit),
    "context": ("ContextParallelGPT", lambda model, gpt: model.replicas[0]),
}


def a_gpt() -> GPT:
    """Untied, since two of the methods take no other."""
    return GPT(VOCABULARY, context=LENGTH, width=8, heads=2, depth=2, tied=False)


def a_batch() -> tuple[Tensor, Tensor]:
    return torch.randint(VOCABULARY, (4, LENGTH)), torch.randint(VOCABULARY, (4, LENGTH))


def on_one_gpu(gpt: GPT, tokens: Tensor, targets: Tensor, steps: int) -> GPT:
    model = copy.deepcopy(gpt)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        next_token_loss(model(tokens), targets).backward()
        optimizer.step()
    return model


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list:
    """The models that the methods have made."""
    models: list = []

    def keeping(make: Callable) -> Callable:
        def make_and_keep(*arguments, **options):
            models.append(make(*arguments, **options))
            return models[-1]

        return make_and_keep

    for attribute in {attribute for attribute, _ in MODELS.values()}:
        monkeypatch.setattr(methods, attribute, keeping(getattr(methods, attribute)))
    return models


@pytest.fixture(params=["AdamW", "SGD"])
def optimizer(request, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW, as it is, and SGD in its place: to AdamW twice the gradient is the same."""
    if request.param == "SGD":
        sgd = partial(torch.optim.SGD, lr=0.1)
        monkeypatch.setattr(torch.optim, "AdamW", sgd)
        monkeypatch.setattr(methods, "adamw", sgd)


@each_method
@pytest.mark.parametrize("accumulations", [1, 2])
def test_two_steps_are_those_of_one_gpu(vgpus, optimizer, made, name: str, accumulations) -> None:
    gpt, (tokens, targets) = a_gpt(), a_batch()
    targets[0, 1:] = -100  # padding: microbatches count unequally
    batch = tokens, targets
    step = METHODS[name](gpt, vgpus[:2], *batch, accumulations)
    first = sum(loss.item() for loss in step())
    assert first == pytest.approx(next_token_loss(gpt(tokens), targets).item(), abs=1e-6)
    step()
    _, to_model = MODELS[name]
    ours, expected = to_model(made[0], gpt).cpu(), on_one_gpu(gpt, *batch, steps=2)
    for parameter, wanted in zip(ours.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted, rtol=0, atol=2e-6)
    assert largest_difference(expected, gpt) > 1e-3


@each_method
@pytest.mark.parametrize("accumulations", [1, 2])
def test_a_batch_of_nothing_but_padding_has_no_loss(vgpus, name: str, accumulations: int) -> None:
    tokens, targets = a_batch()
    step = METHODS[name](a_gpt(), vgpus[:2], tokens, targets.fill_(-100), accumulations)
    assert {loss.item() for loss in step()} == {0.0}


@each_method
def test_the_model_stays_as_it_is(vgpus, name: str) -> None:
    gpt, batch = a_gpt(), a_batch()
    before = copy.deepcopy(gpt)
    METHODS[name](gpt, vgpus[:2], *batch, 1)()
    assert largest_difference(gpt, before) == 0
    assert all(parameter.grad is None for parameter in gpt.parameters())
    assert all(parameter.device.type == "cpu" for parameter in gpt.parameters())


# What is measured.


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(("name", "times"), [("data", 2), ("ZeRO 1", 2), ("ZeRO 3", 3)])
def test_bytes_sent_are_those_of_rings(vgpus, name: str, times: int, count: int) -> None:
    gpt, gpus = a_gpt(), vgpus[:count]
    nbytes = 4 * parameter_count(gpt)
    sent = measure(METHODS[name](gpt, gpus, *a_batch(), 1), gpus).sent
    assert sent * count == times * (count - 1) * nbytes


LESSON = "09_data_against_model_parallelism.ipynb"


@pytest.mark.parametrize("count", [2, 4])
def test_the_formulas_of_lesson_09_are_what_is_sent(vgpus, count: int) -> None:
    nb = nbformat.read(NOTEBOOKS / LESSON, as_version=4)
    (source,) = (cell.source for cell in nb.cells if cell["id"] == "formula")
    gpt, gpus = GPT(VOCABULARY, context=8, width=8, heads=4, depth=4, tied=False), vgpus[:count]
    lesson = {"P": parameter_count(gpt), "L": 4, "D": 8}
    exec(source[: source.index("grows = ")], lesson)
    wanted = lesson["formulas"](count, 4 * LENGTH, pieces=1)
    if count == 2:
        wanted["pipeline"] /= 2  # a stage at the edge sends one way
    for name, nbytes in wanted.items():
        sent = measure(METHODS[name](gpt, gpus, *a_batch(), 1), gpus).sent
        # What tensor parallelism sends beside, inside the loss and for norms, weighs much here.
        assert sent == pytest.approx(nbytes, rel=0.4 if name == "tensor" else 0.001), name


def test_copies_from_and_to_the_host_are_not_sent(vgpus) -> None:
    def step() -> None:
        on_first = torch.zeros(100).to(vgpus[0])
        on_first.to(vgpus[1])
        on_first.cpu()

    assert measure(step, vgpus).sent == 400


def test_the_device_that_sends_most_counts(vgpus) -> None:
    def step() -> None:
        torch.zeros(3, device=vgpus[0]).to(vgpus[1])
        for target in (vgpus[0], vgpus[2]):
            torch.zeros(2, device=vgpus[1]).to(target)

    assert measure(step, vgpus).sent == 16


def test_a_step_is_measured_once_with_what_it_leaves() -> None:
    kept: list[Tensor] = []

    def step() -> None:
        torch.zeros(500, device=gpus[1])
        kept.append(torch.zeros(250, device=gpus[1]))

    with fresh_devices(4, SPEC) as gpus:
        measured = measure(step, gpus)
    # Two writes, the second of which is enqueued while the first is under way.
    expected = SPEC.launch_overhead + 3000 / SPEC.memory_bandwidth
    # The other three do nothing; this one nothing until it is told what.
    idle = (3 + SPEC.launch_overhead / expected) / 4
    assert measured == Measurement(seconds(expected), 2000, 1000, 0, 0.0, pytest.approx(idle))
    assert len(kept) == 1


@each_method
def test_the_first_step_is_like_the_second(vgpus, name: str) -> None:
    gpus = vgpus[:2]
    step = METHODS[name](a_gpt(), gpus, *a_batch(), 1)
    first, second = measure(step, gpus), measure(step, gpus)
    assert first.seconds == pytest.approx(second.seconds)
    assert (first.sent, first.peak) == (second.sent, pytest.approx(second.peak, abs=100))
    assert first.between_steps == pytest.approx(second.between_steps, abs=100)


def test_data_parallelism_holds_parameters_gradients_and_moments_between_steps() -> None:
    gpt, (tokens, targets) = a_gpt(), a_batch()
    with fresh_devices(2) as gpus:
        measured = measure(METHODS["data"](gpt, gpus, tokens, targets, 1), gpus)
    assert measured.between_steps == 4 * 4 * parameter_count(gpt) + tokens.nbytes
    assert measured.peak > measured.between_steps


@each_method
def test_nothing_comes_from_the_host_in_a_step(vgpus, name: str) -> None:
    step = METHODS[name](a_gpt(), vgpus[:2], *a_batch(), 2)
    with trace(strict=True) as t:
        step()
    assert not any("host" in route for route in t.bytes_moved)


def test_copies_beside_computing_are_not_exposed(gpus) -> None:
    def step() -> None:
        torch.zeros(10**6, device=gpus[0]).to(gpus[1])

    measured = measure(step, gpus)
    write, copy = 4e6 / SPEC.memory_bandwidth, 4e6 / SPEC.link_bandwidth
    assert measured.exposed == pytest.approx(2 / 4 * copy / measured.seconds, rel=0.01)
    busy = (write + 2 * copy) / 4 / measured.seconds
    assert measured.idle == pytest.approx(1 - busy, rel=0.01)


# A comparison.


def test_an_unknown_method_is_named(vgpus) -> None:
    with pytest.raises(ValueError, match="there is no method 'sequence': there are"):
        compare(a_gpt(), 4, LENGTH, 2, SPEC, ["sequence"])


@pytest.mark.parametrize("limit", [0, 1, 4, 6, 7, 20])
def test_the_largest_that_fits_is_found(limit: int) -> None:
    sizes = [1, 3, 4, 7, 11]
    expected = max((size for size in sizes if size <= limit), default=None)
    assert largest(lambda size: size <= limit, sizes) == expected


def test_what_does_not_fit_has_no_measurement(vgpus) -> None:
    gpt, names = a_gpt(), ["ZeRO 3", "data"]
    roomy = compare(gpt, 4, LENGTH, 2, SPEC, names)
    assert list(roomy) == names
    assert roomy["ZeRO 3"].peak < roomy["data"].peak
    tight = SPEC.with_(memory=roomy["data"].peak - 1)
    results = compare(gpt, 4, LENGTH, 2, tight, names)
    assert results == roomy | {"data": None}


def test_a_comparison_leaves_the_program_as_it_was(vgpus) -> None:
    gpt, here = a_gpt(), torch.ones(1000, device=vgpus[0])
    here.add_(1)

    def state() -> list:
        numbers = [generator.get_state().tolist() for generator in machine.generators]
        memories = [(memory_in_use(gpu), peak_memory(gpu)) for gpu in vgpus]
        host = random.getstate(), np.random.get_state()[1].tolist()
        return [host_seconds(), machine.device_count, machine.spec, memories, numbers, host]

    before, dice = state(), torch.get_rng_state()
    results = compare(gpt, 4, LENGTH, 2, SPEC.with_(memory=20_000), list(METHODS))
    assert None in results.values()
    assert state() == before
    assert torch.equal(torch.get_rng_state(), dice)
    assert torch.equal(here.cpu(), torch.full((1000,), 2.0))
