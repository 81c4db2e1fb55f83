"""The doctor finds planted mistakes by the instrument that shows them, and passes what is right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

import course_lib
from course_lib import doctor
from course_lib.doctor import instruments as readers
from course_lib.models import GPT, MLP, next_token_loss
from course_lib.parallel.collectives import all_reduce, ring_all_reduce
from course_lib.parallel.data_parallel import replicate, split_batch, train_step
from course_lib.parallel.transfers import SideStreams

Reduce = Callable[[list[nn.Module]], None]
N = 3


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return MLP(8, 16, 4)


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(N * 8, 8, generator=generator),
             torch.randint(0, 4, (N * 8,), generator=generator)) for _ in range(count)]  # fmt: skip


def sgd(parameters) -> Optimizer:
    return SGD(parameters, lr=0.1)


def prepare_with(reduce: Reduce, make_optimizer=sgd, update: slice = slice(None)):
    """Data parallelism with a step that each test spoils in its own way."""

    def prepare(model, gpus):
        replicas = replicate(model, gpus)
        optimizers = [make_optimizer(replica.parameters()) for replica in replicas]

        def step(x: Tensor, y: Tensor) -> None:
            shards = zip(replicas, split_batch(x, gpus), split_batch(y, gpus), strict=True)
            for replica, x_part, y_part in shards:
                replica.zero_grad()
                F.cross_entropy(replica(x_part), y_part).backward()
            reduce(replicas)
            for optimizer in optimizers[update]:
                optimizer.step()

        return replicas, step

    return prepare


def the_courses_own(make_optimizer, loss_function):
    """Data parallelism as ``train_step`` of lesson 02 does it."""

    def prepare(model, gpus):
        replicas = replicate(model, gpus)
        optimizers = [make_optimizer(replica.parameters()) for replica in replicas]

        def step(x: Tensor, y: Tensor) -> None:
            xs, ys = split_batch(x, gpus), split_batch(y, gpus)
            train_step(replicas, optimizers, xs, ys, loss_function)

        return replicas, step

    return prepare


def gradients_of(replicas: list[nn.Module]) -> list[list[Tensor]]:
    return [
        [p.grad for p in copies] for copies in zip(*(r.parameters() for r in replicas), strict=True)
    ]


def mean(replicas: list[nn.Module]) -> None:
    for copies in gradients_of(replicas):
        all_reduce(copies)
        for gradient in copies:
            gradient /= len(replicas)


def examine(prepare, model=None, make_optimizer=sgd) -> doctor.Report:
    gpus = course_lib.devices(N)
    model = model or a_model()
    return doctor.examine(model, prepare, batches(), F.cross_entropy, make_optimizer, gpus)


def instruments(report: doctor.Report) -> list[str]:
    return [finding.instrument for finding in report.findings]


@pytest.mark.parametrize("make_optimizer", [sgd, AdamW])
def test_what_is_right_is_healthy(make_optimizer):
    report = examine(prepare_with(mean, make_optimizer), make_optimizer=make_optimizer)
    assert report.is_healthy and report.steps == 2
    assert str(report).startswith("2 step(s): the same training as on one device")


def test_a_gpt_that_adamw_trains_is_healthy_at_a_tenth_of_the_tolerance(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(readers, "TOLERANCE", readers.TOLERANCE / 10)
    torch.manual_seed(0)
    gpt = GPT(65, context=16, width=32, heads=4, depth=2, tied=False)
    passages = [torch.randint(0, 65, (9, 16)) for _ in range(6)]

    pairs = list(zip(passages[::2], passages[1::2], strict=True))
    gpus = course_lib.devices(N)
    assert doctor.examine(
        gpt, the_courses_own(AdamW, next_token_loss), pairs, next_token_loss, AdamW, gpus
    ).is_healthy


class AttentionOfItsOwn(nn.Module):
    """Keys have a bias, which no score depends on: its gradient is what rounding leaves of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        return self.head(h + F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))


def examine_attention(prepare) -> doctor.Report:
    torch.manual_seed(0)
    model, passages = AttentionOfItsOwn(), [torch.randint(12, (9, 8)) for _ in range(8)]
    pairs = list(zip(passages[::2], passages[1::2], strict=True))
    gpus = course_lib.devices(N)
    return doctor.examine(model, prepare, pairs, next_token_loss, AdamW, gpus)


