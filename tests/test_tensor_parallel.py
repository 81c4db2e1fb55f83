"""Tensor parallelism is the same training as on one GPU, and moves what the papers say."""

from __future__ import annotations

import copy
import gc
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

import course_lib
from course_lib import devices, trace
from course_lib.models import GPT, MLP, Attention, Block, next_token_loss
from course_lib.parallel.proof import largest_difference
from course_lib.parallel.regions import (
    copy_to_ranks,
    gather_sequence,
    reduce_from_ranks,
    scatter_sequence,
)
from course_lib.parallel.split_parameter import (
    all_reduce_partial_gradients,
    largest_copy_difference,
    unsplit,
)
from course_lib.parallel.tensor_parallel import (
    ColumnLinear,
    CopiedNorm,
    ParallelAttention,
    ParallelBlock,
    ParallelGPT,
    ParallelMLP,
    RowLinear,
)
from course_lib.parallel.vocabulary import VocabularyEmbedding, vocabulary_cross_entropy

counts = pytest.mark.parametrize("count", [1, 2, 4])
small_counts = pytest.mark.parametrize("count", [1, 3])  # of which the second divides nothing
regions = pytest.mark.parametrize("by_sequence", [False, True], ids=["replicated", "by-sequence"])
CLOSE = 1e-12
gradcheck = partial(torch.autograd.gradcheck, fast_mode=True)  # in one random direction


@pytest.fixture(autouse=True)
def float64(vgpus: list[torch.device]):
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# A replicated value is one value on many devices. These two are the only places where it is made
# of one tensor or read as one; both insist that all copies are the same, to the last bit.


class Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gpus: list[torch.device]) -> tuple[Tensor, ...]:
        return tuple(x.to(gpu) for gpu in gpus)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        return only(gradients), None


class ReadOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *xs: Tensor) -> Tensor:
        ctx.gpus = [x.device for x in xs]
        return only(xs)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.to(gpu) for gpu in ctx.gpus)


def only(copies: tuple[Tensor, ...]) -> Tensor:
    first, *others = (each.cpu() for each in copies)
    assert all(torch.equal(first, other) for other in others)
    return first


def replicate(x: Tensor, gpus: list[torch.device]) -> list[Tensor]:
    return list(Replicate.apply(x, gpus))


def spread(xs: list[Tensor], gpus: list[torch.device]) -> list[Tensor]:
    return [x.to(gpu) for x, gpu in zip(xs, gpus, strict=True)]


def every(xs: list[Tensor], dimension: int = 0) -> Tensor:
    return torch.cat([x.cpu() for x in xs], dimension)


def enter(x: Tensor, gpus: list[torch.device], by_sequence: bool) -> list[Tensor]:
    return spread(x.tensor_split(len(gpus)), gpus) if by_sequence else replicate(x, gpus)


def leave(xs: list[Tensor], by_sequence: bool) -> Tensor:
    return every(xs) if by_sequence else ReadOne.apply(*xs)


