"""The checks of lesson 06 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

import torch

from course_lib import devices
from course_lib.exercises import lesson_06
from course_lib.parallel.collectives import all_gather
from exercise_answers import Answers

GATHER = Answers("06", "gather", lesson_06.check_gather)
HEADS = Answers("06", "heads", lesson_06.check_heads)
BEST = Answers("06", "best", lesson_06.check_best)
BLOCK = Answers("06", "block", lesson_06.check_block)
EXERCISES = [GATHER, HEADS, BEST, BLOCK]


# ---------------------------------------------------------------------- 1. a third border


def side_by_side(parts):
    return tuple(torch.cat([part.to(home.device) for part in parts], 1) for home in parts)


def bordered(backward, forward=side_by_side):
    """A gather with this backward, which gets the list of gradients."""

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *parts):
            return tuple(forward(parts))

        @staticmethod
        def backward(ctx, *gradients):
            return tuple(backward(gradients))

    return lambda parts: Gather.apply(*parts)


def own_columns(gradients):
    width = gradients[0].shape[1] // len(gradients)
    return [each[:, rank * width : (rank + 1) * width] for rank, each in enumerate(gradients)]


@GATHER.right
def with_the_ring_of_lesson_03(parts):
    def gathered(parts):
        return [whole.T for whole in all_gather([part.T.contiguous() for part in parts])]

    return bordered(own_columns, gathered)(parts)


@GATHER.right
def a_detour_round_autograd(parts):
    """Each GPU's own part keeps its graph, and the others' are cut off from it."""
    return [
        torch.cat([part if part is home else part.detach().to(home.device) for part in parts], 1)
        for home in parts
    ]


@GATHER.wrong("each part gets 2 times its gradient", "not to be added")
def what_autograd_does(parts):
    return side_by_side(parts)


@GATHER.wrong("each part gets 2 times its gradient", "copies of one")
def a_reduce_scatter_on_the_way_back(parts):
    def scattered(gradients):
        sums = [sum(each.to(home.device) for each in gradients) for home in gradients]
        return own_columns(sums)

    return bordered(scattered)(parts)


@GATHER.wrong("with 2 GPUs, every part gets the first columns' gradient")
def the_first_columns_for_all(parts):
    return bordered(lambda gradients: [g.chunk(len(gradients), 1)[0] for g in gradients])(parts)


@GATHER.wrong("the gradients are right, and they travelled")
def a_mean_of_all_gradients(parts):
    def averaged(gradients):
        count = len(gradients)
        means = [sum(each.to(home.device) for each in gradients) / count for home in gradients]
        return own_columns(means)

    return bordered(averaged)(parts)


@GATHER.wrong("no way back", "detached")
def without_a_graph(parts):
    return side_by_side([part.detach() for part in parts])


@GATHER.wrong("no way back", "none in a list")
def a_list_given_to_apply(parts):
    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx, parts):
            return tuple(side_by_side(parts))

    return Gather.apply(parts)


@GATHER.wrong("one gradient for each argument of `apply`, of its shape", unsaid="looked at")
def the_whole_gradient_for_each_part(parts):
    return bordered(lambda gradients: gradients)(parts)


@GATHER.wrong("the backward of Gather returned an invalid gradient", unsaid="GatherBackward")
def pieces_of_rows(parts):
    return bordered(lambda gradients: [g.chunk(len(gradients))[0] for g in gradients])(parts)


@GATHER.wrong("several are a tuple, and not a list", "expected 2, got 1", unsaid="GatherBackward")
def a_list_from_backward(parts):
    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *parts):
            return side_by_side(parts)

        @staticmethod
        def backward(ctx, *gradients):
            return own_columns(gradients)

    return Gather.apply(*parts)


@GATHER.wrong("with 2 GPUs, each part gets its gradient divided by 2", unsaid="own columns")
def a_mean_over_the_gpus(parts):
    def divided(gradients):
        return [each / len(gradients) for each in own_columns(gradients)]

    return bordered(divided)(parts)


@GATHER.wrong("with 2 GPUs, the parts' gradients are not those of their own columns")
def the_columns_of_the_mirrored_gpu(parts):
    def mirrored(gradients):
        width = gradients[0].shape[1] // len(gradients)
        return [
            each[:, each.shape[1] - (rank + 1) * width :][:, :width]
            for rank, each in enumerate(gradients)
        ]

    return bordered(mirrored)(parts)


@GATHER.wrong("no gradient arrives")
def nothing_on_the_way_back(parts):
    return bordered(lambda gradients: [torch.zeros_like(g) for g in own_columns(gradients)])(parts)


@GATHER.wrong("not have all parts side by side")
def the_parts_from_the_last(parts):
    return side_by_side(parts[::-1])[::-1]


@GATHER.wrong("GPU 0's tensor has shape (12, 5), and should have (6, 10)")
def one_below_the_other(parts):
    return [torch.cat([part.to(home.device) for part in parts]) for home in parts]


@GATHER.wrong("one result is on vgpu:0", "should be on vgpu:1")
def all_on_the_first_gpu(parts):
    return [side_by_side(parts)[0] for _ in parts]


@GATHER.wrong("went over the host")
def by_way_of_the_host(parts):
    def gathered(parts):
        whole = torch.cat([part.cpu() for part in parts], 1)
        return [whole.to(part.device) for part in parts]

    return bordered(own_columns, gathered)(parts)


@GATHER.wrong("returned None", "return statement")
def nothing_returned(parts):
    side_by_side(parts)


@GATHER.wrong("changed")
def parts_written_into(parts):
    outs = bordered(own_columns)(parts)
    with torch.no_grad():
        parts[0].zero_()
    return outs


# -------------------------------------------------------------------------- 2. cut by heads


def kinds_of(weight, heads, pairs):
    """Queries, keys and values, each [heads or pairs, D/H, D]."""
    return weight.unflatten(0, (heads + 2 * pairs, -1)).split([heads, pairs, pairs])


@HEADS.right
def with_views(weight, heads, pairs, count):
    kinds = [kind.unflatten(0, (count, -1)) for kind in kinds_of(weight, heads, pairs)]
    return [torch.cat([kind[rank] for kind in kinds]).flatten(0, 1) for rank in range(count)]


@HEADS.right
def head_by_head(weight, heads, pairs, count):
    width = weight.shape[1]
    head_width = width // heads
    parts = []
    for rank in range(count):
        pieces, begin = [], 0
        for number in (heads, pairs, pairs):
            each = number // count
            for head in range(rank * each, (rank + 1) * each):
                first = begin + head * head_width
                pieces.append(weight[first : first + head_width])
            begin += number * head_width
        parts.append(torch.cat(pieces))
    return parts


@HEADS.right
def row_numbers(weight, heads, pairs, count):
    rows = kinds_of(torch.arange(len(weight))[:, None], heads, pairs)
    by_rank = torch.cat([kind.reshape(count, -1) for kind in rows], 1)
    return [weight[own] for own in by_rank]


@HEADS.right
def pairs_found_from_the_heads(weight, heads, pairs, count):
    queries, keys, values = kinds_of(weight, heads, pairs)
    parts = []
    for rank in range(count):
        own = range(rank * heads // count, (rank + 1) * heads // count)
        used = sorted({head * pairs // heads for head in own})
        parts.append(torch.cat([queries[list(own)], keys[used], values[used]]).flatten(0, 1))
    return tuple(parts)


@HEADS.right
def parts_that_are_on_a_gpu_already(weight, heads, pairs, count):
    (gpu,) = devices(1)
    return [part.to(gpu) for part in with_views(weight, heads, pairs, count)]


@HEADS.wrong("with 8 heads and 4 pairs, GPU 0's tensor has shape", "should have (16, 16)")
def as_if_nothing_were_shared(weight, heads, pairs, count):
    kinds = [kind.chunk(count) for kind in weight.chunk(3)]
    return [torch.cat(pieces) for pieces in zip(*kinds, strict=True)]


@HEADS.wrong("with 8 heads and 4 pairs, GPU 0's tensor has shape (24, 16)")
def all_pairs_on_every_gpu_where_some_are_shared(weight, heads, pairs, count):
    kinds = kinds_of(weight, heads, pairs)
    counts = (count, count if heads == pairs else 1, count if heads == pairs else 1)
    pieces = [kind.chunk(n) for kind, n in zip(kinds, counts, strict=True)]
    return [torch.cat([p[rank % len(p)] for p in pieces]).flatten(0, 1) for rank in range(count)]


@HEADS.wrong("with 8 heads and 4 pairs, GPU 0 of 2 has other rows", "0 to 3", "pairs that they use")
def shared_pairs_dealt_like_cards(weight, heads, pairs, count):
    if heads == pairs:
        return with_views(weight, heads, pairs, count)
    queries, keys, values = kinds_of(weight, heads, pairs)
    return [
        torch.cat([queries.chunk(count)[r], keys[r::count], values[r::count]]).flatten(0, 1)
        for r in range(count)
    ]


@HEADS.wrong("GPU 0 of 2", "one piece of the rows as they stand", "queries, keys and values each")
def chunks(weight, heads, pairs, count):
    return weight.chunk(count)


@HEADS.wrong("return a list of 2 tensors for 2 GPUs")
def thirds(weight, heads, pairs, count):
    return weight.chunk(3)


@HEADS.wrong("return a list of 2 tensors for 2 GPUs")
def a_part_for_each_head(weight, heads, pairs, count):
    kinds = [part.chunk(heads) for part in weight.chunk(3)]
    return [torch.cat(pieces) for pieces in zip(*kinds, strict=True)]


@HEADS.wrong("return a list of 2 tensors for 2 GPUs")
def the_first_part_alone(weight, heads, pairs, count):
    return [torch.cat([part.chunk(count)[0] for part in weight.chunk(3)])]


@HEADS.wrong("return a list of 2 tensors for 2 GPUs")
def a_single_tensor_of_all_parts(weight, heads, pairs, count):
    return torch.stack(weight.chunk(count))


@HEADS.wrong("returned None", "return statement")
def no_parts(weight, heads, pairs, count):
    weight.chunk(count)


@HEADS.wrong("GPU 0 of 2", "right rows in another order", "first come its queries")
def each_head_with_its_queries_keys_and_values(weight, heads, pairs, count):
    kinds = [part.chunk(heads) for part in weight.chunk(3)]
    by_head = torch.cat([torch.cat(pieces) for pieces in zip(*kinds, strict=True)])
    return by_head.chunk(count)


@HEADS.wrong("GPU 0", "right rows in another order", "then its keys, then its values")
def values_before_keys(weight, heads, pairs, count):
    queries, keys, values = (part.chunk(count) for part in weight.chunk(3))
    return [torch.cat(pieces) for pieces in zip(queries, values, keys, strict=True)]


@HEADS.wrong("GPU 0 of 2", "other rows than those of its heads, 0 to 1")
def the_last_gpus_heads_first(weight, heads, pairs, count):
    kinds = [part.chunk(count)[::-1] for part in weight.chunk(3)]
    return [torch.cat(pieces) for pieces in zip(*kinds, strict=True)]


@HEADS.wrong("GPU 0 of 2", "other rows than those of its heads, 0 to 1")
def every_second_head(weight, heads, pairs, count):
    kinds = weight.view(3, heads, -1, weight.shape[1])
    return [kinds[:, rank::count].reshape(-1, weight.shape[1]) for rank in range(count)]


@HEADS.wrong("GPU 0 of 2", "other rows than those of its heads, 0 to 1")
def rows_dealt_like_cards(weight, heads, pairs, count):
    return [
        torch.cat([part[rank::count] for part in weight.chunk(3)]).contiguous()
        for rank in range(count)
    ]


@HEADS.wrong("GPU 1 of 2", "other rows than those of its heads, 2 to 3")
def the_first_gpus_heads_on_all(weight, heads, pairs, count):
    return [torch.cat([part.chunk(count)[0] for part in weight.chunk(3)])] * count


@HEADS.wrong("GPU 0's tensor has shape (12, 4), and should have (12, 8)")
def half_the_columns_of_the_right_rows(weight, heads, pairs, count):
    kinds = [part.chunk(count) for part in weight.chunk(3)]
    parts = [torch.cat(pieces) for pieces in zip(*kinds, strict=True)]
    return [part[:, : part.shape[1] // count] for part in parts]


@HEADS.wrong("for GPU 0 there is a tuple", "should be a tensor")
def pieces_that_are_not_joined(weight, heads, pairs, count):
    return list(zip(*(part.chunk(count) for part in weight.chunk(3)), strict=True))


@HEADS.wrong("GPU 0's tensor has shape (8, 8)")
def only_queries_and_keys(weight, heads, pairs, count):
    queries, keys, _ = (part.chunk(count) for part in weight.chunk(3))
    return [torch.cat(pieces) for pieces in zip(queries, keys, strict=True)]


# ------------------------------------------------------------------------- 3. the best token


def winners(scores):
    """Each part's highest scores, their places in the vocabulary, all on the first GPU."""
    home, start = scores[0].device, 0
    values, places = [], []
    for part in scores:
        value, place = part.max(dim=-1)
        values.append(value.to(home))
        places.append((place + start).to(home))
        start += part.shape[-1]
    return torch.stack(values), torch.stack(places)


