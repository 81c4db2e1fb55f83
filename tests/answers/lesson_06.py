"""The checks of lesson 06 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from course_lib.exercises import lesson_06
from exercise_answers import Answers

ROW = Answers("06", "row", lesson_06.check_row)
HEADS = Answers("06", "heads", lesson_06.check_heads)
BEST = Answers("06", "best", lesson_06.check_best)
EXERCISES = [ROW, HEADS, BEST]


# ---------------------------------------------------------------- 1. a row layer with its bias


def terms(xs, weights):
    """Each GPU's term of the sum, without the bias."""
    return [x @ weight.T for x, weight in zip(xs, weights, strict=True)]


@ROW.right
def adding_in_place(xs, weights, biases, all_reduce):
    outs = terms(xs, weights)
    all_reduce(outs)
    for out, bias in zip(outs, biases, strict=True):
        out += bias
    return outs


@ROW.right
def a_bias_in_the_first_term_alone(xs, weights, biases, all_reduce):
    outs = terms(xs, weights)
    outs[0] = F.linear(xs[0], weights[0], biases[0])
    all_reduce(outs)
    return outs


@ROW.right
def a_share_of_the_bias_in_each_term(xs, weights, biases, all_reduce):
    outs = [
        F.linear(x, weight, bias / len(xs))
        for x, weight, bias in zip(xs, weights, biases, strict=True)
    ]
    all_reduce(outs)
    return outs


@ROW.right
def a_tuple(xs, weights, biases, all_reduce):
    outs = terms(xs, weights)
    all_reduce(outs)
    return tuple(map(torch.add, outs, biases))


@ROW.right
def the_bias_less_the_others(xs, weights, biases, all_reduce):
    outs = [F.linear(*each) for each in zip(xs, weights, biases, strict=True)]
    all_reduce(outs)
    return [out - (len(xs) - 1) * bias for out, bias in zip(outs, biases, strict=True)]


@ROW.right
def a_sum_on_the_first_gpu_that_is_copied(xs, weights, biases, all_reduce):
    home = biases[0].device
    total = sum(term.to(home) for term in terms(xs, weights))
    return [total.to(bias.device) + bias for bias in biases]


@ROW.wrong("with 2 GPUs", "the bias is in it 2 times", "after the sum")
def a_bias_in_each_term(xs, weights, biases, all_reduce):
    outs = [F.linear(*each) for each in zip(xs, weights, biases, strict=True)]
    all_reduce(outs)
    return outs


@ROW.wrong("with 2 GPUs", "the bias is in it 3 times", "once")
def a_bias_before_and_after(xs, weights, biases, all_reduce):
    outs = [F.linear(*each) for each in zip(xs, weights, biases, strict=True)]
    all_reduce(outs)
    return [out + bias for out, bias in zip(outs, biases, strict=True)]


@ROW.wrong("the bias is missing")
def no_bias(xs, weights, biases, all_reduce):
    outs = terms(xs, weights)
    all_reduce(outs)
    return outs


@ROW.wrong("with 2 GPUs", "the bias is in it 0.5 times", "once")
def a_share_of_the_bias_after_the_sum(xs, weights, biases, all_reduce):
    outs = terms(xs, weights)
    all_reduce(outs)
    return [out + bias / len(xs) for out, bias in zip(outs, biases, strict=True)]


@ROW.wrong("vgpu:0", "only its own term", "the sum of all is needed on every GPU")
def no_all_reduce(xs, weights, biases, all_reduce):
    return [out + bias for out, bias in zip(terms(xs, weights), biases, strict=True)]


@ROW.wrong("vgpu:0", "only its own term")
def adding_up_what_is_thrown_away(xs, weights, biases, all_reduce):
    all_reduce(terms(xs, weights))
    return [F.linear(*each) for each in zip(xs, weights, biases, strict=True)]


@ROW.wrong("stopped with TypeError", "NoneType")
def what_all_reduce_returns(xs, weights, biases, all_reduce):
    sums = all_reduce(terms(xs, weights))
    return [total + bias for total, bias in zip(sums, biases, strict=True)]