def randomized(module: nn.Module) -> nn.Module:
    """With numbers everywhere: what happens to a bias of zero would not be seen."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def require_equal(parallel: nn.Module, single: nn.Module) -> None:
    """The same parameters and the same gradients, and copies that do not differ at all."""
    joined = unsplit(parallel, single)
    assert largest_difference(joined, single) < CLOSE
    for ours, theirs in zip(joined.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=CLOSE, atol=CLOSE)
    assert largest_copy_difference(parallel) == 0


# Gradients against finite differences.


@small_counts
def test_copy_to_ranks_has_the_gradient_of_finite_differences(count: int) -> None:
    gpus = devices(count)
    x = torch.randn(3, 1, requires_grad=True)
    assert gradcheck(lambda x: every(copy_to_ranks(replicate(x, gpus))), x)


@small_counts
@pytest.mark.parametrize(
    ("border", "read"),
    [
        (reduce_from_ranks, lambda xs: ReadOne.apply(*xs)),
        (gather_sequence, every),
        (scatter_sequence, every),
    ],
    ids=["reduce_from_ranks", "gather_sequence", "scatter_sequence"],
)
def test_the_other_borders_too(border, read, count: int) -> None:
    gpus = devices(count)
    xs = [torch.randn(3, 1, requires_grad=True) for _ in gpus]
    assert gradcheck(lambda *xs: read(border(spread(xs, gpus))), xs)


@small_counts
@regions
def test_column_and_row_layers_too(count: int, by_sequence: bool) -> None:
    gpus = devices(count)
    column = ColumnLinear(nn.Linear(2, 4), gpus, by_sequence)
    x = torch.randn(3, 2, requires_grad=True)
    assert gradcheck(lambda x: every(column(enter(x, gpus, by_sequence)), -1), x)
    row = RowLinear(nn.Linear(4, 2), gpus, by_sequence)
    xs = [x.clone().requires_grad_() for x in torch.randn(3, 4).tensor_split(count, -1)]
    assert gradcheck(lambda *xs: leave(row(spread(xs, gpus)), by_sequence), xs)


LAYERS = {
    "norm": (lambda n: nn.LayerNorm(4), CopiedNorm),
    "MLP": (lambda n: MLP(4, 9, 4), ParallelMLP),
    "attention": (lambda n: Attention(4 * n, 2 * n), ParallelAttention),
    "block": (lambda n: Block(4 * n, 2 * n, dropout=0), ParallelBlock),
}
layers = pytest.mark.parametrize(("single", "parallel"), LAYERS.values(), ids=LAYERS)


@small_counts
@regions
@layers
def test_layers_made_of_them_too(single, parallel, count: int, by_sequence: bool) -> None:
    gpus = devices(count)
    layer = randomized(single(count))
    x_TBD = torch.randn(3, 2, next(layer.parameters()).shape[-1], requires_grad=True)
    layer = parallel(layer, gpus, by_sequence)

    def run(x_TBD: Tensor) -> Tensor:
        return leave(layer(enter(x_TBD, gpus, by_sequence)), by_sequence)

    assert gradcheck(run, x_TBD)


@small_counts
def test_the_vocabulary_cross_entropy_too(count: int) -> None:
    gpus = devices(count)
    scores = [part.clone() for part in torch.randn(1, 2, 5).tensor_split(count, -1)]
    targets = torch.randint(5, (1, 2))

    def run(*scores: Tensor) -> Tensor:
        return ReadOne.apply(*vocabulary_cross_entropy(spread(scores, gpus), targets))

    assert gradcheck(run, [part.requires_grad_() for part in scores])


# The same as on one GPU.


@counts
@regions
@layers
def test_a_layer_equals_the_layer_on_one_gpu(
    single, parallel, count: int, by_sequence: bool
) -> None:
    gpus = devices(count)
    layer = randomized(single(count))
    split = parallel(layer, gpus, by_sequence)
    x_TBD = torch.randn(4, 3, next(layer.parameters()).shape[-1], requires_grad=True)
    weights_TBD = torch.randn_like(x_TBD)
    theirs_TBD = layer(x_TBD.transpose(0, 1)).transpose(0, 1)
    (theirs_TBD * weights_TBD).sum().backward()
    x2_TBD = x_TBD.detach().clone().requires_grad_()
    ours_TBD = leave(split(enter(x2_TBD, gpus, by_sequence)), by_sequence)
    (ours_TBD * weights_TBD).sum().backward()
    all_reduce_partial_gradients(split)
    torch.testing.assert_close(ours_TBD, theirs_TBD, rtol=CLOSE, atol=CLOSE)
    torch.testing.assert_close(x2_TBD.grad, x_TBD.grad, rtol=CLOSE, atol=CLOSE)
    require_equal(split, layer)


@counts
@regions
def test_a_row_layer_without_a_bias_adds_none(count: int, by_sequence: bool) -> None:
    gpus = devices(count)
    linear = nn.Linear(6, 4, bias=False)
    x = torch.randn(5, 6)
    ys = RowLinear(linear, gpus, by_sequence)(spread(x.tensor_split(count, -1), gpus))
    torch.testing.assert_close(leave(ys, by_sequence), linear(x), rtol=CLOSE, atol=CLOSE)


def test_what_has_no_gradient_yet_is_not_taken_for_equal() -> None:
    gpt = small_gpt(depth=1)
    parallel = ParallelGPT(gpt, devices(2))
    next_token_loss(gpt(passages()[0]), passages()[1]).backward()
    assert all(parameter.grad is None for parameter in unsplit(parallel, gpt).parameters())


@counts
@regions
def test_an_embedding_equals_that_on_one_gpu(count: int, by_sequence: bool) -> None:
    gpus = devices(count)
    embedding = nn.Embedding(7, 4)
    split = VocabularyEmbedding(embedding, gpus, by_sequence)
    tokens_TB = torch.randint(7, (4, 3))
    weights_TBD = torch.randn(4, 3, 4)
    theirs_TBD = embedding(tokens_TB)
    (theirs_TBD * weights_TBD).sum().backward()
    ours_TBD = leave(split(tokens_TB), by_sequence)
    (ours_TBD * weights_TBD).sum().backward()
    assert torch.equal(ours_TBD, theirs_TBD)
    require_equal(split, embedding)


@counts
@pytest.mark.parametrize("size", [1, 1e5], ids=["usual", "huge"])
def test_a_cross_entropy_equals_that_of_the_whole_scores(count: int, size: float) -> None:
    gpus = devices(count)
    scores_BTV = (size * torch.randn(2, 3, 7)).requires_grad_()
    targets_BT = torch.randint(7, (2, 3))
    theirs = next_token_loss(scores_BTV, targets_BT)
    theirs.backward()
    parts = [p.detach().clone().requires_grad_() for p in scores_BTV.tensor_split(count, -1)]
    ours = ReadOne.apply(*vocabulary_cross_entropy(spread(parts, gpus), targets_BT))
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=CLOSE, atol=CLOSE)
    gradient = torch.cat([part.grad for part in parts], -1)
    torch.testing.assert_close(gradient, scores_BTV.grad, rtol=CLOSE, atol=CLOSE)


def small_gpt(**changes: object) -> GPT:
    form = {"context": 8, "width": 8, "heads": 4, "depth": 2} | changes
    return randomized(GPT(13, **form))


def passages(T: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randint(13, (3, T)), torch.randint(13, (3, T))


def backward(parallel: ParallelGPT, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
    losses = vocabulary_cross_entropy(parallel(tokens_BT), targets_BT)
    torch.autograd.backward(losses)
    all_reduce_partial_gradients(parallel)
    return only(losses).detach()


@regions
@pytest.mark.parametrize(
    ("count", "tied"), [(1, True), (2, True), (4, False)], ids=["1-tied", "2-tied", "4-untied"]
)
def test_a_gpt_equals_the_gpt_on_one_gpu(count: int, by_sequence: bool, tied: bool) -> None:
    gpt = small_gpt(tied=tied)
    parallel = ParallelGPT(gpt, devices(count), by_sequence)
    tokens_BT, targets_BT = passages()
    loss = next_token_loss(gpt(tokens_BT), targets_BT)
    loss.backward()
    assert abs(backward(parallel, tokens_BT, targets_BT) - loss) < CLOSE
    require_equal(parallel, gpt)


@regions
def test_several_steps_of_training_stay_equal(by_sequence: bool) -> None:
    gpt = small_gpt(depth=1)
    parallel = ParallelGPT(gpt, devices(4), by_sequence)
    ours, theirs = (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (parallel, gpt)
    )
    for _ in range(3):
        tokens_BT, targets_BT = passages()
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
        backward(parallel, tokens_BT, targets_BT)
        next_token_loss(gpt(tokens_BT), targets_BT).backward()
        for optimizer in (ours, theirs):
            optimizer.step()
    require_equal(parallel, gpt)


@pytest.mark.parametrize("T", [7, 3])
def test_a_sequence_need_not_divide(T: int) -> None:
    gpt = small_gpt(depth=1)
    parallel = ParallelGPT(gpt, devices(4), sequence_parallel=True)
    tokens_BT, targets_BT = passages(T)
    next_token_loss(gpt(tokens_BT), targets_BT).backward()
    backward(parallel, tokens_BT, targets_BT)
    require_equal(parallel, gpt)


def test_splitting_a_model_leaves_it_as_it_was() -> None:
    gpus = devices(2)
    gpt = small_gpt().to(gpus[0])
    before = copy.deepcopy(gpt)
    for parameter in ParallelGPT(gpt, gpus).parameters():
        parameter.data.zero_()
    assert largest_difference(gpt, before) == 0


@pytest.mark.parametrize(
    "border", [copy_to_ranks, reduce_from_ranks, gather_sequence, scatter_sequence]
)
def test_a_border_leaves_what_it_is_given_as_it_was(border) -> None:
    gpus = devices(2)
    xs = [torch.randn(4, 2, device=gpu, requires_grad=True) for gpu in gpus]
    ys = border(xs)
    gradients = [torch.randn_like(y) for y in ys]
    given = [*xs, *gradients]
    before = [each.detach().clone() for each in given]
    torch.autograd.backward(border(xs), gradients)
    assert all(map(torch.equal, given, before))


@regions
def test_a_frozen_layer_stays_frozen(by_sequence: bool) -> None:
    gpt = small_gpt(depth=1)
    gpt[0].requires_grad_(False)
    gpt[1].mlp[2].bias.requires_grad_(False)
    parallel = ParallelGPT(gpt, devices(2), by_sequence)
    tokens_BT, targets_BT = passages()
    next_token_loss(gpt(tokens_BT), targets_BT).backward()
    backward(parallel, tokens_BT, targets_BT)
    joined = unsplit(parallel, gpt)
    for ours, theirs in zip(joined.parameters(), gpt.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=CLOSE, atol=CLOSE)
    trained = {parameter.requires_grad for parameter in parallel.position}
    assert trained == {gpt[0].position.weight.requires_grad} == {False}


@counts
def test_ignored_targets_do_not_count(count: int) -> None:
    gpt = small_gpt(depth=1)
    parallel = ParallelGPT(gpt, devices(count))
    tokens_BT, targets_BT = passages()
    targets_BT[0, 1:] = -100
    loss = next_token_loss(gpt(tokens_BT), targets_BT)
    loss.backward()
    assert abs(backward(parallel, tokens_BT, targets_BT) - loss) < CLOSE
    require_equal(parallel, gpt)


def test_a_batch_that_is_all_padding_has_a_loss_of_zero_and_no_gradient() -> None:
    parallel = ParallelGPT(small_gpt(depth=1), devices(2))
    tokens_BT, targets_BT = passages()
    assert backward(parallel, tokens_BT, targets_BT.fill_(-100)) == 0
    assert all(not parameter.grad.any() for parameter in parallel.parameters())


# What it takes to be the same.


def test_without_the_all_reduce_of_partial_gradients_copies_drift_apart() -> None:
    parallel = ParallelGPT(small_gpt(), devices(2), sequence_parallel=True)
    tokens_BT, targets_BT = passages()
    losses = vocabulary_cross_entropy(parallel(tokens_BT), targets_BT)
    torch.autograd.backward(losses)
    torch.optim.SGD(parallel.parameters(), lr=0.1).step()
    assert largest_copy_difference(parallel) > 1e-4


def test_a_frozen_norm_has_no_gradient_to_reduce() -> None:
    parallel = ParallelGPT(small_gpt(depth=1), devices(2), sequence_parallel=True)
    parallel.norm.requires_grad_(False)
    backward(parallel, *passages())
    assert all(parameter.grad is None for parameter in parallel.norm.parameters())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_backward_pass_from_one_loss_is_refused(rank: int) -> None:
    parallel = ParallelGPT(small_gpt(depth=1), devices(2))
    losses = vocabulary_cross_entropy(parallel(passages()[0]), passages()[1])
    with pytest.raises(RuntimeError, match=r"the losses of all, torch\.autograd\.backward\(loss"):
        losses[rank].backward()


def test_each_device_has_whole_heads() -> None:
    attention = Attention(8, 4)
    qkv = ParallelAttention(attention, devices(2)).qkv.weight
    queries, keys, values = attention.qkv.weight.chunk(3)
    second_half = [part[4:] for part in (queries, keys, values)]
    assert torch.equal(qkv[1].cpu(), torch.cat(second_half))


# What moves.


def ring(gpus: list[torch.device], nbytes_each: float) -> dict[tuple[str, str], float]:
    """Every device sends so much to the next."""
    return {(str(a), str(b)): nbytes_each for a, b in zip(gpus, gpus[1:] + gpus[:1], strict=True)}


@pytest.mark.parametrize("count", [2, 4])
@regions
def test_a_block_moves_two_all_reduces_forward_and_two_backward_and_nothing_else(
    count: int, by_sequence: bool
) -> None:
    gpus = devices(count)
    block = ParallelBlock(Block(8, 4, dropout=0), gpus, by_sequence)
    T, B, D = 8, 3, 8
    xs_TBD = [
        torch.randn(T // count if by_sequence else T, B, D, device=gpu, requires_grad=True)
        for gpu in gpus
    ]
    with trace(strict=True) as forward:
        ys_TBD = block(xs_TBD)
    gradients = [torch.ones_like(y_TBD) for y_TBD in ys_TBD]
    with trace(strict=True) as backward:
        torch.autograd.backward(ys_TBD, gradients)
    all_reduce = 2 * (count - 1) / count * T * B * D * 8
    assert forward.bytes_moved == ring(gpus, 2 * all_reduce)
    assert backward.bytes_moved == ring(gpus, 2 * all_reduce)


def test_a_gpt_moves_one_more_each_way_and_three_numbers_a_token() -> None:
    count, depth = 4, 2
    gpt = small_gpt(depth=depth)
    gpus = devices(count)
    parallel = ParallelGPT(gpt, gpus)
    tokens_BT, targets_BT = torch.randint(13, (2, 8)), torch.randint(13, (2, 8))
    with trace(strict=True) as recording:
        backward(parallel, tokens_BT, targets_BT)
    all_reduce = 2 * (count - 1) / count * tokens_BT.numel() * 8  # of one number a token
    largest = (count - 1) * tokens_BT.numel() * 8
    embedding_and_head = 2
    expected = (4 * depth + embedding_and_head) * 8 * all_reduce + 2 * all_reduce + largest
    sent = {route: n for route, n in recording.bytes_moved.items() if "host" not in route}
    assert sent == ring(gpus, expected)


def test_with_sequence_parallelism_partial_gradients_move_once() -> None:
    gpus = devices(2)
    parallel = ParallelGPT(small_gpt(depth=1), gpus, sequence_parallel=True)
    tokens_BT, targets_BT = passages()
    torch.autograd.backward(vocabulary_cross_entropy(parallel(tokens_BT), targets_BT))
    with trace(strict=True) as recording:
        all_reduce_partial_gradients(parallel)
    norms, biases, positions = 3 * 2 * 8, 2 * 8, 8 * 8
    assert recording.bytes_moved == ring(gpus, (norms + biases + positions) * 8)


def test_without_it_there_are_none() -> None:
    parallel = ParallelGPT(small_gpt(depth=1), devices(2))
    backward(parallel, *passages())
    with trace() as recording:
        all_reduce_partial_gradients(parallel)
    assert recording.spans == []


# What is held.

WIDTH, HEADS, SEQUENCE, BATCH, RANKS = 4096, 32, 2048, 1, 4


@cache
def activations(by_sequence: bool) -> tuple[int, int]:
    """Bytes that a block of a large GPT holds on one A100 after the forward pass; at most ever."""
    gpus = devices(RANKS, course_lib.A100, backing="meta")
    with gpus[0]:  # made on a device, where it needs no numbers
        block = Block(WIDTH, HEADS, dropout=0).to(torch.bfloat16)
    block = ParallelBlock(block, gpus, by_sequence)
    T = SEQUENCE // RANKS if by_sequence else SEQUENCE
    form = {"dtype": torch.bfloat16, "requires_grad": True}
    xs = [torch.empty(T, BATCH, WIDTH, device=gpu, **form) for gpu in gpus]
    before = course_lib.memory_in_use(gpus[3])
    course_lib.reset_peak_memory(gpus[3])
    ys = block(xs)
    held = course_lib.memory_in_use(gpus[3]) - before
    # Gradients of parameters would hide what sequence parallelism changes.
    torch.autograd.grad(ys, xs, [torch.empty_like(y) for y in ys])
    return held, course_lib.peak_memory(gpus[3]) - before


def test_sequence_parallelism_holds_what_the_formula_says() -> None:
    # Korthikanti and others, 2022, equation 2: sbh (10 + 24/t), and with sequence parallelism,
    # equation 4: sbh 34/t. The terms of the attention matrix and of the dropout masks (2 in 34)
    # are not here. Two inputs of column layers, 4 in 34, are kept whole by gather_sequence; the
    # paper's authors keep parts of them, and gather those a second time.
    sbh = SEQUENCE * BATCH * WIDTH
    statistics = 2 * 2 * SEQUENCE * 4  # of two norms, mean and deviation of each row, four bytes
    log_sums = SEQUENCE * HEADS // RANKS * 4  # one for each query, as flash attention keeps them
    replicated, _ = activations(by_sequence=False)
    by_sequence, _ = activations(by_sequence=True)
    assert replicated == sbh * (8 + 24 / RANKS) + statistics + log_sums
    assert by_sequence == sbh * (4 + 28 / RANKS) + statistics / RANKS + log_sums


def test_sequence_parallelism_needs_less_memory_at_the_peak() -> None:
    assert activations(by_sequence=True)[1] < activations(by_sequence=False)[1]


def test_a_part_of_the_sequence_does_not_keep_the_whole_in_memory() -> None:
    gpus = devices(2)
    xs = [torch.zeros(4, 2, device=gpu) for gpu in gpus]
    parts = scatter_sequence(xs)
    held = [course_lib.memory_in_use(gpu) - x.nbytes for gpu, x in zip(gpus, xs, strict=True)]
    assert held == [part.nbytes for part in parts] == [2 * 2 * 8] * 2


@regions
def test_all_memory_is_free_again(by_sequence: bool) -> None:
    gpus = devices(2)
    parallel = ParallelGPT(small_gpt(depth=1), gpus, by_sequence)
    backward(parallel, *passages())
    assert all(course_lib.memory_in_use(gpu) > 0 for gpu in gpus)
    del parallel
    gc.collect()
    assert [course_lib.memory_in_use(gpu) for gpu in gpus] == [0, 0]


@counts
def test_a_device_holds_its_part_of_the_weights_and_no_more(count: int) -> None:
    gpus = devices(count)
    layer = ParallelMLP(MLP(16, 64, 16), gpus)
    part = 2 * 16 * 64 // count + 64 // count + 16
    assert [course_lib.memory_in_use(gpu) for gpu in gpus] == [8 * part] * count
    assert sum(parameter.numel() for parameter in layer.parameters()) == part * count


# What cannot be done.


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="4 heads do not divide over 3 devices"):
        ParallelGPT(small_gpt(), devices(3))
    with pytest.raises(ValueError, match="4 heads do not divide over 8 devices: each takes whole"):
        ParallelGPT(small_gpt(), devices(8))


def test_more_devices_than_neurons_or_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot cut 2 rows into 3 parts"):
        ParallelMLP(MLP(4, 2, 4), devices(3))
    with pytest.raises(ValueError, match="cannot cut 2 rows into 3 parts"):
        VocabularyEmbedding(nn.Embedding(2, 4), devices(3))


def test_no_device_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one device"):
        ParallelGPT(small_gpt(), [])


def test_more_tokens_than_the_context_are_refused() -> None:
    parallel = ParallelGPT(small_gpt(), devices(2))
    with pytest.raises(ValueError, match="9 tokens are more than this GPT can read, 8"):
        parallel(torch.zeros(1, 9, dtype=torch.int64))


@pytest.mark.parametrize("token", [-1, 13])
def test_a_token_outside_the_vocabulary_is_refused_as_on_one_gpu(token: int) -> None:
    parallel = ParallelGPT(small_gpt(), devices(2))
    with pytest.raises(IndexError, match="index out of range"):
        parallel(torch.tensor([[token]]))


def test_a_single_tensor_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(TypeError, match="one tensor a device, not a single tensor"):
        ParallelMLP(MLP(4, 8, 4), devices(2))(torch.randn(2, 3, 4, device="vgpu:0"))