def best_on(home, scores):
    """The right indices, found on one device."""
    values, places, start = [], [], 0
    for part in scores:
        value, place = part.max(dim=-1)
        values.append(value.to(home))
        places.append((place + start).to(home))
        start += part.shape[-1]
    return torch.stack(places).gather(0, torch.stack(values).argmax(0)[None])[0]


@BEST.right
def a_running_winner(scores):
    home, start = scores[0].device, 0
    best = place = None
    for part in scores:
        value, here = (each.to(home) for each in part.max(dim=-1))
        here = here + start
        start += part.shape[-1]
        if best is None:
            best, place = value, here
        else:
            higher = value > best
            best, place = torch.where(higher, value, best), torch.where(higher, here, place)
    return place


@BEST.right
def a_chain_from_the_last_to_the_first(scores):
    ends = torch.tensor([part.shape[-1] for part in scores]).cumsum(0).tolist()
    best = place = None
    for part, end in zip(reversed(scores), reversed(ends), strict=True):
        value, here = part.max(dim=-1)
        here = here + end - part.shape[-1]
        if best is not None:
            theirs, there = best.to(part.device), place.to(part.device)
            higher = theirs > value  # of equal ones that in front
            value, here = torch.where(higher, theirs, value), torch.where(higher, there, here)
        best, place = value, here
    return place


