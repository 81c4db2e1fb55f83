"""The checks of lesson 10 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from course_lib.exercises import lesson_10
from course_lib.ranks.by_hand.messages import exchange
from exercise_answers import Answers

STOP = Answers("10", "stop", lesson_10.check_stop)
SHIFT = Answers("10", "shift", lesson_10.check_shift)
UNUSED = Answers("10", "unused", lesson_10.check_unused)
TURNS = Answers("10", "turns", lesson_10.check_turns)
EXERCISES = [STOP, SHIFT, UNUSED, TURNS]


# ------------------------------------------------------------------------------ 1. who stops when?


def until(step, loss, agree):
    """Train until what the ranks agree on is not below its best."""
    best = float("inf")
    while True:
        step()
        now = agree(loss())
        if now >= best:
            return
        best = now


@STOP.right
def by_the_sum(step, loss):
    def agree(now):
        dist.all_reduce(now)
        return now.item()

    until(step, loss, agree)


@STOP.right
def by_what_all_have_gathered(step, loss):
    def agree(now):
        all_losses = [torch.empty_like(now) for _ in range(dist.get_world_size())]
        dist.all_gather(all_losses, now)
        return torch.cat(all_losses).mean().item()

    until(step, loss, agree)


@STOP.right
def rank_0_has_the_mean_and_tells_it(step, loss):
    def agree(now):
        dist.reduce(now, dst=0)
        dist.broadcast(now, src=0)
        return now.item() / dist.get_world_size()

    until(step, loss, agree)


@STOP.wrong("a deadlock", "rank 1 has ended", "all_reduce", "step()")
def as_it_stands(step, loss):
    until(step, loss, lambda now: now.item())


@STOP.wrong("a deadlock", "rank 1 has ended", "step()")
def a_barrier_in_each_round(step, loss):
    def agree(now):
        dist.barrier()
        return now.item()

    until(step, loss, agree)


@STOP.wrong("after step 3", "rank 0 alone no longer falls")
def rank_0_decides_for_all(step, loss):
    def agree(now):
        dist.broadcast(now, src=0)
        return now.item()

    until(step, loss, agree)


@STOP.wrong("after step 7", "A mean that equals the best")
def only_when_it_rises(step, loss):
    best = float("inf")
    while True:
        step()
        now = loss()
        dist.all_reduce(now)
        if now.item() > best:
            return
        best = now.item()


def votes(step, loss, enough):
    """Train until enough ranks see their own loss fall no longer."""
    best = float("inf")
    while True:
        step()
        now = loss()
        falls_no_longer = (now >= best).float()
        best = min(best, now.item())
        dist.all_reduce(falls_no_longer)
        if falls_no_longer.item() >= enough:
            return


@STOP.wrong("after step 2", "the first rank's own loss")
def one_vote_is_enough(step, loss):
    votes(step, loss, 1)


@STOP.wrong("after step 4", "most ranks")
def a_majority(step, loss):
    votes(step, loss, dist.get_world_size() / 2)


@STOP.wrong("after step 9", "no rank's own loss", unsaid="equals the best")
def all_must_agree(step, loss):
    votes(step, loss, dist.get_world_size())


def until_the(op):
    def train(step, loss):
        def agree(now):
            dist.all_reduce(now, op=op)
            return now.item()

        until(step, loss, agree)

    return train


STOP.right(until_the(dist.ReduceOp.AVG))
STOP.wrong("after step 3", "or the largest of all")(until_the(dist.ReduceOp.MAX))
STOP.wrong("after step 5", "the smallest of all losses")(until_the(dist.ReduceOp.MIN))


@STOP.wrong("after step 6", "should be after step 3")
def as_many_steps_as_the_first_case_takes(step, loss):
    for _ in range(6):
        step()


@STOP.wrong("no rank has called step()", unsaid="ZeroDivisionError")
def nothing_done(step, loss):
    return


@STOP.wrong("more is exchanged")
def every_loss_in_a_wide_tensor(step, loss):
    def agree(now):
        wide = torch.zeros(64, device=now.device)
        wide[:1] = now
        dist.all_reduce(wide)
        return wide[0].item()

    until(step, loss, agree)


@STOP.wrong("it trains on and on")
def never(step, loss):
    while True:
        step()


@STOP.wrong("collective number 2", "rank 0: all_reduce of float32 (1,)")
def only_rank_0_sums_up(step, loss):
    def agree(now):
        if dist.get_rank() == 0:
            dist.all_reduce(now)
        return now.item()

    until(step, loss, agree)


# --------------------------------------------------------------------------- 2. pass on by k places


def in_turn(x, places, sends_first):
    """Send and receive, one after the other."""
    rank, N = dist.get_rank(), dist.get_world_size()
    if places % N == 0:
        return x.clone()
    to, source = (rank + places) % N, (rank - places) % N
    arrived = torch.empty_like(x)
    if sends_first:
        dist.send(x, to)
        dist.recv(arrived, source)
    else:
        dist.recv(arrived, source)
        dist.send(x, to)
    return arrived


@SHIFT.right
def counted_from_the_circle_s_smallest_rank(x, places):
    rank, N = dist.get_rank(), dist.get_world_size()
    at, place = rank % math.gcd(places, N), 0
    while at != rank:
        at, place = (at + places) % N, place + 1
    return in_turn(x, places, place % 2 == 0)


@SHIFT.right
def in_blocks_of_the_shorter_way(x, places):
    rank, N = dist.get_rank(), dist.get_world_size()
    short = min(places % N, -places % N) or 1
    return in_turn(x, places, rank // short % 2 == 0)


@SHIFT.wrong("shift(x, 1) with 4 ranks: a deadlock", "rank 0 waits in a send to rank 1", "2 more")
def all_send_first(x, places):
    return in_turn(x, places, True)


@SHIFT.wrong("a deadlock", "rank 0 waits in a receive from rank 3, which has sent nothing")
def all_receive_first(x, places):
    return in_turn(x, places, False)


@SHIFT.wrong("shift(x, 2) with 6 ranks: a deadlock", "rank 0 waits in a send to rank 2")
def even_ranks_first(x, places):
    return in_turn(x, places, dist.get_rank() % 2 == 0)


@SHIFT.wrong("messages' time", "waits for its own")
def upwards_first(x, places):
    rank, N = dist.get_rank(), dist.get_world_size()
    return in_turn(x, places, (rank + places) % N > rank)


@SHIFT.wrong("shift(x, 2) with 6 ranks: it takes 4 messages' time: a rank sends 2 messages")
def one_place_after_another(x, places):
    for _ in range(places % dist.get_world_size()):
        x = in_turn(x, 1, dist.get_rank() % 2 == 0)
    return x.clone()


@SHIFT.wrong("there is no rank 4 among the 4", unsaid="IndexError")
def past_the_last_rank(x, places):
    arrived = torch.empty_like(x)
    dist.send(x, dist.get_rank() + places)
    dist.recv(arrived, dist.get_rank() - places)
    return arrived


@SHIFT.wrong("there is no rank -1 among the 4")
def counted_from_the_end(x, places):
    rank, N = dist.get_rank(), dist.get_world_size()
    arrived = torch.empty_like(x)
    if rank % 2 == 0:
        dist.send(x, (rank + places) % N)
        dist.recv(arrived, rank - places)
    else:
        dist.recv(arrived, rank - places)
        dist.send(x, (rank + places) % N)
    return arrived


@SHIFT.wrong("use dist.send and dist.recv alone")
def without_waiting(x, places):
    rank, N = dist.get_rank(), dist.get_world_size()
    arrived = torch.empty_like(x)
    work = dist.isend(x, (rank + places) % N)
    dist.recv(arrived, (rank - places) % N)
    work.wait()
    return arrived


@SHIFT.wrong("use dist.send and dist.recv alone")
def both_at_once(x, places):
    rank, N = dist.get_rank(), dist.get_world_size()
    arrived = torch.empty_like(x)
    exchange(x, (rank + places) % N, arrived, (rank - places) % N)
    return arrived


@SHIFT.wrong("use dist.send and dist.recv alone")
def all_to_all(x, places):
    rank, N = dist.get_rank(), dist.get_world_size()
    arrived, out, into = torch.empty_like(x), [0] * N, [0] * N
    out[(rank + places) % N] = into[(rank - places) % N] = len(x)
    dist.all_to_all_single(arrived, x, into, out)
    return arrived


@SHIFT.wrong("rank 0 should end up with the tensor of rank 3, and has something else")
def the_number_that_a_lesson_s_tensor_had_in_it(x, places):
    return torch.full_like(x, (dist.get_rank() - places) % dist.get_world_size())


@SHIFT.wrong("rank 0 should end up with the tensor of rank 3, and has something else")
def the_first_numbers_alone(x, places):
    some = counted_from_the_circle_s_smallest_rank(x[:10].clone(), places)
    return torch.cat([some, torch.zeros_like(x[10:])])


@SHIFT.wrong("the tensors travel the other way round")
def backwards(x, places):
    return counted_from_the_circle_s_smallest_rank(x, -places)


@SHIFT.wrong("x changed")
def received_into_x(x, places):
    rank, N = dist.get_rank(), dist.get_world_size()
    out = x.clone()
    if rank % 2 == 0:
        dist.send(out, (rank + places) % N)
        dist.recv(x, (rank - places) % N)
    else:
        dist.recv(x, (rank - places) % N)
        dist.send(out, (rank + places) % N)
    return x


@SHIFT.wrong("a rank gets None")
def nothing_returned(x, places):
    counted_from_the_circle_s_smallest_rank(x, places)


# ----------------------------------------------------------------------------- 3. unused parameters


def mean_of(parameter, count=None):
    """All-reduce one gradient, zeros where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    dist.all_reduce(parameter.grad)
    parameter.grad /= count or dist.get_world_size()


