"""The checks of lesson 03 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from itertools import pairwise

import torch

import course_lib
from course_lib.exercises import lesson_03
from course_lib.parallel import collectives
from course_lib.parallel.data_parallel import all_reduce_gradients
from exercise_answers import Answers

BROADCAST = Answers("03", "broadcast", lesson_03.check_broadcast)
LAUNCH = Answers("03", "launch", lesson_03.check_launch)
ACCUMULATE = Answers("03", "accumulate", lesson_03.check_accumulate)
ORDERS = Answers("03", "orders", lesson_03.check_orders)
EXERCISES = [BROADCAST, LAUNCH, ACCUMULATE, ORDERS]


# ------------------------------------------------------------------- 1. a pipelined broadcast


@contextmanager
def side_streams(tensors, starting=True, finishing=True):
    """For each tensor a stream to send and one to receive, before and after which the main waits.

    Args:
        starting, finishing: whether these waits are there.
    """
    mains = [course_lib.current_stream(tensor.device) for tensor in tensors]
    sends = [course_lib.side_stream(tensor.device) for tensor in tensors]
    receives = [course_lib.side_stream(tensor.device) for tensor in tensors]
    for main, send, receive in zip(mains, sends, receives, strict=True):
        if starting:
            send.wait_stream(main), receive.wait_stream(main)
    yield sends, receives
    for main, send, receive in zip(mains, sends, receives, strict=True):
        if finishing:
            main.wait_stream(send), main.wait_stream(receive)


def line(tensors, parts=64, waiting=True, **waits):
    """The solution, with room for mistakes."""
    chunks = [tensor.tensor_split(parts) for tensor in tensors]
    with side_streams(tensors, **waits) as (sends, receives):
        for number in range(parts):
            for rank in range(len(tensors) - 1):
                with sends[rank], receives[rank + 1]:
                    chunks[rank + 1][number].copy_(chunks[rank][number])
                if waiting:
                    sends[rank + 1].wait_event(receives[rank + 1].record_event())


@BROADCAST.right
def in_128_chunks(tensors):
    line(tensors, parts=128)


@BROADCAST.right
def link_by_link_with_an_event_for_each_chunk(tensors):
    chunks = [tensor.tensor_split(50) for tensor in tensors]
    arrived = {}
    with side_streams(tensors) as (sends, receives):
        for rank in range(len(tensors) - 1):
            for number in range(50):
                if rank:
                    sends[rank].wait_event(arrived[rank, number])
                with sends[rank], receives[rank + 1]:
                    chunks[rank + 1][number].copy_(chunks[rank][number])
                arrived[rank + 1, number] = receives[rank + 1].record_event()


@BROADCAST.right
def in_rounds_that_wait_for_the_stream(tensors):
    N, parts = len(tensors), 100
    chunks = [tensor.tensor_split(parts) for tensor in tensors]
    with side_streams(tensors) as (sends, receives):
        for step in range(parts + N - 2):
            for rank in range(N - 1):
                if 0 <= step - rank < parts:
                    with sends[rank], receives[rank + 1]:
                        chunks[rank + 1][step - rank].copy_(chunks[rank][step - rank])
            for send, receive in zip(sends, receives, strict=True):
                send.wait_stream(receive)


@BROADCAST.wrong("more than one tensor", "pass on what it received")
def straight_to_each(tensors):
    for tensor in tensors[1:]:
        tensor.copy_(tensors[0])


@BROADCAST.wrong("more than one tensor")
def what_the_module_does(tensors):
    collectives.broadcast(tensors)


@BROADCAST.wrong("more than one tensor", "on 4 GPUs")
def a_tree(tensors):
    distance = 1
    while distance < len(tensors):
        for rank in range(min(distance, len(tensors) - distance)):
            tensors[rank + distance].copy_(tensors[rank])
        distance *= 2


@BROADCAST.wrong("on 4 GPUs it takes", "one chunk while it receives the next")
def whole_tensors_down_the_line(tensors):
    for sender, receiver in pairwise(tensors):
        receiver.copy_(sender)


@BROADCAST.wrong("on 4 GPUs it takes", "from a side stream to a side stream")
def chunks_on_the_main_streams(tensors):
    chunks = [tensor.tensor_split(64) for tensor in tensors]
    for number in range(64):
        for rank in range(len(tensors) - 1):
            chunks[rank + 1][number].copy_(chunks[rank][number])


@BROADCAST.wrong("it takes", "are the chunks small enough")
def chunks_too_large(tensors):
    line(tensors, parts=4)


@BROADCAST.wrong("it takes")
def one_side_stream_a_gpu(tensors):
    chunks = [tensor.tensor_split(64) for tensor in tensors]
    with side_streams(tensors) as (sides, _):
        for number in range(64):
            for rank in range(len(tensors) - 1):
                with sides[rank], sides[rank + 1]:
                    chunks[rank + 1][number].copy_(chunks[rank][number])


@BROADCAST.wrong("a wait is missing")
def not_waiting_for_a_chunk_to_come(tensors):
    line(tensors, waiting=False)


@BROADCAST.wrong("a wait is missing", "ones on vgpu:0 default stream")
def not_waiting_for_the_tensors(tensors):
    line(tensors, starting=False)


@BROADCAST.wrong("a wait is missing", "default stream writes")
def main_streams_that_do_not_wait(tensors):
    line(tensors, finishing=False)


@BROADCAST.wrong("the tensor on GPU 1 is what it was", "write into it")
def returning_copies(tensors):
    return [tensors[0].to(tensor.device) for tensor in tensors]


@BROADCAST.wrong("the tensor on GPU 1 is not that of the first GPU")
def the_last_chunk_forgotten(tensors):
    for tensor in tensors[1:]:
        for theirs, ours in list(zip(tensors[0].chunk(4), tensor.chunk(4), strict=True))[:-1]:
            ours.copy_(theirs)


@BROADCAST.wrong("the first tensor changed")
def an_all_reduce(tensors):
    collectives.ring_all_reduce(tensors)


@BROADCAST.wrong("went over the host")
def over_the_host(tensors):
    whole = tensors[0].cpu()
    for tensor in tensors[1:]:
        tensor.copy_(whole)


# --------------------------------------------------------------------- 2. the order of the rings


@LAUNCH.right
def a_list_of_flags(process, number):
    flags = process.notes.setdefault("flags", [False] * process.count)
    flags[number] = True
    started = process.notes.get("started", 0)
    while started < process.count and flags[started]:
        process.start(started)
        started += 1
    process.notes["started"] = started
    if started == process.count:
        process.notes.clear()


@LAUNCH.right
def a_number_that_goes_on_over_the_steps(process, number):
    waiting = process.notes.setdefault("waiting", set())
    waiting.add(number)
    process.notes.setdefault("next", 0)
    while process.notes["next"] % process.count in waiting:
        now = process.notes["next"] % process.count
        waiting.remove(now)
        process.start(now)
        process.notes["next"] += 1


@LAUNCH.right
def a_note_for_each_bucket(process, number):
    process.notes[number] = "full"
    for each in range(process.count):
        if process.notes.get(each) == "full":
            process.start(each)
            process.notes[each] = "started"
        if process.notes.get(each) != "started":
            return
    process.notes.clear()


@LAUNCH.wrong("in step 1 of a process with 2 buckets", "started [1], and should have started []")
def each_as_it_comes(process, number):
    process.start(number)


@LAUNCH.wrong("in step 1", "full so far [0]", "should have started [0]")
def all_at_the_end(process, number):
    full = process.notes.setdefault("full", set())
    full.add(number)
    if len(full) == process.count:
        for each in range(process.count):
            process.start(each)
        full.clear()


@LAUNCH.wrong("full so far [1, 0]", "it has started [0], and should have started [0, 1]")
def one_for_each_call(process, number):
    full = process.notes.setdefault("full", set())
    full.add(number)
    following = process.notes.setdefault("next", 0)
    if following in full:
        process.start(following)
        process.notes["next"] = (following + 1) % process.count
        full.discard(following)


@LAUNCH.wrong("in step 2", "started []", "begin at bucket 0 again")
def never_ready_for_the_second_step(process, number):
    full = process.notes.setdefault("full", set())
    full.add(number)
    process.notes.setdefault("next", 0)
    while process.notes["next"] in full:
        process.start(process.notes["next"])
        process.notes["next"] += 1


@LAUNCH.wrong("in step 1", "has started [0, 0, 1]")
def started_again_with_every_call(process, number):
    full = process.notes.setdefault("full", set())
    full.add(number)
    for each in range(process.count):
        if each not in full:
            return
        process.start(each)
    full.clear()


@LAUNCH.wrong("should have started")
def notes_shared_by_all_processes(process, number):
    notes = type(process).__dict__.get("shared") or {"full": set(), "next": 0}
    type(process).shared = notes
    notes["full"].add(number)
    while notes["next"] in notes["full"]:
        process.start(notes["next"])
        notes["next"] += 1


@LAUNCH.wrong("stopped with AttributeError")
def a_dictionary_taken_for_a_set(process, number):
    process.notes.add(number)


# -------------------------------------------------------------------- 3. accumulate with buckets


def backward(replicas, microbatch, loss_function, parts):
    for replica, x, y in zip(replicas, *microbatch, strict=True):
        (loss_function(replica(x), y) / parts).backward()


def divided_by(parts, replicas, buckets, microbatches, loss_function):
    """The solution, with a divisor of your own."""
    *first, last = microbatches
    with buckets.accumulate():
        for microbatch in first:
            backward(replicas, microbatch, loss_function, parts)
    backward(replicas, last, loss_function, parts)
    buckets.finish()


@ACCUMULATE.wrong("gradients are right", "several microbatches at once")
def all_losses_first(replicas, buckets, microbatches, loss_function):
    parts = len(microbatches) * len(replicas)
    for rank, replica in enumerate(replicas):
        losses = [loss_function(replica(xs[rank]), ys[rank]) / parts for xs, ys in microbatches]
        with buckets.accumulate():
            [loss.backward() for loss in losses[:-1]]
        losses[-1].backward()
    buckets.finish()


@ACCUMULATE.wrong("gradients are right", "several microbatches at once")
def one_backward_pass_for_all_microbatches(replicas, buckets, microbatches, loss_function):
    for rank, replica in enumerate(replicas):
        x = torch.cat([xs[rank] for xs, _ in microbatches])
        y = torch.cat([ys[rank] for _, ys in microbatches])
        (loss_function(replica(x), y) / len(replicas)).backward()
    buckets.finish()


@ACCUMULATE.right
def replica_by_replica(replicas, buckets, microbatches, loss_function):
    parts = len(microbatches) * len(replicas)
    *first, last = range(len(microbatches))
    for rank, replica in enumerate(replicas):
        for number in (*first, last):
            xs, ys = microbatches[number]
            with buckets.accumulate() if number != last else nullcontext():
                (loss_function(replica(xs[rank]), ys[rank]) / parts).backward()
    buckets.finish()


@ACCUMULATE.wrong("more bytes crossed the links", "nothing else need cross a link")
def all_losses_on_the_first_gpu(replicas, buckets, microbatches, loss_function):
    parts = len(microbatches) * len(replicas)
    home = microbatches[0][0][0].device
    for number, (xs, ys) in enumerate(microbatches, start=1):
        with buckets.accumulate() if number < len(microbatches) else nullcontext():
            losses = [
                loss_function(replica(x), y).to(home) / parts
                for replica, x, y in zip(replicas, xs, ys, strict=True)
            ]
            sum(losses).backward()
    buckets.finish()


@ACCUMULATE.wrong("the parameters of replica 0 changed")
def a_step_inside(replicas, buckets, microbatches, loss_function):
    parts = len(microbatches) * len(replicas)
    divided_by(parts, replicas, buckets, microbatches, loss_function)
    for replica in replicas:
        torch.optim.SGD(replica.parameters(), lr=0.1).step()


@ACCUMULATE.right
def a_block_for_each_microbatch_but_the_last(replicas, buckets, microbatches, loss_function):
    parts = len(microbatches) * len(replicas)
    for number, microbatch in enumerate(microbatches, start=1):
        if number < len(microbatches):
            with buckets.accumulate():
                backward(replicas, microbatch, loss_function, parts)
        else:
            backward(replicas, microbatch, loss_function, parts)
    buckets.finish()


@ACCUMULATE.right
def dividing_the_gradients_at_the_end(replicas, buckets, microbatches, loss_function):
    divided_by(1, replicas, buckets, microbatches, loss_function)
    for replica in replicas:
        for parameter in replica.parameters():
            parameter.grad /= len(microbatches) * len(replicas)


@ACCUMULATE.right
def all_left_for_finish(replicas, buckets, microbatches, loss_function):
    parts = len(microbatches) * len(replicas)
    with buckets.accumulate():
        for microbatch in microbatches:
            backward(replicas, microbatch, loss_function, parts)
    buckets.finish()


@ACCUMULATE.right
def an_exchange_after_backward(replicas, buckets, microbatches, loss_function):
    parts = len(microbatches) * len(replicas)
    with buckets.accumulate():
        for microbatch in microbatches:
            backward(replicas, microbatch, loss_function, parts)
    all_reduce_gradients(replicas)


@ACCUMULATE.right
def finishing_twice(replicas, buckets, microbatches, loss_function):
    parts = len(microbatches) * len(replicas)
    divided_by(parts, replicas, buckets, microbatches, loss_function)
    buckets.finish()


@ACCUMULATE.wrong("stopped with RuntimeError", "before finish()", "accumulate()")
def no_block(replicas, buckets, microbatches, loss_function):
    parts = len(microbatches) * len(replicas)
    for microbatch in microbatches:
        backward(replicas, microbatch, loss_function, parts)
    buckets.finish()


@ACCUMULATE.wrong("more bytes crossed the links", "only the last microbatch")
def an_exchange_after_every_microbatch(replicas, buckets, microbatches, loss_function):
    parts = len(microbatches) * len(replicas)
    for microbatch in microbatches:
        backward(replicas, microbatch, loss_function, parts)
        buckets.finish()


@ACCUMULATE.wrong("stopped with RuntimeError", "before finish()")
def only_the_first_in_the_block(replicas, buckets, microbatches, loss_function):
    parts = len(microbatches) * len(replicas)
    with buckets.accumulate():
        backward(replicas, microbatches[0], loss_function, parts)
    for microbatch in microbatches[1:]:
        backward(replicas, microbatch, loss_function, parts)
    buckets.finish()


@ACCUMULATE.wrong("only microbatch 3", "the others' were lost")
def only_the_last(replicas, buckets, microbatches, loss_function):
    parts = len(microbatches) * len(replicas)
    backward(replicas, microbatches[-1], loss_function, parts)
    buckets.finish()


@ACCUMULATE.wrong("only microbatch 3")
def zero_grad_before_each(replicas, buckets, microbatches, loss_function):
    *first, last = microbatches
    with buckets.accumulate():
        for microbatch in first:
            [replica.zero_grad() for replica in replicas]
            backward(replicas, microbatch, loss_function, len(replicas))
    [replica.zero_grad() for replica in replicas]
    backward(replicas, last, loss_function, len(replicas))
    buckets.finish()


@ACCUMULATE.wrong("not the gradient of the mean over all examples")
def the_last_one_left_out(replicas, buckets, microbatches, loss_function):
    parts = len(microbatches) * len(replicas)
    divided_by(parts, replicas, buckets, microbatches[:-1], loss_function)


@ACCUMULATE.wrong("sum of all losses", "divide each by microbatches times GPUs")
def not_divided(*arguments):
    divided_by(1, *arguments)


@ACCUMULATE.wrong("3 times too large", "number of GPUs as well")
def divided_by_the_microbatches(replicas, buckets, microbatches, loss_function):
    divided_by(len(microbatches), replicas, buckets, microbatches, loss_function)


@ACCUMULATE.wrong("4 times too large", "number of microbatches as well")
def divided_by_the_gpus(replicas, buckets, microbatches, loss_function):
    divided_by(len(replicas), replicas, buckets, microbatches, loss_function)


@ACCUMULATE.wrong("a wait is missing", "Is finish() called")
def finish_forgotten(replicas, buckets, microbatches, loss_function):
    parts = len(microbatches) * len(replicas)
    divided_by(parts, replicas, Unfinished(buckets), microbatches, loss_function)


class Unfinished:
    """Buckets that are not told to finish."""

    def __init__(self, buckets):
        self.accumulate = buckets.accumulate

    def finish(self):
        """Nothing."""


@ACCUMULATE.right
def one_more_sum_after_finish(replicas, buckets, microbatches, loss_function):
    parts = len(microbatches) * len(replicas)
    divided_by(parts, replicas, buckets, microbatches, loss_function)
    all_reduce_gradients(replicas)  # which are sums, and stay as they are


@ACCUMULATE.wrong("nothing was exchanged", "its own shards")
def all_in_the_block_and_no_finish(replicas, buckets, microbatches, loss_function):
    with buckets.accumulate():
        for microbatch in microbatches:
            backward(replicas, microbatch, loss_function, len(microbatches) * len(replicas))


@ACCUMULATE.wrong("gradients went over the host")
def an_exchange_over_the_host(replicas, buckets, microbatches, loss_function):
    with buckets.accumulate():
        for microbatch in microbatches:
            backward(replicas, microbatch, loss_function, len(microbatches) * len(replicas))
    for parameters in zip(*(replica.parameters() for replica in replicas), strict=True):
        total = sum(parameter.grad.cpu() for parameter in parameters)
        for parameter in parameters:
            parameter.grad.copy_(total)


@ACCUMULATE.wrong("the replica on GPU 0 has no gradients")
def only_the_losses(replicas, buckets, microbatches, loss_function):
    for xs, ys in microbatches:
        [loss_function(replica(x), y) for replica, x, y in zip(replicas, xs, ys, strict=True)]
    buckets.finish()


@ACCUMULATE.wrong("the replica on GPU 1 has no gradients")
def only_the_first_replica(replicas, buckets, microbatches, loss_function):
    for xs, ys in microbatches:
        with buckets.accumulate():
            loss_function(replicas[0](xs[0]), ys[0]).backward()


# ------------------------------------------------------------------- 4. all cards at work


def turned(nodes, size, turn):
    return [node * size + (place + turn) % size for node in range(nodes) for place in range(size)]


@ORDERS.right
def turned_the_other_way(nodes, size):
    return [tuple(turned(nodes, size, -turn)) for turn in range(size)]


@ORDERS.right
def the_last_one_chosen(nodes, size):
    orders = []
    for last in range(size):
        first = (last + 1) % size
        between = [place for place in range(size) if place not in (first, last)]
        places = [first, *between, last] if size > 1 else [0]
        orders.append([node * size + place for node in range(nodes) for place in places])
    return orders


@ORDERS.wrong("for 3 nodes of 2, the rings take", "GPU 1 sends over the network in 2 of them")
def all_in_one_order(nodes, size):
    return [list(range(nodes * size))] * size


@ORDERS.wrong("for 3 nodes of 2, ring 0 leaves a node 6 times, and 3 times are enough")
def place_by_place(nodes, size):
    ranks = [node * size + place for place in range(size) for node in range(nodes)]
    return [ranks[turn * nodes :] + ranks[: turn * nodes] for turn in range(size)]


@ORDERS.wrong("GPU 1 sends over the network in 2 of them")
def all_ranks_turned(nodes, size):
    ranks = list(range(nodes * size))
    return [ranks[turn:] + ranks[:turn] for turn in range(size)]


@ORDERS.wrong("for 2 nodes of 4, the rings take", "GPU 4 receives over the network in 3 of them")
def through_another_card_out_and_the_same_one_in(nodes, size):
    orders = []
    for last in range(size):
        first = 0 if last else size - 1
        places = [place for place in range(size) if place not in (first, last)]
        places = [first, *places, last]
        orders.append([node * size + place for node in range(nodes) for place in places])
    return orders


@ORDERS.wrong("for 1 node of 3, each of the 3 ranks stands once in a ring")
def left_empty(nodes, size):
    return [[None] * (nodes * size)] * size


@ORDERS.wrong("return a list of 3 rings")
def a_single_ring(nodes, size):
    return [list(range(nodes * size))]


@ORDERS.wrong("stands once in a ring", "ring 1 is")
def one_node_alone(nodes, size):
    return [turned(nodes, size, 0)] + [turned(1, size, turn)[:-1] for turn in range(1, size)]


@ORDERS.wrong("for 2 nodes of 4, the rings take")
def forwards_and_backwards(nodes, size):
    forwards = turned(nodes, size, 0)
    return [forwards if turn % 2 else forwards[::-1] for turn in range(size)]