@BEST.right
def columns_side_by_side(scores):
    values, places = winners(scores)
    rows = torch.arange(places.shape[1], device=places.device)
    return places.T[rows, values.T.argmax(1)]


@BEST.right
def the_smallest_index_among_the_highest(scores):
    values, places = winners(scores)
    return places.masked_fill(values < values.amax(0), 10**9).amin(0)


@BEST.right
def a_score_and_a_place_in_one_tensor(scores):
    home, start = scores[0].device, 0
    pairs = []
    for part in scores:
        value, place = part.double().max(dim=-1)
        pairs.append(torch.stack([value, place.double() + start]).to(home))
        start += part.shape[-1]
    values, places = torch.stack(pairs, 1)
    return places.gather(0, values.argmax(0)[None])[0].long()


@BEST.right
def winners_sent_to_every_gpu(scores):
    first, *_ = [best_on(part.device, scores) for part in scores]
    return first


@BEST.right
def starts_that_come_from_the_host(scores):
    home = scores[0].device
    starts = torch.tensor([0, *(part.shape[-1] for part in scores)]).cumsum(0).to(home)
    values, places = zip(*(part.max(dim=-1) for part in scores), strict=True)
    winner = torch.stack([value.to(home) for value in values]).argmax(0)
    place = torch.stack([each.to(home) for each in places]).gather(0, winner[None])[0]
    return place + starts[winner]