@ROW.wrong("every term is in it 2 times", "one all-reduce is enough")
def reducing_again_after_the_sum(xs, weights, biases, all_reduce):
    outs = terms(xs, weights)
    all_reduce(outs)
    all_reduce(outs)
    return [out + bias for out, bias in zip(outs, biases, strict=True)]


@ROW.wrong("one all-reduce of the terms is enough", "biases need not move")
def an_all_reduce_of_the_biases_too(xs, weights, biases, all_reduce):
    outs = terms(xs, weights)
    shares = [bias / len(xs) for bias in biases]
    all_reduce(outs)
    all_reduce(shares)
    return [out + bias for out, bias in zip(outs, shares, strict=True)]


@ROW.wrong("one all-reduce of the terms is enough", "weights, inputs")
def gathering_all_inputs(xs, weights, biases, all_reduce):
    return [
        F.linear(
            torch.cat([x.to(bias.device) for x in xs], 1),
            torch.cat([weight.to(bias.device) for weight in weights], 1),
            bias,
        )
        for bias in biases
    ]


@ROW.wrong("one all-reduce of the terms is enough")
def every_gpu_pulling_from_every_other(xs, weights, biases, all_reduce):
    outs = terms(xs, weights)
    return [sum(out.to(bias.device) for out in outs) + bias for bias in biases]


@ROW.wrong("over the host", "from GPU to GPU")
def a_sum_on_the_host(xs, weights, biases, all_reduce):
    total = sum(term.cpu() for term in terms(xs, weights))
    return [total.to(bias.device) + bias for bias in biases]


@ROW.wrong("return a list of 2 tensors for 2 GPUs")
def a_single_tensor(xs, weights, biases, all_reduce):
    outs = terms(xs, weights)
    all_reduce(outs)
    return outs[0] + biases[0]


@ROW.wrong("returned None", "return statement")
def nothing_returned(xs, weights, biases, all_reduce):
    all_reduce(terms(xs, weights))


@ROW.wrong("return a list of 2 tensors for 2 GPUs")
def everything_on_the_first_gpu(xs, weights, biases, all_reduce):
    home = biases[0].device
    return [sum(term.to(home) for term in terms(xs, weights)) + biases[0]]


@ROW.wrong("one result is on vgpu:0", "should be on vgpu:1")
def the_first_gpus_result_twice(xs, weights, biases, all_reduce):
    outs = terms(xs, weights)
    all_reduce(outs)
    return [outs[0] + biases[0] for _ in xs]


@ROW.wrong("vgpu:1", "only its own term", "the sum of all is needed on every GPU")
def a_sum_on_the_first_gpu_alone(xs, weights, biases, all_reduce):
    outs = terms(xs, weights)
    outs[0] = sum(out.to(outs[0].device) for out in outs)
    return [out + bias for out, bias in zip(outs, biases, strict=True)]


@ROW.wrong("GPU 0's tensor has shape (6, 10)", "should have (6, 5)")
def the_pieces_side_by_side(xs, weights, biases, all_reduce):
    return [torch.cat([out, out], 1) for out in terms(xs, weights)]


@ROW.wrong("stopped with RuntimeError")
def a_weight_the_wrong_way_round(xs, weights, biases, all_reduce):
    return [x @ weight for x, weight in zip(xs, weights, strict=True)]


@ROW.wrong("stopped with RuntimeError", "same device")
def adding_across_devices(xs, weights, biases, all_reduce):
    return [sum(terms(xs, weights)) + bias for bias in biases]


# -------------------------------------------------------------------------- 2. cut by heads


@HEADS.right
def with_views(weight, heads, count):
    kinds = weight.view(3, count, -1, weight.shape[1])
    return [kinds[:, rank].reshape(-1, weight.shape[1]) for rank in range(count)]


@HEADS.right
def head_by_head(weight, heads, count):
    width = weight.shape[1]
    head_width, each = width // heads, heads // count
    parts = []
    for rank in range(count):
        pieces = []
        for kind in range(3):
            for head in range(rank * each, (rank + 1) * each):
                begin = kind * width + head * head_width
                pieces.append(weight[begin : begin + head_width])
        parts.append(torch.cat(pieces))
    return parts