def users_of(parameters):
    """How many ranks used each."""
    used = [[p.grad is not None] for p in parameters]
    users = torch.tensor(used, device="vgpu").long()
    dist.all_reduce(users)
    return users.flatten().tolist()


@UNUSED.right
def users_counted_in_whole_numbers(parameters):
    for parameter, users in zip(parameters, users_of(parameters), strict=True):
        if users:
            mean_of(parameter)


@UNUSED.right
def the_used_ones_in_one_flat_tensor(parameters):
    counts = users_of(parameters)
    used = [p for p, users in zip(parameters, counts, strict=True) if users]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in used])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, part in zip(used, flat.split([p.numel() for p in used]), strict=True):
        parameter.grad = part.view_as(parameter)


@UNUSED.wrong("collective number 2 of all ranks is not the same one everywhere")
def skipped_where_there_is_none(parameters):
    for parameter in parameters:
        if parameter.grad is not None:
            mean_of(parameter)


@UNUSED.wrong("no rank used parameter 3, and rank 0 has a gradient")
def zeros_everywhere(parameters):
    for parameter in parameters:
        mean_of(parameter)


@UNUSED.wrong("is the mean over the ranks that used it")
def mean_over_the_users(parameters):
    for parameter, users in zip(parameters, users_of(parameters), strict=True):
        if users:
            mean_of(parameter, users)