def test_what_adamw_makes_of_rounding_is_no_finding(monkeypatch: pytest.MonkeyPatch):
    right = the_courses_own(AdamW, next_token_loss)
    assert examine_attention(right).is_healthy
    monkeypatch.setattr(readers, "NOTHING", 0.0)  # the test has something to pass over
    (finding,) = examine_attention(right).findings
    assert "1 of 9 parameters are not one device's, the first of them k.bias" in finding.reading


def test_a_bias_of_keys_with_a_gradient_of_its_own_is_a_finding():
    def prepare(model, gpus):
        replicas, step = the_courses_own(AdamW, next_token_loss)(model, gpus)
        for replica in replicas:
            replica.k.bias.register_hook(lambda gradient: gradient + 1)
        return replicas, step

    assert "k.bias" in examine_attention(prepare).findings[0].reading


class DropoutByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), 0.5, self.training)


@pytest.mark.parametrize(
    "make_model",
    [DropoutByFunction, lambda: nn.Sequential(nn.AlphaDropout(0.2), nn.Linear(8, 4))],
    ids=["by function", "alpha dropout"],
)
def test_where_one_device_throws_dice_it_counts_and_is_not_compared(make_model):
    report = examine(the_courses_own(sgd, F.cross_entropy), make_model())
    assert str(report) == "2 step(s): nothing found, and no comparison with one device."
    assert report.run.now.flops > 0


def test_one_device_leaves_the_dice_as_they_were():
    torch.manual_seed(3)
    right = torch.rand(1)
    model = DropoutByFunction()
    torch.manual_seed(3)
    examine(the_courses_own(sgd, F.cross_entropy), model)
    assert torch.equal(torch.rand(1), right)


def test_a_step_that_changes_its_batch_does_not_change_one_devices():
    def prepare(model, gpus):
        replicas, step = the_courses_own(sgd, F.cross_entropy)(model, gpus)
        return replicas, lambda x, y: step(x, y.zero_())

    assert instruments(examine(prepare))[0] == "against one device"


def test_a_forgotten_weight_decay_is_less_than_the_tolerance():
    """A blind spot that the doctor's docstring names."""
    without = the_courses_own(lambda parameters: AdamW(parameters, weight_decay=0), F.cross_entropy)
    assert examine(without, make_optimizer=AdamW).is_healthy


def test_a_parameter_that_moves_and_should_not_is_named():
    model = a_model()
    model[0].requires_grad_(False)

    def prepare(model, gpus):
        return the_courses_own(sgd, F.cross_entropy)(model.requires_grad_(True), gpus)

    assert "0.weight: it has moved, and the other has not" in str(examine(prepare, model))


def test_the_courses_own_step_is_healthy():
    assert examine(the_courses_own(sgd, F.cross_entropy)).is_healthy


def test_replicas_that_train_by_themselves_are_seen_by_four_instruments():
    report = examine(prepare_with(lambda replicas: None))
    assert instruments(report) == [
        "replica against replica",
        "against one device",
        "gradient norm",
        "bytes",
    ]
    assert report.findings[0].step == 1


def test_a_sum_in_place_of_a_mean_leaves_replicas_alike_and_is_seen_beside_one_device():
    def sums(replicas):
        for copies in gradients_of(replicas):
            all_reduce(copies)

    report = examine(prepare_with(sums))
    assert instruments(report) == ["against one device", "gradient norm"]
    assert "off by 2 of the way" in report.findings[0].reading  # three times as far
    assert report.findings[1].reading.endswith(": 3x")


def test_a_forgotten_parameter_is_named():
    def all_but_the_last(replicas):
        for copies in gradients_of(replicas)[:-1]:
            all_reduce(copies)
            for gradient in copies:
                gradient /= N

    report = examine(prepare_with(all_but_the_last))
    last = list(dict(a_model().named_parameters()))[-1]
    assert report.findings[0].reading.startswith(f"{last} of rank 1 is not rank 0's")


def test_a_rank_that_is_not_updated_is_named():
    report = examine(prepare_with(mean, update=slice(2)))
    first, second = report.findings
    assert first.step == 1 and "of rank 2 is not rank 0's" in first.reading
    # From then on its gradients are those of old parameters, and the mean has them in it.
    assert (second.step, second.instrument) == (2, "against one device")


def test_buffers_are_compared_as_well():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16, affine=False), nn.Linear(16, 4))
    report = examine(prepare_with(mean), model)
    (finding,) = (each for each in report.findings if each.instrument == "buffers")
    assert finding.reading.startswith("1.running_mean of rank 1 is not rank 0's")


