"""Ranks in processes: the same function gives the same results as on virtual GPUs."""

from __future__ import annotations

import linecache
import os
import random
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from course_lib import ranks
from course_lib.models import MLP
from process_leftovers import nothing_left


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with nothing_left(tmp_path, monkeypatch):
        yield


def test_the_same_function_returns_and_prints_the_same(vgpus, capsys):
    offset = 10  # of the caller, as is the function itself

    def work() -> tuple[int, list[float], str]:
        dist.init_process_group()
        rank = dist.get_rank()
        x = torch.full((3,), float(rank + offset), device=ranks.device())
        dist.all_reduce(x)
        print("rank", rank, "of", dist.get_world_size())
        print("warning", file=sys.stderr)
        dist.destroy_process_group()
        return rank, x.tolist(), os.environ["WORLD_SIZE"]

    virtual = ranks.run(work, vgpus[:3])
    printed = capsys.readouterr()
    assert printed.out.splitlines()[2] == "[rank 2] rank 2 of 3"
    assert ranks.run(work, processes=3) == virtual
    assert capsys.readouterr() == printed


def test_data_parallel_training_gives_the_same_parameters(vgpus):
    def train() -> list[torch.Tensor]:
        dist.init_process_group()
        device = ranks.device()
        torch.manual_seed(0)
        model = DistributedDataParallel(MLP(6, 8, 4).to(device))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
        for _ in range(3):
            optimizer.zero_grad()
            model(x.to(device)).square().mean().backward()
            optimizer.step()
        return [parameter.detach().cpu() for parameter in model.parameters()]

    virtual, real = ranks.run(train, vgpus[:2]), ranks.run(train, processes=2)
    for first, *others in zip(*virtual, *real, strict=True):
        assert all(torch.equal(first, other) for other in others)  # a sum of two has one order


def test_arguments_are_handed_to_all():
    assert ranks.run(lambda a, b: a + b, None, 1, 2, processes=2) == [3, 3]


def test_a_rank_has_the_random_numbers_and_the_settings_of_the_caller(monkeypatch):
    def draw() -> tuple[float, float, float, torch.dtype, str]:
        numbers = torch.rand(1).item(), random.random(), float(np.random.rand())
        return *numbers, torch.ones(1).dtype, os.environ["MINE"]

    monkeypatch.setenv("MINE", "yes")
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    drawn = ranks.run(draw, processes=2)
    assert drawn == [draw(), draw()][:1] * 2
    torch.set_default_dtype(torch.float32)


def test_groups_can_be_made_anew():
    def twice() -> list[float]:
        sums = []
        for number in range(2):
            dist.init_process_group("gloo")
            x = torch.tensor([float(number + dist.get_rank())])
            dist.all_reduce(x)
            sums.append(x.item())
            dist.destroy_process_group()
        return sums

    assert ranks.run(twice, processes=2) == [[1.0, 3.0]] * 2


CELL = """
class Point:
    def __init__(self, x):
        self.x = x

def make():
    return Point(scale * int(os.environ["RANK"]))

def fail():
    point = make()
    return 1 / point.x
"""


@pytest.fixture
def cell() -> Iterator[dict[str, Any]]:
    """The names of a notebook after this cell was run."""
    path = "/tmp/ipykernel_1/2.py"
    linecache.cache[path] = (len(CELL), None, CELL.splitlines(keepends=True), path)
    names: dict[str, Any] = {"__name__": "__main__", "os": os, "scale": 3}
    exec(compile(CELL, path, "exec"), names)
    yield names
    del linecache.cache[path]


def test_a_function_of_a_cell_returns_objects_of_the_cell_s_class(cell):
    points = ranks.run(cell["make"], processes=2)
    assert [type(point) is cell["Point"] for point in points] == [True, True]
    assert [point.x for point in points] == [0, 3]


def test_an_error_in_a_cell_ends_in_the_line_of_the_cell(cell):
    with pytest.raises(ZeroDivisionError) as caught:
        ranks.run(cell["fail"], processes=2)
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (last.name, last.line) == ("fail", "return 1 / point.x")
    assert "~~^~~" in "".join(traceback.format_exception(caught.value))  # which part of the line
    assert caught.value.__notes__[0] == "(rank 0 of 2 failed first)"


def test_callers_at_once_do_not_meet():
    def total(start: float) -> float:
        dist.init_process_group()
        x = torch.tensor([start + dist.get_rank()])
        dist.all_reduce(x)
        return x.item()

    found: dict[int, list[float]] = {}

    def call(number: int) -> None:
        found[number] = ranks.run(total, None, float(number), processes=2)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == {number: [2.0 * number + 1] * 2 for number in range(4)}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, ValueError, r"ranks\.run\(function, gpus\) or"),
        ({"processes": 0}, ValueError, "a whole number above zero: 0"),
        ({"processes": 2, "timeout": 0}, ValueError, "a number of seconds above zero"),
        ({"processes": 2, "timeout": "5"}, ValueError, "a number of seconds above zero: '5'"),
        ({"gpus": ["cuda:99"]}, RuntimeError, "cuda:99 is no GPU of this machine"),
        ({"gpus": ["vgpu:0"], "timeout": 1}, ValueError, "a timeout is for processes"),
    ],
)
def test_what_cannot_be_run_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        ranks.run(lambda: None, **options)


def test_what_cannot_be_sent_is_said(vgpus):
    lock = threading.Lock()
    with pytest.raises(TypeError, match=r"with the variables that it uses.*_thread\.lock"):
        ranks.run(lambda: lock, processes=2)
    with pytest.raises(TypeError, match=r"what a rank returns is sent .* a lock cannot be sent"):
        ranks.run(threading.Lock, processes=2)
    with pytest.raises(TypeError, match="a tensor on a virtual GPU"):
        ranks.run(lambda: vgpus[0], processes=2)


def test_a_run_inside_of_a_rank_is_refused(vgpus):
    def nested() -> None:
        ranks.run(lambda: None, processes=2)

    for where in ({"gpus": vgpus[:2]}, {"processes": 2}):
        with pytest.raises(RuntimeError, match="cannot be called inside of a rank"):
            ranks.run(nested, **where)


def test_a_device_is_that_of_a_rank(vgpus):
    assert ranks.run(ranks.device, vgpus) == vgpus
    assert ranks.run(lambda: ranks.device(), processes=2) == [torch.device("cpu")] * 2
    with pytest.raises(RuntimeError, match=r"call it inside of ranks\.run"):
        ranks.device()
