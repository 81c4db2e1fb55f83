"""What a lesson derives and what course_lib keeps of it give the same parameters."""

import copy
from collections.abc import Iterator
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
import torch.distributed as dist
from matplotlib import pyplot as plt
from torch.nn import functional as F

from course_lib import devices, trace
from course_lib.hardware import fresh_devices
from course_lib.models import GPT, MLP, next_token_loss
from course_lib.parallel import (
    all_reduce_costs,
    collectives,
    compressed_sums,
    data_parallel,
    gradient_buckets,
    gradient_noise,
    node_collectives,
    regions,
    sampling,
    schedule_rules,
    schedules,
    vocabulary,
)
from course_lib.parallel.attention_ring import ring_attention
from course_lib.parallel.dropless import DroplessExpertParallel
from course_lib.parallel.expert_parallel import ExpertParallel
from course_lib.parallel.experts import MixtureOfExperts
from course_lib.parallel.layer_parallel import LayerParallel, balanced_cuts
from course_lib.parallel.local_training import LocalTraining, diloco
from course_lib.parallel.overlapped_training import OverlappedTraining
from course_lib.parallel.pipeline import Pipeline
from course_lib.parallel.proof import largest_difference
from course_lib.parallel.sharded_data_parallel import Sharded
from course_lib.parallel.tensor_parallel import ParallelMLP
from course_lib.ranks.by_hand import data_parallel as by_hand_data_parallel
from course_lib.ranks.by_hand import messages
from course_lib.ranks.by_hand import pipeline as by_hand_pipeline
from course_lib.ranks.by_hand import tensor_parallel as by_hand_tensor_parallel
from course_lib.sweeps import training
from notebook_tools import NOTEBOOKS

namespaces: list[dict] = []


@pytest.fixture(autouse=True)
def _empty_namespaces() -> Iterator[None]:
    """A lesson's hooks hold on to its names, and its tensors to the hooks: Python cannot tell."""
    yield
    for names in namespaces:
        names.clear()
    namespaces.clear()


@cache
def sources(notebook: str) -> dict[str, str]:
    """The cells of a lesson by their ids."""
    nb = nbformat.read(Path(NOTEBOOKS) / notebook, as_version=4)
    return {cell["id"]: cell.source for cell in nb.cells}


def definitions(notebook: str, *cell_ids: str) -> SimpleNamespace:
    """What the named cells of a lesson define, after its set-up cell.

    For one test only: a namespace holds tensors, which are gone with the test's machine.
    """
    source = sources(notebook)
    names: dict = {}
    namespaces.append(names)
    with plt.rc_context():  # the lesson's look stays in the lesson
        for cell_id in ("setup", *cell_ids):
            exec(source[cell_id], names)
    return SimpleNamespace(**names)


@pytest.fixture
def lesson_02() -> SimpleNamespace:
    return definitions(
        "02_data_parallelism.ipynb",
        "data",
        "split",
        "replicate",
        "all-reduce",
        "together-shares",
        "together-backward",
        "together-reduce",
    )


@pytest.fixture
def lesson_03() -> SimpleNamespace:
    cells = ("tree", "ring", "step", "order", "bucket-groups", "bucket-class")
    return definitions("03_all_reduce.ipynb", *cells)


@pytest.fixture
def lesson_04() -> SimpleNamespace:
    return definitions("04_model_parallelism.ipynb", "general")


@pytest.fixture
def lesson_05() -> SimpleNamespace:
    cells = ("guess-idle", "model", "gpipe", "one-f-one-b", "held", "walk", "stage", "send", "run")
    return definitions("05_pipeline_parallelism.ipynb", *cells)


@pytest.fixture
def lesson_06() -> SimpleNamespace:
    return definitions("06_tensor_parallelism.ipynb", "conjugates", "vocabulary")


def train(method, shares_of, model, gpus, batches, loss_function) -> list:
    """Three steps of data-parallel training with a lesson's functions or a module's."""
    replicas = method.replicate(model, gpus)
    optimizers = [torch.optim.AdamW(r.parameters(), lr=1e-3) for r in replicas]
    for x, y in batches:
        for optimizer in optimizers:
            optimizer.zero_grad()
        xs, ys = method.split(x, gpus), method.split(y, gpus)
        shares = shares_of(y, len(gpus), (y != -100).sum().item())
        method.backward_on_shards(replicas, xs, ys, loss_function, shares)
        method.all_reduce_gradients(replicas)
        for optimizer in optimizers:
            optimizer.step()
    return replicas