@BEST.right
def short_whole_numbers(scores):
    values, places = winners(scores)
    return places.gather(0, values.argmax(0)[None])[0].int()


@BEST.wrong("places within a part", "where the part begins")
def places_within_the_part(scores):
    home = scores[0].device
    values, places = zip(*(part.max(dim=-1) for part in scores), strict=True)
    winner = torch.stack([value.to(home) for value in values]).argmax(0)
    return torch.stack([place.to(home) for place in places]).gather(0, winner[None])[0]


@BEST.wrong("more than 16 bytes a row", "send winners, not scores")
def gathering_the_scores(scores):
    return torch.cat([part.to(scores[0].device) for part in scores], -1).argmax(-1)


@BEST.wrong("of two equal scores the first one counts")
def the_later_of_two_equal_ones(scores):
    values, places = winners(scores)
    winner = len(scores) - 1 - values.flip(0).argmax(0)
    return places.gather(0, winner[None])[0]


@BEST.wrong("of two equal scores the first one counts")
def a_running_winner_that_gives_way(scores):
    values, places = winners(scores)
    best, place = values[0], places[0]
    for value, here in zip(values[1:], places[1:], strict=True):
        place = torch.where(value >= best, here, place)
        best = torch.maximum(value, best)
    return place


@BEST.wrong("[30, 25, 7, 38]", "parts may be of different sizes")
def parts_as_large_as_the_first(scores):
    home = scores[0].device
    values = torch.stack([part.amax(-1).to(home) for part in scores])
    places = torch.stack(
        [
            (part.argmax(-1) + rank * scores[0].shape[-1]).to(home)
            for rank, part in enumerate(scores)
        ]
    )
    return places.gather(0, values.argmax(0)[None])[0]