@HEADS.right
def row_numbers(weight, heads, count):
    rows = torch.arange(len(weight)).view(3, count, -1)
    return [weight[rows[:, rank].flatten()] for rank in range(count)]


@HEADS.right
def a_transpose_and_a_chunk(weight, heads, count):
    by_rank = weight.unflatten(0, (3, count, -1)).transpose(0, 1)
    return tuple(by_rank.reshape(weight.shape).chunk(count))


@HEADS.wrong("GPU 0 of 2", "one piece of the rows", "cut queries, keys and values each")
def chunks(weight, heads, count):
    return weight.chunk(count)


@HEADS.wrong("return a list of 2 tensors for 2 GPUs")
def thirds(weight, heads, count):
    return weight.chunk(3)


@HEADS.wrong("return a list of 2 tensors for 2 GPUs")
def a_part_for_each_head(weight, heads, count):
    kinds = [part.chunk(heads) for part in weight.chunk(3)]
    return [torch.cat(pieces) for pieces in zip(*kinds, strict=True)]


@HEADS.wrong("return a list of 2 tensors for 2 GPUs")
def the_first_part_alone(weight, heads, count):
    return [torch.cat([part.chunk(count)[0] for part in weight.chunk(3)])]


@HEADS.wrong("return a list of 2 tensors for 2 GPUs")
def a_single_tensor_of_all_parts(weight, heads, count):
    return torch.stack(weight.chunk(count))


@HEADS.wrong("returned None", "return statement")
def no_parts(weight, heads, count):
    weight.chunk(count)


@HEADS.wrong("GPU 0 of 2", "right rows in another order", "first come its queries")
def each_head_with_its_queries_keys_and_values(weight, heads, count):
    kinds = [part.chunk(heads) for part in weight.chunk(3)]
    by_head = torch.cat([torch.cat(pieces) for pieces in zip(*kinds, strict=True)])
    return by_head.chunk(count)


@HEADS.wrong("GPU 0", "right rows in another order", "then its keys, then its values")
def values_before_keys(weight, heads, count):
    queries, keys, values = (part.chunk(count) for part in weight.chunk(3))
    return [torch.cat(pieces) for pieces in zip(queries, values, keys, strict=True)]


@HEADS.wrong("GPU 0 of 2", "other rows than those of its heads, 0 to 1")
def the_last_gpus_heads_first(weight, heads, count):
    kinds = [part.chunk(count)[::-1] for part in weight.chunk(3)]
    return [torch.cat(pieces) for pieces in zip(*kinds, strict=True)]


@HEADS.wrong("GPU 0 of 2", "other rows than those of its heads, 0 to 1")
def every_second_head(weight, heads, count):
    kinds = weight.view(3, heads, -1, weight.shape[1])
    return [kinds[:, rank::count].reshape(-1, weight.shape[1]) for rank in range(count)]


@HEADS.wrong("GPU 0 of 2", "other rows than those of its heads, 0 to 1")
def rows_dealt_like_cards(weight, heads, count):
    return [
        torch.cat([part[rank::count] for part in weight.chunk(3)]).contiguous()
        for rank in range(count)
    ]


@HEADS.wrong("GPU 1 of 2", "other rows than those of its heads, 2 to 3")
def the_first_gpus_heads_on_all(weight, heads, count):
    return [torch.cat([part.chunk(count)[0] for part in weight.chunk(3)])] * count


@HEADS.wrong("GPU 0's tensor has shape (12, 4), and should have (12, 8)")
def half_the_columns_of_the_right_rows(weight, heads, count):
    kinds = [part.chunk(count) for part in weight.chunk(3)]
    parts = [torch.cat(pieces) for pieces in zip(*kinds, strict=True)]
    return [part[:, : part.shape[1] // count] for part in parts]


@HEADS.wrong("for GPU 0 there is a tuple", "should be a tensor")
def pieces_that_are_not_joined(weight, heads, count):
    return list(zip(*(part.chunk(count) for part in weight.chunk(3)), strict=True))


@HEADS.wrong("GPU 0's tensor has shape (8, 8)")
def only_queries_and_keys(weight, heads, count):
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


@BEST.wrong("indices are whole numbers", "torch.float64")
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