@UNUSED.wrong("is the sum over the ranks")
def the_sum(parameters):
    for parameter, users in zip(parameters, users_of(parameters), strict=True):
        if users:
            mean_of(parameter, 1)


@UNUSED.wrong("parameter 1 on rank 0 has no gradient, and another rank used it")
def taken_away_again(parameters):
    used = [parameter.grad is not None for parameter in parameters]
    for parameter, is_used in zip(parameters, used, strict=True):
        mean_of(parameter)
        if not is_used:
            parameter.grad = None


@UNUSED.wrong("more travels than the gradients in use")
def sent_all_the_same(parameters):
    counts = users_of(parameters)
    for parameter, users in zip(parameters, counts, strict=True):
        mean_of(parameter)
        if not users:
            parameter.grad = None


@UNUSED.right
def flags_by_their_maximum(parameters):
    used = torch.tensor([p.grad is not None for p in parameters], device="vgpu").byte()
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    for parameter, is_used in zip(parameters, used.tolist(), strict=True):
        if is_used:
            mean_of(parameter)


@UNUSED.wrong("do not travel from GPU to GPU")
def over_the_hosts(parameters):
    for parameter, users in zip(parameters, users_of(parameters), strict=True):
        if users:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradient = gradient.cpu()
            dist.all_reduce(gradient)
            parameter.grad = (gradient / dist.get_world_size()).to(parameter.device)


@UNUSED.wrong("has the shape (24,)", unsaid="could not be looked at")
def flat(parameters):
    users_counted_in_whole_numbers(parameters)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.data = parameter.grad.flatten()


@UNUSED.wrong("parameter 1 on rank 0 has no gradient, and another rank used it")
def rank_0_says_which(parameters):
    used = torch.tensor([float(p.grad is not None) for p in parameters], device="vgpu")
    dist.broadcast(used, src=0)
    for parameter, is_used in zip(parameters, used.tolist(), strict=True):
        if is_used:
            mean_of(parameter)


@UNUSED.wrong("parameter 0 on rank 0 changed")
def stepped(parameters):
    users_counted_in_whole_numbers(parameters)
    with torch.no_grad():
        parameters[0] -= 1


# ------------------------------------------------------------------------------ 4. 1F1B on one rank