MODULE_02 = SimpleNamespace(
    replicate=data_parallel.replicate,
    split=data_parallel.split_batch,
    # The lesson is told what to weight each shard with; the module counts targets itself.
    backward_on_shards=lambda *arguments: data_parallel.backward_on_shards(*arguments[:-1]),
    all_reduce_gradients=data_parallel.all_reduce_gradients,
)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_lesson_02_and_data_parallel_train_to_the_same_bits(lesson_02, count: int) -> None:
    gpus = devices(count)
    torch.manual_seed(0)
    model = MLP(64, 32, 10)
    batches = [(torch.randn(n, 64), torch.randint(10, (n,))) for n in (24, 24, 7)]
    lesson = train(lesson_02, lesson_02.shares_of, model, gpus, batches, F.cross_entropy)
    module = train(MODULE_02, lesson_02.shares_of, model, gpus, batches, F.cross_entropy)
    assert largest_difference(lesson[-1], module[-1]) == 0


@pytest.mark.parametrize("padded", [0, 5])
def test_lesson_02_and_data_parallel_agree_on_a_tied_gpt(lesson_02, padded: int) -> None:
    gpus = devices(3)
    torch.manual_seed(0)
    model = GPT(20, context=8, width=16, heads=2, depth=1, tied=True)
    batches = [(torch.randint(20, (5, 8)), torch.randint(20, (5, 8))) for _ in range(3)]
    for _, y in batches:
        y[:2, 8 - padded :] = -100  # a shard with less to count
    lesson = train(lesson_02, lesson_02.shares_of, model, gpus, batches, next_token_loss)
    module = train(MODULE_02, lesson_02.shares_of, model, gpus, batches, next_token_loss)
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