@BEST.wrong("[30, 25, 7, 38]", "parts may be of different sizes")
def a_vocabulary_that_divides(scores):
    home, values, places = scores[0].device, [], []
    even = sum(part.shape[-1] for part in scores) // len(scores)
    for rank, part in enumerate(scores):
        value, place = part.max(dim=-1)
        values.append(value.to(home))
        places.append((place + rank * even).to(home))
    return torch.stack(places).gather(0, torch.stack(values).argmax(0)[None])[0]


@BEST.wrong("the result is on vgpu:2", "should be on vgpu:0")
def a_result_on_the_last_gpu(scores):
    return best_on(scores[-1].device, scores)


@BEST.wrong("the result is on cpu", "should be on vgpu:0")
def a_result_on_the_host(scores):
    values, places = winners(scores)
    return places.gather(0, values.argmax(0)[None])[0].cpu()


@BEST.wrong("over the host", "from GPU to GPU")
def winners_over_the_host(scores):
    return best_on("cpu", scores).to(scores[0].device)


@BEST.wrong("indices are whole numbers", "torch.float32", "Are they scores?")
def the_score_in_place_of_the_index(scores):
    return winners(scores)[0].amax(0)


@BEST.wrong("which GPU has the highest score", "not which token")
def the_gpu_of_the_winner(scores):
    return winners(scores)[0].argmax(0)


@BEST.wrong("indices are whole numbers", "torch.float64", "Add `.long()`.", unsaid="scores")
def an_index_that_is_no_whole_number(scores):
    values, places = winners(scores)
    return places.gather(0, values.argmax(0)[None])[0].double()


@BEST.wrong("one index a row", "shape (50,), and not (3, 50)")
def a_winner_of_each_part(scores):
    return winners(scores)[1]


@BEST.wrong("one index a row", "shape (50,), and not (1, 50)")
def a_dimension_too_many(scores):
    values, places = winners(scores)
    return places.gather(0, values.argmax(0)[None])


@BEST.wrong("a tensor of 50 indices", "a list")
def a_list_of_numbers(scores):
    values, places = winners(scores)
    return places.gather(0, values.argmax(0)[None])[0].tolist()


@BEST.wrong("returned None", "return statement")
def nothing_found(scores):
    winners(scores)


@BEST.wrong("some are not the highest score of their row")
def the_first_part_alone_is_looked_at(scores):
    return scores[0].argmax(-1)


@BEST.wrong("some are not the highest score of their row")
def the_lowest_score(scores):
    values, places = winners([-part for part in scores])
    return places.gather(0, values.argmax(0)[None])[0]


@BEST.wrong("some are not the highest score of their row")
def zero_where_a_part_has_no_score(scores):
    home, width = scores[0].device, sum(part.shape[-1] for part in scores)
    best, place = torch.zeros(len(scores[0]), device=home), None
    values, places = winners(scores)
    place = torch.full_like(places[0], width - 1)
    for value, here in zip(values, places, strict=True):
        place = torch.where(value > best, here, place)
        best = torch.maximum(value, best)
    return place


@BEST.wrong("stopped with RuntimeError", "same device")
def a_stack_across_devices(scores):
    return torch.stack([part.amax(-1) for part in scores]).argmax(0)


@BEST.wrong("the host read", "one by one", "argmax")
def reading_each_number(scores):
    places, home = [], scores[0].device
    for row in range(len(scores[0])):
        best, place, start = None, 0, 0
        for part in scores:
            value, here = (each.item() for each in part[row].max(dim=-1))
            if best is None or value > best:
                best, place = value, start + here
            start += part.shape[-1]
        places.append(place)
    return torch.tensor(places).to(home)


# ---------------------------------------------------------------------- 4. what a block costs


