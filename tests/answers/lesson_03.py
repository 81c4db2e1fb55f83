"""The checks of lesson 03 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

from contextlib import contextmanager

import torch

import course_lib
from course_lib.exercises import lesson_03
from course_lib.parallel import collectives
from course_lib.parallel.data_parallel import all_reduce_gradients
from exercise_answers import Answers

GATHER = Answers("03", "gather", lesson_03.check_gather)
READY = Answers("03", "ready", lesson_03.check_ready)
ACCUMULATE = Answers("03", "accumulate", lesson_03.check_accumulate)
EXERCISES = [GATHER, READY, ACCUMULATE]


# ------------------------------------------------------------------------- 1. a ring all-gather


def split(tensors):
    return [tensor.tensor_split(len(tensors)) for tensor in tensors]


@contextmanager
def side_streams(tensors, starting=True, finishing=True):
    """For each tensor a stream to send and one to receive, before and after which the main waits.

    Args:
        starting, finishing: whether these waits are there.
    """
    mains = [course_lib.current_stream(tensor.device) for tensor in tensors]
    sends = [course_lib.stream(tensor.device) for tensor in tensors]
    receives = [course_lib.stream(tensor.device) for tensor in tensors]
    for main, send, receive in zip(mains, sends, receives, strict=True):
        if starting:
            send.wait_stream(main), receive.wait_stream(main)
    yield sends, receives
    for main, send, receive in zip(mains, sends, receives, strict=True):
        if finishing:
            main.wait_stream(send), main.wait_stream(receive)


def ring(tensors, rounds=None, shift=0, waiting=True, **waits):
    """The solution, with room for mistakes."""
    N, chunks = len(tensors), split(tensors)
    with side_streams(tensors, **waits) as (sends, receives):
        for step in range(N - 1 if rounds is None else rounds):
            for rank in range(N):
                following, number = (rank + 1) % N, (rank - step + shift) % N
                with sends[rank], receives[following]:
                    chunks[following][number].copy_(chunks[rank][number])
            for send, receive in zip(sends, receives, strict=True):
                if waiting:
                    send.wait_stream(receive)


@GATHER.right
def the_other_way_round(tensors):
    N, chunks = len(tensors), split(tensors)
    with side_streams(tensors) as (sends, receives):
        for step in range(N - 1):
            for rank in range(N):
                with sends[rank], receives[rank - 1]:
                    number = (rank + step) % N
                    chunks[rank - 1][number].copy_(chunks[rank][number])
            for send, receive in zip(sends, receives, strict=True):
                send.wait_stream(receive)


@GATHER.right
def every_owner_sending_to_the_one_so_many_places_on(tensors):
    N, chunks = len(tensors), split(tensors)
    with side_streams(tensors) as (sends, receives):
        for distance in range(1, N):
            for rank in range(N):
                other = (rank + distance) % N
                with sends[rank], receives[other]:
                    chunks[other][rank].copy_(chunks[rank][rank])


@GATHER.right
def events_for_each_chunk(tensors):
    N, chunks = len(tensors), split(tensors)
    with side_streams(tensors) as (sends, receives):
        arrived = {}
        for step in range(N - 1):
            for rank in range(N):
                following, number = (rank + 1) % N, (rank - step) % N
                if step:
                    sends[rank].wait_event(arrived[rank, number])
                with sends[rank], receives[following]:
                    chunks[following][number].copy_(chunks[rank][number])
                arrived[following, number] = receives[following].record_event()


@GATHER.right
def slices_in_place_of_chunks(tensors):
    N = len(tensors)
    sizes = [len(chunk) for chunk in tensors[0].tensor_split(N)]
    places = [slice(sum(sizes[:n]), sum(sizes[: n + 1])) for n in range(N)]
    with side_streams(tensors) as (sends, receives):
        for step in range(N - 1):
            for rank in range(N):
                following, place = (rank + 1) % N, places[rank - step]
                with sends[rank], receives[following]:
                    tensors[following][place] = tensors[rank][place]
            [send.wait_stream(receive) for send, receive in zip(sends, receives, strict=True)]


@GATHER.right
def half_a_chunk_at_a_time(tensors):
    N = len(tensors)
    halves = [[chunk.tensor_split(2) for chunk in chunks] for chunks in split(tensors)]
    with side_streams(tensors) as (sends, receives):
        for step in range(N - 1):
            for rank in range(N):
                following, number = (rank + 1) % N, (rank - step) % N
                for half in (0, 1):
                    with sends[rank], receives[following]:
                        halves[following][number][half].copy_(halves[rank][number][half])
            for send, receive in zip(sends, receives, strict=True):
                send.wait_stream(receive)


@GATHER.wrong("more than (N - 1)/N of a tensor", "not the whole tensor")
def forwarding_whole_tensors(tensors):
    N, chunks = len(tensors), split(tensors)
    for step in range(N - 1):
        for rank in range(N):
            following, number = (rank + 1) % N, (rank - step) % N
            arrived = tensors[rank].to(tensors[following].device)
            chunks[following][number].copy_(arrived.tensor_split(N)[number])


@GATHER.wrong("chunk 1 on GPU 0 is what it was")
def one_round_too_few(tensors):
    ring(tensors, rounds=max(0, len(tensors) - 2))


@GATHER.wrong("more than (N - 1)/N", "in N - 1 rounds")
def one_round_too_many(tensors):
    ring(tensors, rounds=len(tensors))


@GATHER.wrong("on 4 GPUs, with tensors of 12 numbers, chunk", "not that of its owner")
def the_owner_one_place_on(tensors):
    ring(tensors, shift=1)


@GATHER.wrong("not that of its owner")
def the_owner_one_place_back(tensors):
    ring(tensors, shift=-1)


@GATHER.wrong("takes too long", "from a side stream to a side stream")
def straight_to_all_others_on_the_main_streams(tensors):
    chunks = split(tensors)
    for owner in range(len(tensors)):
        for other in range(len(tensors)):
            if other != owner:
                chunks[other][owner].copy_(chunks[owner][owner])


@GATHER.wrong("takes too long", "all GPUs must send at once")
def straight_to_all_others_with_all_waiting_for_the_first(tensors):
    chunks = split(tensors)
    with side_streams(tensors) as (sends, receives):
        for owner in range(len(tensors)):
            for other in range(len(tensors)):
                if other != owner:
                    with sends[owner], receives[other]:
                        chunks[other][owner].copy_(chunks[owner][owner])


@GATHER.wrong("takes too long", "from a side stream to a side stream")
def no_side_streams(tensors):
    N, chunks = len(tensors), split(tensors)
    for step in range(N - 1):
        for rank in range(N):
            following, number = (rank + 1) % N, (rank - step) % N
            chunks[following][number].copy_(chunks[rank][number])


@GATHER.wrong("takes too long", "all GPUs must send at once")
def waiting_in_the_middle_of_a_round(tensors):
    N, chunks = len(tensors), split(tensors)
    with side_streams(tensors) as (sends, receives):
        for step in range(N - 1):
            for rank in range(N):
                following, number = (rank + 1) % N, (rank - step) % N
                sends[rank].wait_stream(receives[rank])
                with sends[rank], receives[following]:
                    chunks[following][number].copy_(chunks[rank][number])


@GATHER.wrong("takes too long", "from a side stream to a side stream")
def one_side_stream_a_gpu(tensors):
    N, chunks = len(tensors), split(tensors)
    with side_streams(tensors) as (sides, _):
        for step in range(N - 1):
            for rank in range(N):
                following, number = (rank + 1) % N, (rank - step) % N
                with sides[rank], sides[following]:
                    chunks[following][number].copy_(chunks[rank][number])


@GATHER.wrong("takes too long", "copied once more", "straight into its place")
def copying_what_arrives_once_more(tensors):
    N, chunks = len(tensors), split(tensors)
    with side_streams(tensors) as (sends, receives):
        for step in range(N - 1):
            for rank in range(N):
                following, number = (rank + 1) % N, (rank - step) % N
                with sends[rank], receives[following]:
                    arrived = chunks[rank][number].to(tensors[following].device)
                    chunks[following][number].copy_(arrived)
            for send, receive in zip(sends, receives, strict=True):
                send.wait_stream(receive)


@GATHER.wrong("a wait is missing", "ones on vgpu:0 default stream")
def not_waiting_for_the_tensors(tensors):
    ring(tensors, starting=False)


@GATHER.wrong("a wait is missing", "stream 1 reads", "copy on vgpu")
def not_waiting_between_the_rounds(tensors):
    ring(tensors, waiting=False)


@GATHER.wrong("a wait is missing", "default stream writes")
def main_streams_that_do_not_wait_for_the_ring(tensors):
    ring(tensors, finishing=False)


@GATHER.wrong("over the host", "from GPU to GPU")
def over_the_host(tensors):
    for rank, chunks in enumerate(split(tensors)):
        mine = chunks[rank].cpu()
        for other in split(tensors):
            other[rank].copy_(mine)


@GATHER.wrong("chunk 1 on GPU 0 is what it was")
def returning_new_tensors(tensors):
    return [
        torch.cat([chunks[rank].to(tensor.device) for rank, chunks in enumerate(split(tensors))])
        for tensor in tensors
    ]


@GATHER.wrong("chunk 1 on GPU 0 is what it was")
def returning_what_the_module_returns(tensors):
    return collectives.all_gather([chunks[rank] for rank, chunks in enumerate(split(tensors))])


@GATHER.wrong("not that of its owner")
def an_all_reduce(tensors):
    collectives.ring_all_reduce(tensors)


@GATHER.wrong("chunk 1 on GPU 0 is what it was")
def broadcasting_the_first(tensors):
    collectives.broadcast(tensors)


@GATHER.wrong("on 3 GPUs, with tensors of 10 numbers, chunk 2 on GPU 0 is not that of its owner")
def chunk_in_place_of_tensor_split(tensors):
    with side_streams(tensors) as (sends, receives):
        chunks = [tensor.chunk(len(tensors)) for tensor in tensors]
        for distance in range(1, len(tensors)):
            for rank in range(len(tensors)):
                other = (rank + distance) % len(tensors)
                with sends[rank], receives[other]:
                    chunks[other][rank].copy_(chunks[rank][rank])


@GATHER.wrong("stopped with RuntimeError", "shape")
def taking_it_that_n_divides(tensors):
    N = len(tensors)
    rows = [tensor.view(N, -1) for tensor in tensors]
    for owner in range(N):
        for other in range(N):
            rows[other][owner] = rows[owner][owner].clone()


# ------------------------------------------------------------------------- 2. is the bucket ready?


@READY.right
def a_counter(bucket, rank, name):
    bucket.come = getattr(bucket, "come", 0) + 1
    if bucket.come == bucket.count * len(bucket.names):
        bucket.come = 0
        bucket.reduce()


@READY.right
def a_counter_that_goes_on(bucket, rank, name):
    bucket.come = getattr(bucket, "come", 0) + 1
    if bucket.come % (bucket.count * len(bucket.names)) == 0:
        bucket.reduce()


@READY.right
def a_new_set_after_the_reduction(bucket, rank, name):
    bucket.arrived.add(f"{rank}/{name}")
    if all(f"{r}/{n}" in bucket.arrived for r in range(bucket.count) for n in bucket.names):
        bucket.reduce()
        bucket.arrived = set()


@READY.right
def the_full_gpus_counted(bucket, rank, name):
    bucket.arrived |= {(rank, name)}
    full = [
        {(gpu, wanted) for wanted in bucket.names} <= bucket.arrived for gpu in range(bucket.count)
    ]
    if sum(full) >= bucket.count:
        bucket.arrived -= bucket.arrived
        bucket.reduce()


@READY.right
def crossing_off_what_is_expected(bucket, rank, name):
    if not bucket.arrived:
        bucket.arrived |= {(r, n) for r in range(bucket.count) for n in bucket.names}
    bucket.arrived.remove((rank, name))
    if not bucket.arrived:
        bucket.reduce()


@READY.wrong("step 1, with one GPU after the other", "reduced when 3 of its 9 gradients had come")
def when_the_first_gpu_is_complete(bucket, rank, name):
    bucket.arrived.add((rank, name))
    if all((rank, wanted) in bucket.arrived for wanted in bucket.names):
        bucket.reduce()


@READY.wrong("reduced when 3 of its 9 gradients had come", "the others are not in the sum")
def names_without_ranks(bucket, rank, name):
    bucket.arrived.add(name)
    if len(bucket.arrived) == len(bucket.names):
        bucket.arrived.clear()
        bucket.reduce()


@READY.wrong("all 9 gradients had come", "reduced 0 times, not once")
def a_set_of_names_expected_to_hold_all(bucket, rank, name):
    bucket.arrived.add(name)
    if len(bucket.arrived) == bucket.count * len(bucket.names):
        bucket.arrived.clear()
        bucket.reduce()


@READY.wrong("the last GPU first", "reduced when 1 of its 9")
def when_the_last_listed_has_come_on_the_last_gpu(bucket, rank, name):
    if name == bucket.names[-1] and rank == bucket.count - 1:
        bucket.reduce()


@READY.wrong("one GPU after the other", "reduced when 3 of its 9")
def when_the_last_listed_has_come(bucket, rank, name):
    if name == bucket.names[-1]:
        bucket.reduce()


@READY.wrong("one GPU after the other", "reduced when 7 of its 9")
def when_one_has_come_from_every_gpu(bucket, rank, name):
    bucket.arrived.add(rank)
    if len(bucket.arrived) == bucket.count:
        bucket.arrived.clear()
        bucket.reduce()


@READY.wrong("the last GPU first", "reduced when 3 of its 9")
def when_the_last_gpu_is_complete(bucket, rank, name):
    bucket.arrived.add((rank, name))
    if all((bucket.count - 1, wanted) in bucket.arrived for wanted in bucket.names):
        bucket.reduce()
        bucket.arrived.clear()


@READY.wrong("in step 2", "reduced when 1 of its 9", "still full from the step before")
def not_ready_for_the_second_step(bucket, rank, name):
    bucket.arrived.add((rank, name))
    if len(bucket.arrived) == bucket.count * len(bucket.names):
        bucket.reduce()


@READY.wrong("in step 2", "all 9 gradients had come", "reduced 0 times, not once", "still full")
def a_list_that_is_never_emptied(bucket, rank, name):
    bucket.come = [*getattr(bucket, "come", []), name]
    if len(bucket.come) == bucket.count * len(bucket.names):
        bucket.reduce()


@READY.wrong("reduced when 8 of its 9")
def again_with_every_later_gradient(bucket, rank, name):
    bucket.arrived.add((rank, name))
    if len(bucket.arrived) >= bucket.count * len(bucket.names) - 1:
        bucket.reduce()


@READY.wrong("reduced 9 times, not once")
def all_at_the_end_and_each_for_itself(bucket, rank, name):
    bucket.arrived.add((rank, name))
    if len(bucket.arrived) == bucket.count * len(bucket.names):
        for _ in bucket.arrived:
            bucket.reduce()
        bucket.arrived.clear()


@READY.wrong("reduced when 5 of its 9")
def a_counter_shared_by_all_buckets(bucket, rank, name):
    shared = type(bucket)
    shared.come = getattr(shared, "come", 0) + 1
    if shared.come == bucket.count * len(bucket.names):
        shared.come = 0
        bucket.reduce()


@READY.wrong("reduced 0 times")
def only_noting_it(bucket, rank, name):
    bucket.arrived.add((rank, name))


@READY.wrong("stopped with AttributeError")
def a_set_taken_for_a_list(bucket, rank, name):
    bucket.arrived.append((rank, name))


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


@ACCUMULATE.right
def replica_by_replica(replicas, buckets, microbatches, loss_function):
    parts = len(microbatches) * len(replicas)
    for rank, replica in enumerate(replicas):
        losses = [loss_function(replica(xs[rank]), ys[rank]) / parts for xs, ys in microbatches]
        with buckets.accumulate():
            [loss.backward() for loss in losses[:-1]]
        losses[-1].backward()
    buckets.finish()


@ACCUMULATE.right
def one_backward_pass_for_all_microbatches(replicas, buckets, microbatches, loss_function):
    for rank, replica in enumerate(replicas):
        x = torch.cat([xs[rank] for xs, _ in microbatches])
        y = torch.cat([ys[rank] for _, ys in microbatches])
        (loss_function(replica(x), y) / len(replicas)).backward()
    buckets.finish()


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


@ACCUMULATE.wrong("more than once", "already the sum of all GPUs", "added up once more")
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


@ACCUMULATE.wrong("more than once", "added up once more")
def one_more_exchange_after_finish(replicas, buckets, microbatches, loss_function):
    parts = len(microbatches) * len(replicas)
    divided_by(parts, replicas, buckets, microbatches, loss_function)
    all_reduce_gradients(replicas)


@ACCUMULATE.wrong("nothing was exchanged", "its own shards")
def all_in_the_block_and_no_finish(replicas, buckets, microbatches, loss_function):
    with buckets.accumulate():
        for microbatch in microbatches:
            backward(replicas, microbatch, loss_function, len(microbatches) * len(replicas))


@ACCUMULATE.wrong("over the host", "the buckets move them")
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