@pytest.mark.parametrize("name", ["tree_all_reduce", "ring_all_reduce"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_lesson_03_and_collectives_reduce_to_the_same_bits(lesson_03, name, count: int) -> None:
    gpus = devices(count)
    torch.manual_seed(0)
    for numel in (33, 2):
        originals = [torch.randn(numel) for _ in gpus]
        ours = [tensor.to(gpu) for tensor, gpu in zip(originals, gpus, strict=True)]
        theirs = [tensor.to(gpu) for tensor, gpu in zip(originals, gpus, strict=True)]
        getattr(lesson_03, name)(ours)
        getattr(collectives, name)(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.cpu(), other.cpu())


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("bucket_bytes", [1, 3000, 1e9])
def test_lesson_03_and_gradient_buckets_train_to_the_same_bits(
    lesson_03, count: int, bucket_bytes: float
) -> None:
    gpus = devices(count)
    torch.manual_seed(0)
    model = MLP(64, 32, 32, 10)
    batches = [(torch.randn(n, 64), torch.randint(10, (n,))) for n in (24, 24, 7)]

    def train_with(buckets_of_a_step) -> list:
        replicas = data_parallel.replicate(model, gpus)
        optimizers = [torch.optim.AdamW(replica.parameters(), lr=1e-3) for replica in replicas]
        for x, y in batches:
            for optimizer in optimizers:
                optimizer.zero_grad()
            buckets = buckets_of_a_step(replicas)
            xs, ys = (data_parallel.split_batch(part, gpus) for part in (x, y))
            data_parallel.backward_on_shards(replicas, xs, ys, F.cross_entropy)
            for bucket in buckets:
                bucket.finish()
            for optimizer in optimizers:
                optimizer.step()
        return replicas

    def lesson_buckets(replicas) -> list:
        groups = [lesson_03.bucket_groups(replica, bucket_bytes) for replica in replicas]
        return [lesson_03.Bucket(group) for group in zip(*groups, strict=True)]

    kept: list[gradient_buckets.GradientBuckets] = []  # the module's serve for all steps

    def module_buckets(replicas) -> list:
        if not kept:
            kept.append(gradient_buckets.GradientBuckets(replicas, bucket_bytes))
        return kept

    lesson, module = train_with(lesson_buckets), train_with(module_buckets)
    for ours, theirs in zip(lesson, module, strict=True):
        assert largest_difference(ours, theirs) == 0


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


@pytest.mark.parametrize("make", ["gpipe", "one_f_one_b"])
@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("m", [1, 3, 4, 8])
def test_lesson_05_and_schedules_write_down_the_same(lesson_05, make, p: int, m: int) -> None:
    lesson, module = getattr(lesson_05, make)(p, m), getattr(schedules, make)(p, m)
    assert lesson == module
    assert lesson_05.held(lesson) == schedule_rules.held(module)


def test_lesson_05_and_schedules_find_the_same_deadlock(lesson_05) -> None:
    first, second = schedules.one_f_one_b(2, 4).steps
    stuck = schedule_rules.Schedule("stuck", 4, [0, 1], [first, [*second[2:], *second[:2]]])
    for method in (lesson_05, schedule_rules):
        with pytest.raises(ValueError, match="deadlock"):
            list(method.in_order(stuck))


@pytest.mark.parametrize("make", ["gpipe", "one_f_one_b"])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_lesson_05_and_pipeline_give_the_same_gradients_to_the_bit(
    lesson_05, make: str, p: int
) -> None:
    gpus = devices(p)
    torch.manual_seed(0)
    original = torch.nn.Sequential(torch.nn.LayerNorm(32), *MLP(*[32] * 9))
    cuts = lesson_05.cuts(p)
    edges = list(pairwise([0, *cuts, len(original)]))
    stages = [
        lesson_05.Stage(copy.deepcopy(original[a:b]).to(gpu), gpu)
        for (a, b), gpu in zip(edges, gpus, strict=True)
    ]
    pipeline = Pipeline(copy.deepcopy(original), gpus, cuts)
    for examples in (24, 7):  # gradients of two batches add up
        schedule = getattr(lesson_05, make)(p, 5)
        x, y = torch.randn(examples, 32), torch.randint(32, (examples,))
        ours = lesson_05.run(schedule, stages, x, y)
        theirs = pipeline.forward_backward(schedule, x, y, F.cross_entropy)
        assert [loss.item() for loss in ours] == [loss.item() for loss in theirs]
    parameters = [parameter for stage in stages for parameter in stage.layers.parameters()]
    for one, other in zip(parameters, pipeline.parameters(), strict=True):
        assert torch.equal(one.grad.cpu(), other.grad.cpu())


def on_each(parts, gpus) -> list[torch.Tensor]:
    """A leaf of its own on each GPU."""
    return [p.clone().to(gpu).requires_grad_() for p, gpu in zip(parts, gpus, strict=True)]


@pytest.mark.parametrize(
    ("lesson_name", "module_name"),
    [("CopyToRanks", "copy_to_ranks"), ("ReduceFromRanks", "reduce_from_ranks")],
)
@pytest.mark.parametrize("count", [1, 3, 4])
def test_lesson_06_and_tensor_parallel_cross_borders_to_the_same_bits(
    lesson_06, lesson_name: str, module_name: str, count: int
) -> None:
    gpus = devices(count)
    torch.manual_seed(0)
    given, gradients = torch.randn(2, count, 5, 7).double()
    ours, theirs = on_each(given, gpus), on_each(given, gpus)
    from_lesson = getattr(lesson_06, lesson_name).apply(*ours)
    from_module = getattr(regions, module_name)(theirs)
    for outs in (from_lesson, from_module):
        torch.autograd.backward(outs, [g.to(gpu) for g, gpu in zip(gradients, gpus, strict=True)])
    for one, other in zip(from_lesson, from_module, strict=True):
        assert torch.equal(one.cpu(), other.cpu())
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.grad.cpu(), other.grad.cpu())


def test_lesson_06_and_tensor_parallel_run_an_mlp_to_the_same_bits() -> None:
    cells = ("split-mlp", "conjugates", "parallel-mlp")
    lesson = definitions("06_tensor_parallelism.ipynb", *cells)  # its layers are on its own GPUs
    gpus = lesson.gpus
    module = ParallelMLP(lesson.mlp, gpus)
    xs = [torch.randn(8, 1, lesson.D)] * len(gpus)
    ours, theirs = on_each(xs, gpus), on_each(xs, gpus)
    for run, leaves in ((lesson.parallel_mlp, ours), (module, theirs)):
        torch.autograd.backward([y.square().mean() for y in run(leaves)])
    ours += [*lesson.up_weights, *lesson.up_biases, *lesson.down_weights, *lesson.down_biases]
    theirs += module.parameters()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.grad.cpu(), other.grad.cpu())


