"""The checks of lesson 12 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.nn import functional as F

import course_lib
from course_lib.exercises import lesson_12
from course_lib.parallel.collectives import all_gather, ring_all_reduce
from course_lib.parallel.ring import Ring
from exercise_answers import Answers

BROADCAST = Answers("12", "broadcast", lesson_12.check_broadcast)
ROUNDS = Answers("12", "rounds", lesson_12.check_rounds)
QUEUE = Answers("12", "queue", lesson_12.check_queue)
BALANCE = Answers("12", "balance", lesson_12.check_balance)
GROUPS = Answers("12", "groups", lesson_12.check_groups)
EXERCISES = [BROADCAST, ROUNDS, QUEUE, BALANCE, GROUPS]


# -------------------------------------------------------------------- 1. a broadcast by levels


def chunks_of(nodes):
    return [[tensor.view(-1).tensor_split(len(node)) for tensor in node] for node in nodes]


def scatter(of_node):
    for place, chunks in enumerate(of_node[1:], 1):
        chunks[place].copy_(of_node[0][place])


def gather(node, of_node):
    ring = Ring([tensor.device for tensor in node])
    with ring.turning():
        ring.all_gather(of_node)


@BROADCAST.right
def from_node_to_node(nodes):
    chunks = chunks_of(nodes)
    scatter(chunks[0])
    for before, after in pairwise(chunks):
        for place in range(len(before)):
            after[place][place].copy_(before[place][place])
    for node, of_node in zip(nodes, chunks, strict=True):
        gather(node, of_node)


@BROADCAST.right
def gathered_with_all_gather(nodes):
    chunks = chunks_of(nodes)
    scatter(chunks[0])
    for other in chunks[1:]:
        for place, of_gpu in enumerate(other):
            of_gpu[place].copy_(chunks[0][place][place])
    for node, of_node in zip(nodes, chunks, strict=True):
        wholes = all_gather([of_gpu[place].clone() for place, of_gpu in enumerate(of_node)])
        for tensor, whole in zip(node, wholes, strict=True):
            tensor.view(-1).copy_(whole)


@BROADCAST.wrong("2 times one tensor for each other node", "faster links")
def to_everybody(nodes):
    first = nodes[0][0]
    for node in nodes:
        for tensor in node:
            if tensor is not first:
                tensor.copy_(first)


@BROADCAST.wrong("leaves through 1 of 2 cards", "spread it over the first node")
def chunks_from_the_first_gpu(nodes):
    chunks = chunks_of(nodes)
    scatter(chunks[0])
    for other in chunks[1:]:
        for place, of_gpu in enumerate(other):
            of_gpu[place].copy_(chunks[0][0][place])
    for node, of_node in zip(nodes, chunks, strict=True):
        gather(node, of_node)


@BROADCAST.wrong("cards receive nothing", "cut the tensor up")
def through_the_first_of_each_node(nodes):
    for node in nodes:
        if node is not nodes[0]:
            node[0].copy_(nodes[0][0])
        for tensor in node[1:]:
            tensor.copy_(node[0])


@BROADCAST.wrong("of the numbers on GPU 1 are those of GPU 0")
def without_the_gather(nodes):
    chunks = chunks_of(nodes)
    scatter(chunks[0])
    for other in chunks[1:]:
        for place, of_gpu in enumerate(other):
            of_gpu[place].copy_(chunks[0][place][place])


@BROADCAST.wrong("with 3 nodes of 2: ", "of the numbers on GPU 2")
def inside_the_first_node_alone(nodes):
    for tensor in nodes[0][1:]:
        tensor.copy_(nodes[0][0])


@BROADCAST.wrong("the tensor went over the host")
def over_the_host(nodes):
    whole = nodes[0][0].cpu()
    for node in nodes:
        for tensor in node:
            tensor.copy_(whole)


@BROADCAST.wrong("the tensor that is sent changed")
def a_sum_in_place_of_a_copy(nodes):
    ring_all_reduce([tensor for node in nodes for tensor in node])


@BROADCAST.wrong("copies wait for each other")
def gathered_copy_by_copy(nodes):
    chunks = chunks_of(nodes)
    scatter(chunks[0])
    for other in chunks[1:]:
        for place, of_gpu in enumerate(other):
            of_gpu[place].copy_(chunks[0][place][place])
            course_lib.synchronize()
    for of_node in chunks:
        for place, owner in enumerate(of_node):
            for of_gpu in of_node:
                if of_gpu is not owner:
                    of_gpu[place].copy_(owner[place])


# ------------------------------------------------------------------ 2. rounds that do not mix


@ROUNDS.right
def inside_first_and_then_across(nodes, size):
    def going(far, along):
        return [(rank // size + far) % nodes * size + (rank + along) % size
                for rank in range(nodes * size)]  # fmt: skip

    inside = [going(0, along) for along in range(1, size)]
    return inside + [going(far, along) for far in range(1, nodes) for along in range(size)]


@ROUNDS.right
def across_first_as_tuples(nodes, size):
    plan = []
    for far in reversed(range(nodes)):
        for along in range(size):
            to = []
            for rank in range(nodes * size):
                node, place = divmod(rank, size)
                to.append((node + far) % nodes * size + (place - along) % size)
            if to != list(range(nodes * size)):
                plan.append(tuple(to))
    return plan


@ROUNDS.wrong("as its copies would without a wait", "rank 0 sends inside its node, and rank 1")
def as_in_the_lesson(nodes, size):
    count = nodes * size
    return [[(rank + k) % count for rank in range(count)] for k in range(1, count)]


@ROUNDS.wrong("with 3 nodes of 2: in round 1 every one of the 6 ranks should be sent to once")
def exclusive_or(nodes, size):
    count = nodes * size
    return [[rank ^ k for rank in range(count)] for k in range(1, count)]


@ROUNDS.wrong("sends to itself")
def with_the_own_part(nodes, size):
    return [[(r // size + far) % nodes * size + (r + along) % size for r in range(nodes * size)]
            for far in range(nodes) for along in range(size)]  # fmt: skip


@ROUNDS.wrong("never sends to rank")
def across_alone(nodes, size):
    return inside_first_and_then_across(nodes, size)[size:]


@ROUNDS.wrong("a second time")
def twice(nodes, size):
    return inside_first_and_then_across(nodes, size) * 2


@ROUNDS.wrong("in round 0 every one of the 4 ranks should be sent to once")
def not_filled_in(nodes, size):
    return [[None] * (nodes * size)] * (nodes * size - 1)


@ROUNDS.wrong("return a list of rounds")
def pairs(nodes, size):
    return [0, 1]


# --------------------------------------------------------------------------- 3. one queue


def placed(choice, experts, capacity, before):
    chosen = F.one_hot(choice, experts)
    queue = ((chosen.cumsum(0) - 1 + before) * chosen).sum(-1)
    return torch.where(queue < capacity, choice * capacity + queue, experts * capacity)


def counts_of(choices, experts):
    return [F.one_hot(choice, experts).sum(0) for choice in choices]


@QUEUE.right
def counts_handed_on(choices, experts, capacity):
    counts, places = counts_of(choices, experts), []
    before = torch.zeros_like(counts[0])
    for choice, count in zip(choices, counts, strict=True):
        before = before.to(choice.device)
        places.append(placed(choice, experts, capacity, before))
        before = before + count
    return places


@QUEUE.right
def each_asks_those_before(choices, experts, capacity):
    counts, places = counts_of(choices, experts), []
    for rank, choice in enumerate(choices):
        asked = [count.to(choice.device) for count in counts[:rank]]
        places.append(placed(choice, experts, capacity, sum(asked)))
    return places


@QUEUE.wrong("with 2 GPUs", "at the head of the queue")
def a_queue_on_each(choices, experts, capacity):
    return [placed(choice, experts, capacity, 0) for choice in choices]


@QUEUE.wrong("its share of the places to itself")
def a_share_of_the_places_each(choices, experts, capacity):
    share = -(-capacity // len(choices))
    return [placed(choice, experts, share, 0) for choice in choices]


@QUEUE.wrong("with 1 GPU", "behind its own ones too")
def behind_oneself(choices, experts, capacity):
    totals = all_gather([count.unsqueeze(0) for count in counts_of(choices, experts)])
    return [placed(choice, experts, capacity, totals[rank][: rank + 1].sum(0))
            for rank, choice in enumerate(choices)]  # fmt: skip


@QUEUE.wrong("more travels than a count for each expert")
def all_choices_travel(choices, experts, capacity):
    wholes = all_gather(choices)
    return [placed(whole, experts, capacity, 0).chunk(len(choices))[rank]
            for rank, whole in enumerate(wholes)]  # fmt: skip


@QUEUE.wrong("numbers went over the host")
def counts_on_the_host(choices, experts, capacity):
    counts, places = [count.cpu() for count in counts_of(choices, experts)], []
    for rank, choice in enumerate(choices):
        before = torch.stack(counts)[:rank].sum(0).to(choice.device)
        places.append(placed(choice, experts, capacity, before))
    return places


@QUEUE.wrong("belongs in row")
def dropped_as_minus_one(choices, experts, capacity):
    places = counts_handed_on(choices, experts, capacity)
    return [torch.where(place < experts * capacity, place, -1) for place in places]


# ------------------------------------------------------------------------------ 4. balance


def shares_of(scores, top_k):
    return [F.one_hot(each.topk(top_k).indices, each.shape[1]).sum((0, 1)) / (len(each) * top_k)
            for each in scores]  # fmt: skip


def balanced(scores, shares, scale):
    return [each.shape[1] * (share * each.softmax(-1).mean(0)).sum() * scale
            for each, share in zip(scores, shares, strict=True)]  # fmt: skip


@BALANCE.right
def shares_summed(scores, top_k):
    shares = shares_of(scores, top_k)
    ring_all_reduce(shares)
    return balanced(scores, shares, 1 / len(scores) ** 2)


@BALANCE.right
def counts_summed_and_divided(scores, top_k):
    counts = [F.one_hot(each.topk(top_k).indices, each.shape[1]).sum((0, 1)) for each in scores]
    ring_all_reduce(counts)
    return balanced(scores, [count / count.sum() for count in counts], 1 / len(scores))


@BALANCE.right
def shares_and_losses_in_single_precision(scores, top_k):
    shares = [share.float() for share in shares_of(scores, top_k)]
    ring_all_reduce(shares)
    return [loss.float() for loss in balanced(scores, shares, 1 / len(scores) ** 2)]


@BALANCE.wrong("with 2 GPUs: GPU 1's loss is on vgpu:0")
def all_losses_on_one_gpu(scores, top_k):
    losses = shares_and_losses_in_single_precision(scores, top_k)
    return [loss.to(losses[0].device) for loss in losses]


@BALANCE.wrong("the mean of the GPUs' own losses")
def own_tokens_alone(scores, top_k):
    return balanced(scores, shares_of(scores, top_k), 1 / len(scores))


@BALANCE.wrong("the sum of the GPUs' own losses")
def own_tokens_and_no_mean(scores, top_k):
    return balanced(scores, shares_of(scores, top_k), 1)


@BALANCE.wrong("It is 2 times that")
def the_whole_loss_on_each(scores, top_k):
    shares = shares_of(scores, top_k)
    ring_all_reduce(shares)
    return balanced(scores, shares, 1 / len(scores))


@BALANCE.wrong("GPU 0's loss has no way back to its scores")
def without_a_gradient(scores, top_k):
    return [loss.detach() for loss in shares_summed(scores, top_k)]


@BALANCE.wrong("add up to")
def probabilities_for_shares(scores, top_k):
    shares = [each.detach().softmax(-1).mean(0) for each in scores]
    ring_all_reduce(shares)
    return balanced(scores, shares, 1 / len(scores) ** 2)


@BALANCE.wrong("with 4 GPUs", "add up to")
def first_choices_alone(scores, top_k):
    return shares_summed(scores, 1)


@BALANCE.wrong("more travels than an all-reduce of one number an expert")
def scores_gathered(scores, top_k):
    wholes = all_gather([each.detach() for each in scores])
    shares = [shares_of([whole], top_k)[0] for whole in wholes]
    return balanced(scores, shares, 1 / len(scores))


@BALANCE.wrong("numbers went over the host")
def shares_on_the_host(scores, top_k):
    total = sum(share.cpu() for share in shares_of(scores, top_k))
    return balanced(scores, [total.to(each.device) for each in scores], 1 / len(scores) ** 2)


# ------------------------------------------------------------------------------- 5. groups

NODE, ACROSS = [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 2, 4, 6], [1, 3, 5, 7]]


@GROUPS.right
def fewer_tokens_than_hidden_numbers(tokens, width, hidden):
    return NODE if tokens > hidden else ACROSS


@GROUPS.right
def other_neighbours(tokens, width, hidden):
    return NODE if 4 * tokens * width > 4 * hidden * width else [[0, 1, 4, 5], [2, 3, 6, 7]]


@GROUPS.wrong("64 tokens a GPU", "keep the gradients inside a node")
def always_a_node(tokens, width, hidden):
    return NODE


@GROUPS.wrong("1024 tokens a GPU", "keep the tokens inside a node")
def always_across(tokens, width, hidden):
    return ACROSS


@GROUPS.wrong("64 tokens a GPU", "keep the gradients inside a node")
def the_other_way_round(tokens, width, hidden):
    return NODE if tokens < hidden else ACROSS


@GROUPS.wrong("64 tokens a GPU", "keep the gradients inside a node")
def copies_in_different_nodes(tokens, width, hidden):
    return NODE if tokens > hidden else [[0, 1, 6, 7], [4, 5, 2, 3]]


@GROUPS.wrong("two lists of four ranks")
def names(tokens, width, hidden):
    return "node"


@GROUPS.wrong("each of the ranks 0 to 7 is in one group")
def one_rank_twice(tokens, width, hidden):
    return [[0, 1, 2, 3], [3, 4, 5, 6]]