def walk(stage, steps, send=dist.isend):
    """Do steps such as ("F", 0) with their messages."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    sent = []
    for kind, i in steps:
        compute, source, to = (
            (stage.forward, rank - 1, rank + 1)
            if kind == "F"
            else (stage.backward, rank + 1, rank - 1)
        )
        arrived = stage.empty() if 0 <= source <= last else None
        if arrived is not None:
            dist.recv(arrived, source)
        result = compute(i, arrived)
        if 0 <= to <= last:
            sent.append(send(result, to))
    for work in sent:
        if work is not None:
            work.wait()


def turns(m, ahead):
    """So many forwards first, then by turns."""
    steps = [("F", i) for i in range(min(m, ahead))]
    for i in range(m):
        if i + ahead < m:
            steps.append(("F", i + ahead))
        steps.append(("B", i))
    return steps


def behind():
    """Stages after this one."""
    return dist.get_world_size() - 1 - dist.get_rank()


@TURNS.right
def a_list_of_steps_first(stage, m):
    walk(stage, turns(m, behind()))


@TURNS.right
def counted_up(stage, m):
    steps, forwards, backwards = [], 0, 0
    while backwards < m:
        if forwards < m and forwards - backwards <= behind():
            steps.append(("F", forwards))
            forwards += 1
        else:
            steps.append(("B", backwards))
            backwards += 1
    walk(stage, steps)


@TURNS.right
def both_directions_in_one_batch(stage, m):
    """As Megatron-LM does it: what crosses between two neighbours is posted together."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1

    def exchanged(out, to, source):
        ops, arrived = [], None
        if out is not None and 0 <= to <= last:
            ops.append(dist.P2POp(dist.isend, out, to))
        if source is not None and 0 <= source <= last:
            arrived = stage.empty()
            ops.append(dist.P2POp(dist.irecv, arrived, source))
        for work in dist.batch_isend_irecv(ops) if ops else ():
            work.wait()
        return arrived

    up, down, ahead = rank + 1, rank - 1, min(m, last - rank)
    for i in range(ahead):
        x = exchanged(None, up, down)
        exchanged(stage.forward(i, x), up, None)
    x = exchanged(None, up, down) if ahead < m else None
    for i in range(m):
        out = stage.forward(ahead + i, x) if ahead + i < m else None
        gradient = exchanged(out, up, up)
        is_more = ahead + i + 1 < m
        x = exchanged(stage.backward(i, gradient), down, down if is_more else None)


@TURNS.wrong("a parameter changed")
def a_step_of_an_optimizer(stage, m):
    a_list_of_steps_first(stage, m)
    with torch.no_grad():
        for parameter in stage.layers.parameters():
            parameter -= 0.1 * parameter.grad


@TURNS.wrong("a gradient is not that of the batch")
def one_buffer_for_all(stage, m):
    buffer = stage.empty()
    stage.empty = lambda: buffer
    a_list_of_steps_first(stage, m)


@TURNS.wrong("Rank 0 may hold 4 microbatches, and never holds more than 1.")
def no_forwards_ahead(stage, m):
    walk(stage, turns(m, 0))


@TURNS.wrong("with 4 ranks and 2 microbatches: rank 0 asks for F2, and m is 2")
def as_many_forwards_as_stages_whatever_m_is(stage, m):
    steps = [("F", i) for i in range(behind())]
    for i in range(m):
        if i + behind() < m:
            steps.append(("F", i + behind()))
        steps.append(("B", i))
    walk(stage, steps)


@TURNS.wrong("with 4 ranks and 8 microbatches: a deadlock: rank", "waits in a send to rank")
def sends_that_wait(stage, m):
    walk(stage, turns(m, behind()), dist.send)


@TURNS.wrong("rank 0 holds 8 microbatches at once")
def all_forwards_first(stage, m):
    walk(stage, turns(m, m))


@TURNS.wrong("a deadlock", "waits in a receive from rank")
def by_turns_from_the_start(stage, m):
    rank = dist.get_rank()
    steps = turns(m, 0) if rank == 0 else turns(m, behind() + 2)
    walk(stage, steps)


@TURNS.wrong("times as long as lesson 05's pipeline")
def one_at_a_time(stage, m):
    walk(stage, turns(m, 0))


@TURNS.wrong("rank 0 does 8 of 16 steps", unsaid="deadlock")
def only_forward(stage, m):
    walk(stage, [("F", i) for i in range(m)])


@TURNS.wrong("holds 5 microbatches at once")
def one_forward_too_many(stage, m):
    walk(stage, turns(m, behind() + 1))


@TURNS.wrong("rank 0 does B0 without a gradient from rank 1")
def no_messages(stage, m):
    for kind, i in turns(m, behind()):
        stage.forward(i, None) if kind == "F" else stage.backward(i, None)


@TURNS.wrong("asks for F8, and m is 8")
def more_forwards_than_microbatches(stage, m):
    walk(stage, [("F", i) for i in range(m + 1)])