@pytest.mark.parametrize("size", [1, 1e3], ids=["usual", "huge"])
def test_lesson_06_and_tensor_parallel_have_the_same_cross_entropy(lesson_06, size: float) -> None:
    gpus = devices(4)
    torch.manual_seed(0)
    scores_NV, targets_N = size * torch.randn(6, 10).double(), torch.randint(10, (6,))
    parts = scores_NV.tensor_split(4, -1)  # of 3, 3, 2 and 2 tokens
    ours, theirs = on_each(parts, gpus), on_each(parts, gpus)
    from_lesson = lesson_06.split_cross_entropy(ours, targets_N)
    from_module = vocabulary.vocabulary_cross_entropy(
        [part.unsqueeze(0) for part in theirs], targets_N.unsqueeze(0)
    )
    for losses in (from_lesson, from_module):
        torch.autograd.backward(losses)
    torch.testing.assert_close(from_lesson, from_module, rtol=1e-12, atol=1e-12)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.fixture
def lesson_07() -> SimpleNamespace:
    return definitions("07_sequence_parallelism.ipynb", "borders", "attend", "merge", "ring")


@pytest.mark.parametrize("count", [1, 2, 4])
def test_lesson_07_and_attention_ring_attend_to_the_same_bits(lesson_07, count: int) -> None:
    gpus = devices(count)
    torch.manual_seed(0)
    parts = [[torch.randn(2, 3, 8, 4).double().to(gpu) for gpu in gpus] for _ in range(3)]
    ours = lesson_07.ring_attention(*parts)
    theirs = ring_attention(*parts, causal=False, zigzag=False)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("lesson_name", "module_name"),
    [("GatherSequence", "gather_sequence"), ("ScatterSequence", "scatter_sequence")],
)
def test_lesson_07_and_regions_cross_borders_to_the_same_bits(
    lesson_07, lesson_name: str, module_name: str
) -> None:
    gpus = devices(4)
    torch.manual_seed(0)
    given = torch.randn(4, 4, 3).double()
    ours, theirs = on_each(given, gpus), on_each(given, gpus)
    from_lesson = getattr(lesson_07, lesson_name).apply(*ours)
    from_module = getattr(regions, module_name)(theirs)
    for outs in (from_lesson, from_module):
        torch.autograd.backward(outs, [out.detach() for out in outs])
    for one, other in zip([*from_lesson, *ours], [*from_module, *theirs], strict=True):
        assert torch.equal(one.cpu(), other.cpu())
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.grad.cpu(), other.grad.cpu())


def test_lesson_08_and_sharded_train_to_the_same_parameters() -> None:
    lesson = definitions("08_sharded_data_parallelism.ipynb", "rows", "own", "stage-one-code")
    model = lesson.model.double()
    replicas = data_parallel.replicate(model, lesson.gpus)
    shards, optimizers = lesson.make_shards(replicas)
    module = Sharded(
        model,
        lesson.gpus,
        stage=1,
        dtype=torch.float64,
        make_optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    )
    for size in (64, 30):  # shares of 8, 8, 7 and 7 examples, too
        x, y = torch.randn(size, 64).double(), torch.randint(10, (size,))
        xs, ys = (data_parallel.split_batch(each, lesson.gpus) for each in (x, y))
        lesson.sharded_step(replicas, shards, optimizers, xs, ys)
        module.train_step(xs, ys, F.cross_entropy)
    for replica in replicas:
        assert largest_difference(replica.cpu(), module.to_model()) < 1e-12


@pytest.mark.parametrize(("nodes", "size"), [(1, 2), (2, 3), (3, 2)])
def test_lesson_12_and_node_collectives_sum_to_the_same_bits_in_the_same_time(
    nodes: int, size: int
) -> None:
    lesson = definitions(
        "12_nodes_and_experts.ipynb", "hier", "seconds-formulas", "tuner", "two-trees"
    )
    torch.manual_seed(0)
    originals = torch.randn(nodes * size, 1001)
    results, seconds = [], []
    for all_reduce in (lesson.hierarchical_all_reduce, node_collectives.hierarchical_all_reduce):
        with fresh_devices(nodes * size, lesson.spec, nodes=nodes) as gpus:
            tensors = [part.to(gpu) for part, gpu in zip(originals, gpus, strict=True)]
            with trace(strict=True) as t:
                all_reduce(tensors)
            results.append(torch.stack([tensor.cpu() for tensor in tensors]))
            seconds.append(t.seconds)
    assert torch.equal(*results)
    assert seconds[0] == pytest.approx(seconds[1])
    names = {
        "ring": "ring_all_reduce",
        "tree": "tree_all_reduce",
        "levels": "hierarchical_all_reduce",
        "two trees": "double_tree_all_reduce",
    }
    for nbytes in (10, 1e4, 1e7):
        case = (lesson.spec, nodes, size, nbytes)
        assert (
            names[lesson.tuner(*case, lesson.FOUR)]
            == all_reduce_costs.fastest_all_reduce(*case).__name__
        )


