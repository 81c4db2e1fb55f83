"""What a lesson derives and what course_lib keeps of it give the same parameters."""

from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from torch.nn import functional as F

from course_lib import collectives, data_parallel, devices
from course_lib.compare import largest_difference
from course_lib.layer_parallel import LayerParallel, balanced_cuts
from course_lib.models import GPT, MLP, next_token_loss
from notebook_tools import NOTEBOOKS


def definitions(notebook: str, *cell_ids: str) -> SimpleNamespace:
    """What the named cells of a lesson define, after its set-up cell."""
    nb = nbformat.read(Path(NOTEBOOKS) / notebook, as_version=4)
    source = {cell["id"]: cell.source for cell in nb.cells}
    names: dict = {}
    for cell_id in ("setup", *cell_ids):
        exec(source[cell_id], names)
    return SimpleNamespace(**names)


@pytest.fixture(scope="module")
def lesson_02() -> SimpleNamespace:
    return definitions(
        "02_data_parallelism.ipynb",
        "data",
        "split",
        "replicate",
        "all-reduce",
        "together-backward",
        "together-reduce",
    )


@pytest.fixture(scope="module")
def lesson_04() -> SimpleNamespace:
    return definitions("04_model_parallelism.ipynb", "general")


def train(method, model, gpus, batches, loss_function) -> list:
    """Three steps of data-parallel training with a lesson's functions or a module's."""
    replicas = method.replicate(model, gpus)
    optimizers = [torch.optim.AdamW(r.parameters(), lr=1e-3) for r in replicas]
    for x, y in batches:
        for optimizer in optimizers:
            optimizer.zero_grad()
        xs, ys = method.split(x, gpus), method.split(y, gpus)
        method.backward_on_shards(replicas, xs, ys, loss_function, len(x))
        method.all_reduce_gradients(replicas)
        for optimizer in optimizers:
            optimizer.step()
    return replicas


MODULE_02 = SimpleNamespace(
    replicate=data_parallel.replicate,
    split=data_parallel.split_batch,
    backward_on_shards=data_parallel.backward_on_shards,
    all_reduce_gradients=data_parallel.all_reduce_gradients,
)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_lesson_02_and_data_parallel_train_to_the_same_bits(lesson_02, count: int) -> None:
    gpus = devices(count)
    torch.manual_seed(0)
    model = MLP(64, 32, 10)
    batches = [(torch.randn(n, 64), torch.randint(10, (n,))) for n in (24, 24, 7)]
    lesson = train(lesson_02, model, gpus, batches, F.cross_entropy)
    module = train(MODULE_02, model, gpus, batches, F.cross_entropy)
    assert largest_difference(lesson[-1], module[-1]) == 0


def test_lesson_02_and_data_parallel_agree_on_a_tied_gpt(lesson_02) -> None:
    gpus = devices(3)
    torch.manual_seed(0)
    model = GPT(20, context=8, width=16, heads=2, depth=1, tied=True)
    batches = [(torch.randint(20, (5, 8)), torch.randint(20, (5, 8))) for _ in range(3)]
    lesson = train(lesson_02, model, gpus, batches, next_token_loss)
    module = train(MODULE_02, model, gpus, batches, next_token_loss)
    assert largest_difference(lesson[0], module[0]) == 0


def test_lesson_02_and_collectives_reduce_to_the_same_bits(lesson_02) -> None:
    gpus = devices(4)
    torch.manual_seed(0)
    originals = [torch.randn(33) for _ in gpus]
    ours = [tensor.to(gpu) for tensor, gpu in zip(originals, gpus, strict=True)]
    theirs = [tensor.to(gpu) for tensor, gpu in zip(originals, gpus, strict=True)]
    lesson_02.all_reduce(ours)
    collectives.all_reduce(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.cpu(), other.cpu())


@pytest.mark.parametrize("count", [1, 2, 4])
def test_lesson_04_and_layer_parallel_train_to_the_same_bits(lesson_04, count: int) -> None:
    gpus = devices(count)
    cuts = balanced_cuts([1] * 7, count)
    x, y = torch.randn(16, 64), torch.randint(10, (16,))
    trained = []
    for build in (lambda m: lesson_04.LayerParallel(list(m), gpus, cuts),
                  lambda m: LayerParallel(m, gpus, cuts)):  # fmt: skip
        torch.manual_seed(0)
        model = build(MLP(64, 32, 32, 32, 10))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y.to(gpus[-1])).backward()
            optimizer.step()
        trained.append(model)
    assert largest_difference(*trained) == 0