def operations(B, T, D, N):
    """Of one GPU."""
    return (24 * B * T * D**2 + 4 * B * T**2 * D) / N


def bytes_of_rings(B, T, D, N):
    """That one GPU sends: two rings of two halves."""
    return 2 * 2 * (N - 1) * B * T * D * 4 / N


@BLOCK.right
def by_formula(B, T, D, N):
    return operations(B, T, D, N), bytes_of_rings(B, T, D, N)


@BLOCK.right
def layer_by_layer(B, T, D, N):
    layers = [(D, 3 * D // N), (D // N, D), (D, 4 * D // N), (4 * D // N, D)]
    linear = sum(2 * B * T * rows * columns for rows, columns in layers)
    chunk = B * T * D * 4 / N
    return [linear + 2 * 2 * B * T * T * D // N, chunk * (N - 1) * 4]


@BLOCK.wrong("for B=3, T=32, D=48, N=8 you count", "an addition: count both")
def multiplications_alone(B, T, D, N):
    return operations(B, T, D, N) / 2, bytes_of_rings(B, T, D, N)


@BLOCK.wrong("Attention's two products are missing")
def no_attention(B, T, D, N):
    return 24 * B * T * D**2 / N, bytes_of_rings(B, T, D, N)


@BLOCK.wrong("operations and the meter", "Count one of its six products after the other.")
def the_layer_behind_the_heads_forgotten(B, T, D, N):
    return (22 * B * T * D**2 + 4 * B * T**2 * D) / N, bytes_of_rings(B, T, D, N)


@BLOCK.wrong("operations and the meter", "Count one of its six products after the other.")
def queries_alone_instead_of_three(B, T, D, N):
    return (20 * B * T * D**2 + 4 * B * T**2 * D) / N, bytes_of_rings(B, T, D, N)


@BLOCK.wrong("operations and the meter", "Count one of its six products after the other.")
def an_mlp_of_one_way(B, T, D, N):
    return (16 * B * T * D**2 + 4 * B * T**2 * D) / N, bytes_of_rings(B, T, D, N)


@BLOCK.wrong("Attention's products come to half of theirs")
def one_product_of_attention(B, T, D, N):
    return (24 * B * T * D**2 + 2 * B * T**2 * D) / N, bytes_of_rings(B, T, D, N)


@BLOCK.wrong("what all GPUs do together")
def the_whole_block(B, T, D, N):
    return N * operations(B, T, D, N), bytes_of_rings(B, T, D, N)


@BLOCK.wrong("each GPU has H/N of them")
def attention_on_every_gpu(B, T, D, N):
    return 24 * B * T * D**2 / N + 4 * B * T**2 * D, bytes_of_rings(B, T, D, N)


@BLOCK.wrong("forward and backward")
def backward_too(B, T, D, N):
    return 3 * operations(B, T, D, N), bytes_of_rings(B, T, D, N)


@BLOCK.wrong("a block has two all-reduces, a ring has two halves")
def one_all_reduce(B, T, D, N):
    return operations(B, T, D, N), bytes_of_rings(B, T, D, N) / 2


@BLOCK.wrong("is it numbers, and not bytes?")
def numbers_not_bytes(B, T, D, N):
    return operations(B, T, D, N), bytes_of_rings(B, T, D, N) / 4


@BLOCK.wrong("only forward was asked for", "its four layers have two all-reduces")
def four_all_reduces(B, T, D, N):
    return operations(B, T, D, N), 2 * bytes_of_rings(B, T, D, N)


@BLOCK.wrong("all chunks but one")
def whole_tensors_round_the_ring(B, T, D, N):
    return operations(B, T, D, N), 2 * 2 * B * T * D * 4


@BLOCK.wrong("nobody sends the whole tensor to everybody")
def everything_to_everybody(B, T, D, N):
    return operations(B, T, D, N), 2 * (N - 1) * B * T * D * 4


@BLOCK.wrong("yours are exchanged")
def bytes_before_operations(B, T, D, N):
    return bytes_of_rings(B, T, D, N), operations(B, T, D, N)


@BLOCK.wrong("return two numbers")
def operations_alone(B, T, D, N):
    return operations(B, T, D, N)


@BLOCK.wrong("returned None: is a return statement missing?")
def no_bytes(B, T, D, N):
    return operations(B, T, D, N), None