@pytest.mark.parametrize(("top_k", "factor"), [(1, 1.0), (2, 0.5), (2, 4.0)])
def test_lesson_12_and_expert_parallel_have_the_same_outputs_and_gradients(
    top_k: int, factor: float
) -> None:
    cells = ("router", "capacity", "layer", "balance-loss", "all-to-all", "exchange", "spread")
    lesson = definitions("12_nodes_and_experts.ipynb", *cells)
    torch.manual_seed(0)
    layer = lesson.ExpertLayer(6, 8, 4, top_k, factor).double()
    module = MixtureOfExperts(6, 8, 4, top_k, factor).double()
    module.router.score.load_state_dict(layer.router.state_dict())
    module.experts.load_state_dict(layer.experts.state_dict())
    inputs = [torch.randn(12, 6).double() for _ in range(4)]
    gpus = devices(4, nodes=2)
    ours, theirs = ([x.to(gpu).requires_grad_() for x, gpu in zip(inputs, gpus, strict=True)]
                    for _ in range(2))  # fmt: skip
    routers, experts = lesson.spread(layer, gpus)
    outs, scores, _ = lesson.expert_parallel(layer, routers, experts, ours)
    parallel = ExpertParallel(module, gpus)
    expected, balances = parallel(theirs)
    for out, right, score, balance in zip(outs, expected, scores, balances, strict=True):
        torch.testing.assert_close(out, right, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lesson.balance(score, top_k), balance, rtol=1e-12, atol=1e-12)
    for each in (outs, expected):
        torch.autograd.backward([out.square().sum() for out in each])
    mine = [*ours, *(p for own in experts for expert in own for p in expert.parameters())]
    right = [*theirs, *(p for own in parallel.experts for p in own.parameters())]
    if top_k > 1:  # with one choice its weight is 1, whatever the router says
        mine += [router.weight for router in routers]
        right += [router.score.weight for router in parallel.routers]
    for one, other in zip(mine, right, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_lesson_12_and_dropless_send_the_same_rows_and_have_the_same_outputs() -> None:
    cells = ("router", "capacity", "layer", "balance-loss", "all-to-all", "exchange", "spread")
    lesson = definitions("12_nodes_and_experts.ipynb", *cells, "counts", "counted")
    torch.manual_seed(0)
    layer = lesson.ExpertLayer(6, 8, 4, 2, 1.25).double()
    module = MixtureOfExperts(6, 8, 4, 2, 1.25).double()
    module.router.score.load_state_dict(layer.router.state_dict())
    module.experts.load_state_dict(layer.experts.state_dict())
    inputs = [torch.randn(12, 6).double() for _ in range(2)]
    gpus = devices(2, nodes=2)
    xs = [x.to(gpu) for x, gpu in zip(inputs, gpus, strict=True)]
    with trace() as ours:
        outs, _ = lesson.counted_forward(layer, *lesson.spread(layer, gpus), xs)
    parallel = DroplessExpertParallel(module, gpus)
    with trace() as theirs:
        expected, _ = parallel(xs)
    for out, right in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, right, rtol=1e-12, atol=1e-12)
    moved = [
        sum(span.bytes for span in t.spans if span.route and span.route[0] is not None)
        for t in (ours, theirs)
    ]
    assert ours.bytes_between_devices > 0
    assert moved[0] - ours.bytes_between_devices == moved[1] - theirs.bytes_between_devices > 0


@pytest.fixture
def lesson_10() -> SimpleNamespace:
    cells = ("guess-eight", "meet", "circle", "ring", "bucket", "averaged", "pipe")
    return definitions("10_one_process_a_gpu.ipynb", *cells, "borders", "neurons")