def test_a_missing_wait_is_named():
    def without_join(replicas):
        side = SideStreams([next(replica.parameters()).device for replica in replicas])
        for copies in gradients_of(replicas):
            with side.beside(copies):
                ring_all_reduce(copies)
                for gradient in copies:
                    gradient /= N

    report = examine(prepare_with(without_join))
    assert instruments(report) == ["waits"]


def test_nan_is_named():
    def spoil(replicas):
        mean(replicas)
        next(replicas[1].parameters()).grad.fill_(float("nan"))

    assert "not a number" in examine(prepare_with(spoil)).findings[0].reading


def returning(what: Callable[[list[float]], object]):
    """A step that is right, and returns ``what`` of its ranks' parts of the loss."""

    def prepare(model, gpus):
        replicas = replicate(model, gpus)
        optimizers = [sgd(replica.parameters()) for replica in replicas]

        def step(x: Tensor, y: Tensor) -> object:
            xs, ys = split_batch(x, gpus), split_batch(y, gpus)
            losses = train_step(replicas, optimizers, xs, ys, F.cross_entropy)
            return what([loss.item() for loss in losses])

        return replicas, step

    return prepare


@pytest.mark.parametrize("what", [sum, list, tuple, lambda losses: torch.tensor(sum(losses))])
def test_a_loss_that_is_one_devices_is_healthy(what):
    report = examine(returning(what))
    assert report.is_healthy and len(report.losses) == 2


def test_a_loss_that_one_device_does_not_have_is_a_finding():
    (finding,) = examine(returning(lambda losses: N * sum(losses))).findings
    assert (finding.step, finding.instrument) == (1, "against one device")
    assert finding.reading.startswith("the step returned a loss of ")
    assert finding.reading.endswith(": 3x")


def test_the_first_step_with_another_loss_is_named():
    steps = iter((1.0, 1.1))
    (finding,) = examine(returning(lambda losses: next(steps) * sum(losses))).findings
    assert finding.step == 2 and finding.reading.endswith(": 1.1x")


def test_the_rank_whose_loss_is_no_number_is_named():
    (finding,) = examine(returning(lambda losses: [*losses[:2], float("nan")])).findings
    assert finding.reading.startswith("the loss of rank 2 is nan, and one device's ")


def test_what_a_step_returns_that_is_no_loss_is_passed_over():
    assert examine(returning(lambda losses: ("done", sum(losses)))).is_healthy


def test_bad_input_is_refused_in_one_line():
    gpus = course_lib.devices(N)
    with pytest.raises(ValueError, match="there are no batches to train on"):
        doctor.examine(a_model(), prepare_with(mean), [], F.cross_entropy, sgd, gpus)
    with pytest.raises(ValueError, match="returns the replicas of that model, and a step"):
        doctor.examine(a_model(), lambda m, g: ([], print), batches(), F.cross_entropy, sgd, gpus)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"prepare": lambda m, g: None}, TypeError, r"a function step\(x, y\), and not None"),
        ({"prepare": lambda m, g: [m]}, TypeError, "and not a list of "),
        ({"prepare": lambda m, g: (m, print)}, TypeError, "the replicas of that model, a list"),
        ({"prepare": lambda m, g: ([m], None)}, TypeError, r"a tuple of \(list, NoneType\)"),
        ({"batches": batches()[0]}, TypeError, r"pairs of tensors \(x, y\), .* not a Tensor"),
        ({"batches": [([1.0], [2])]}, TypeError, r"and not a tuple of \(list, list\)"),
        (
            {"make_optimizer": torch.optim.SGD(a_model().parameters(), 0.1)},
            TypeError,
            "SGD is none",
        ),
        (
            {"batches": lambda gpu: [(x.to(gpu), y) for x, y in batches()]},
            ValueError,
            "on the host",
        ),
        ({"gpus": 4}, TypeError, "takes a list of devices, .* and not 4"),
        ({"model": lambda gpu: a_model().to(gpu)}, ValueError, "the model is on vgpu:0"),
    ],
)
def test_what_cannot_be_examined_is_refused_in_one_line(changed, error, words):
    gpus = course_lib.devices(N)
    given = {
        "model": a_model(),
        "prepare": prepare_with(mean),
        "batches": batches(),
        "loss_function": F.cross_entropy,
        "make_optimizer": sgd,
        "gpus": gpus,
    }
    for name, value in changed.items():
        is_on_gpu = name in ("batches", "model") and callable(value)
        given[name] = value(gpus[0]) if is_on_gpu else value
    with pytest.raises(error, match=words) as caught:
        doctor.examine(**given)
    assert "\n" not in str(caught.value)