def equal_on_all_ranks(ours, theirs) -> bool:
    """Whether two lists with a rank's tensors each hold the same bits."""
    pairs = zip(chain(*ours), chain(*theirs), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def test_lesson_10_and_by_hand_reduce_to_the_same_bits(lesson_10) -> None:
    def reduce(by) -> list[torch.Tensor]:
        torch.manual_seed(dist.get_rank())
        tensor = torch.randn(33).to("vgpu")
        by(tensor)
        return [tensor.cpu()]

    ours = lesson_10.on_ranks(reduce, lesson_10.ring_all_reduce)
    assert equal_on_all_ranks(ours, lesson_10.on_ranks(reduce, messages.ring_all_reduce))


@pytest.mark.parametrize("bucket_bytes", [1, 3000, 1e9])
def test_lesson_10_and_by_hand_train_to_the_same_bits(lesson_10, bucket_bytes: float) -> None:
    torch.manual_seed(0)
    model, batches = MLP(16, 32, 10), [(torch.randn(8, 16), torch.randint(10, (8,))) for _ in "123"]

    def train(method) -> list[torch.Tensor]:
        replica = copy.deepcopy(model).to("vgpu")
        averaged = method(replica, bucket_bytes)
        optimizer = torch.optim.AdamW(replica.parameters(), lr=1e-3)
        for x, y in batches:
            optimizer.zero_grad()
            mine = [part.chunk(4)[dist.get_rank()].to("vgpu") for part in (x, y)]
            with averaged.no_sync():
                F.cross_entropy(replica(mine[0][:1]), mine[1][:1]).backward()
            F.cross_entropy(replica(mine[0]), mine[1]).backward()
            averaged.finish()
            optimizer.step()
        return [parameter.detach().cpu() for parameter in replica.parameters()]

    ours = lesson_10.on_ranks(train, lesson_10.AveragedGradients)
    theirs = lesson_10.on_ranks(train, by_hand_data_parallel.AveragedGradients)
    assert equal_on_all_ranks(ours, theirs)


def test_lesson_10_and_by_hand_run_a_stage_to_the_same_bits(lesson_10) -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(4)])
    x, y = torch.randn(12, 8), torch.randint(8, (12,))

    def step(is_lesson: bool) -> list[torch.Tensor]:
        part = copy.deepcopy(layers[dist.get_rank()]).to("vgpu")
        xs, ys = x.to("vgpu").chunk(3), y.to("vgpu").chunk(3)
        if is_lesson:
            lesson_10.gpipe_step(part, xs, ys, (4, 8))
        else:
            by_hand_pipeline.gpipe_step(
                by_hand_pipeline.StageOfRank(part, (4, 8)), xs, ys, F.cross_entropy
            )
        return [parameter.grad.cpu() for parameter in part.parameters()]

    assert equal_on_all_ranks(lesson_10.on_ranks(step, True), lesson_10.on_ranks(step, False))


def test_lesson_10_and_by_hand_run_an_mlp_to_the_same_bits(lesson_10) -> None:
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
    x = torch.randn(5, 8)

    def run(make) -> list[torch.Tensor]:
        part, own = make(mlp), x.to("vgpu").requires_grad_()
        out = part(own)
        out.square().mean().backward()
        return [each.cpu() for each in (out, own.grad, *(p.grad for p in part.parameters()))]

    ours = lesson_10.on_ranks(run, lesson_10.NeuronsOfRank)
    theirs = lesson_10.on_ranks(run, lambda mlp: by_hand_tensor_parallel.NeuronsOfRank(mlp, "vgpu"))
    assert equal_on_all_ranks(ours, theirs)


def test_lesson_11_puts_engines_and_code_by_hand_on_one_ruler() -> None:
    lesson = definitions(
        "11_pytorchs_engines.ipynb",
        *("guess-monday", "guess-hsdp", "model", "whole", "ruler", "ddp", "ddp-hand", "ddp-why"),
        *("fsdp", "fsdp-hand", "hsdp"),
        *("hsdp-hand", "split-attention", "plan", "tensor-hand", "tensor-prepare", "pipeline"),
        "pipeline-hand",
    )
    P, rows = lesson.P, lesson.rows
    pairs = {
        "DDP": "buckets by hand",
        "FSDP2": "stage 3 by hand",
        "HSDP 2 x 2": "hybrid by hand",
        "DTensor": "tensor by hand",
        "Schedule1F1B": "1F1B by hand",
    }
    assert set(rows) == {*pairs, *pairs.values()}
    assert all(row.apart < 1e-7 for row in rows.values())
    more = {
        engine: (rows[engine].sent - rows[hand].sent, rows[engine].peak - rows[hand].peak)
        for engine, hand in pairs.items()
    }
    head = sum(parameter.nbytes for parameter in lesson.gpt[-1].parameters())
    assert more["DDP"] == (232, head)  # it says once in which order the gradients come
    assert more["FSDP2"][0] == more["HSDP 2 x 2"][0] == more["Schedule1F1B"][0] == 0
    assert more["DTensor"][0] == -lesson.ids - lesson.largest
    assert more["Schedule1F1B"][1] == lesson.activation
    for engine, hand in pairs.items():
        assert rows[engine].peak == pytest.approx(rows[hand].peak, rel=0.1)
        assert rows[engine].seconds == pytest.approx(rows[hand].seconds, rel=0.15)
    sent = [rows[engine].sent for engine in list(pairs)[:3]]
    assert sent == [1.5 * P + 232, 2.25 * P, 2 * P]
    assert lesson.plain.sent - rows["DTensor"].sent == 8 * lesson.one


@pytest.fixture
def lesson_13() -> SimpleNamespace:
    cells = ("task", "train", "same-parts", "seconds", "two-batches", "say", "feedback", "local")
    cells += ("late",)
    return definitions("13_to_the_same_loss.ipynb", *cells)


def test_lesson_13_and_the_sweeps_train_alike(lesson_13) -> None:
    for step in (0, 22, 23, 500):
        ours = lesson_13.batch_indices(step, 64, 1437, 2)
        assert torch.equal(ours, sampling.batch_indices(step, 64, 1437, 2))
    assert largest_difference(lesson_13.make_model(1), training.convolutional(1)) == 0
    steps = training.steps_to_loss(64, 0.4, seed=1)
    assert 4 * len(lesson_13.losses(64, 0.4, seed=1)) == steps


def test_lesson_13_and_gradient_noise_solve_the_same_equations(lesson_13) -> None:
    noise = gradient_noise.from_two_batches(16, 3.0, 64, 1.5)
    assert lesson_13.signal_and_noise(16, 3.0, 64, 1.5) == (noise.signal, noise.variance)


def test_lesson_13_and_compressed_sums_say_and_owe_the_same(lesson_13) -> None:
    sums, owed = compressed_sums.TopKSums(0.01), [torch.zeros(1000) for _ in lesson_13.gpus]
    for _ in range(3):
        wanted = [torch.randn(1000) for _ in lesson_13.gpus]
        rows = [row.to(gpu) for row, gpu in zip(wanted, lesson_13.gpus, strict=True)]
        sums(rows)
        said = [
            lesson_13.say_and_remember(lesson_13.say_top, row, debt)
            for row, debt in zip(wanted, owed, strict=True)
        ]
        owed = [debt for _, debt in said]
        torch.testing.assert_close(rows[0].cpu(), sum(each for each, _ in said))
    for ours, theirs in zip(owed, sums.feedback.owed, strict=True):
        torch.testing.assert_close(ours, theirs.cpu())


def test_lesson_13_and_local_training_meet_at_the_same_places(lesson_13) -> None:
    def sgd(parameters) -> torch.optim.SGD:
        return torch.optim.SGD(parameters, lr=0.2)

    ours = lesson_13.local_training(lesson_13.gpus, sgd, period=3, steps=6)
    replicas = data_parallel.replicate(lesson_13.make_model(0), lesson_13.gpus)
    local = LocalTraining(replicas, sgd, period=3)
    for step in range(6):
        local.step(*training.shards(step, 64, 0, lesson_13.gpus), F.cross_entropy)
    assert largest_difference(ours[-1], local.replicas[-1]) < 1e-6


def test_lesson_13_and_overlapped_training_are_late_alike(lesson_13) -> None:
    def sgd(parameters) -> torch.optim.SGD:
        return torch.optim.SGD(parameters, lr=0.1)

    ours, anchors = lesson_13.late_training(lesson_13.gpus, sgd, diloco, 3, 2, 9)
    replicas = data_parallel.replicate(lesson_13.make_model(0), lesson_13.gpus)
    run = OverlappedTraining(replicas, sgd, 3, 2, diloco)
    for step in range(9):
        run.step(*training.shards(step, 64, 0, lesson_13.gpus), F.cross_entropy)
    assert largest_difference(ours[-1], run.replicas[-1]) < 1e-6
    assert (anchors[0] - run.anchors[0]).abs().max() < 1e-6
