"""The checks of lesson 05 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from course_lib.exercises import lesson_05
from course_lib.parallel.schedules import gpipe, naive, one_f_one_b
from exercise_answers import Answers

WRITE = Answers("05", "write", lesson_05.check_write)
SHARE = Answers("05", "share", lesson_05.check_share)
CHOOSE = Answers("05", "choose", lesson_05.check_choose)
EXERCISES = [WRITE, SHARE, CHOOSE]


# ---------------------------------------------------------------- 1. a schedule of one's own


FIRST = ["F0", "F1", "B0", "F2", "B1", "F3", "B2", "B3"]
SECOND = ["F0", "B0", "F1", "B1", "F2", "B2", "F3", "B3"]


def words(schedule):
    return [[f"{step.kind}{step.microbatch}" for step in steps] for steps in schedule.steps]


@WRITE.right
def words_split_from_a_line():
    return tuple(" ".join(row).split() for row in (FIRST, SECOND))


@WRITE.right
def the_microbatches_from_the_last():
    return [[f"{word[0]}{3 - int(word[1])}" for word in row] for row in (FIRST, SECOND)]


@WRITE.right
def one_f_one_b_of_the_module():
    return words(one_f_one_b(2, 4))


@WRITE.right
def a_loop_that_keeps_one_ahead():
    first, second = ["F0"], []
    for i in range(4):
        first += [f"F{i + 1}", f"B{i}"] if i < 3 else [f"B{i}"]
        second += [f"F{i}", f"B{i}"]
    return [first, second]


@WRITE.right
def a_string_for_each_gpu():
    return [" ".join(FIRST), " ".join(SECOND)]


@WRITE.wrong("GPU 0 holds 4 activations at once", "go backward earlier")
def gpipe_s_order():
    return words(gpipe(2, 4))


@WRITE.wrong("holds 3 activations at once")
def two_forwards_too_many_on_the_first():
    return [["F0", "F1", "F2", "B0", "F3", "B1", "B2", "B3"], SECOND]


@WRITE.wrong("longer than GPipe", "waits where it need not")
def one_microbatch_at_a_time():
    return words(naive(2, 4))


@WRITE.wrong("longer than GPipe")
def in_pairs():
    row = ["F0", "F1", "B0", "B1", "F2", "F3", "B2", "B3"]
    return [row, row]


@WRITE.wrong("cannot run", "B of stage 0 for microbatch 3 is missing")
def a_missing_step():
    return [FIRST[:-1], SECOND]


@WRITE.wrong("cannot run", "F of stage 1 for microbatch 1 is there 2 times")
def a_step_twice():
    return [FIRST, [*SECOND, "F1"]]


@WRITE.wrong("cannot run", "deadlock: on GPU 0", "waits for", unsaid="device")
def the_lists_the_other_way_round():
    return [SECOND, FIRST]


@WRITE.wrong("cannot run", "deadlock")
def two_orders_of_the_microbatches():
    return [FIRST, ["F2", "B2", "F0", "B0", "F1", "B1", "F3", "B3"]]


@WRITE.wrong("cannot run", "B of stage 1 for microbatch 0 before F of stage 1 for microbatch 0")
def backward_before_forward():
    return [FIRST, ["B0", "F0", *SECOND[2:]]]


@WRITE.wrong("cannot run", "for microbatch 4", "no such step")
def counting_from_one():
    return [[f"{word[0]}{int(word[1]) + 1}" for word in row] for row in (FIRST, SECOND)]


@WRITE.wrong("GPU 1: 'W0' is no step", "'F0' or 'B3'")
def a_third_kind_of_step():
    return [FIRST, ["F0", "B0", "W0", *SECOND[2:]]]


@WRITE.wrong("GPU 0: ('F', 0) is no step")
def pairs_for_words():
    return [[(word[0], int(word[1])) for word in row] for row in (FIRST, SECOND)]


@WRITE.wrong("GPU 0: 'F²' is no step")
def a_digit_that_is_no_number():
    return [["F0", "F1", "B0", "F²"], SECOND]


@WRITE.wrong("2 lists of words")
def one_list_only():
    return FIRST


@WRITE.wrong("cannot run", "is missing")
def two_words():
    return ["F0", "B0"]


@WRITE.wrong("2 lists of words")
def one_list_in_a_list():
    return [FIRST]


@WRITE.wrong("2 lists of words")
def printing_it():
    print(FIRST, SECOND)


# ------------------------------------------- 2. the loss of a microbatch with padding


def summed(scores, targets):
    return F.cross_entropy(scores, targets, reduction="sum")


@SHARE.right
def from_the_logarithms(scores, targets, counted, microbatches, stages):
    kept = targets != -100
    rows = torch.arange(len(targets))[kept]
    return -scores.log_softmax(dim=1)[rows, targets[kept]].sum() / counted


@SHARE.right
def each_target_s_loss(scores, targets, counted, microbatches, stages):
    losses = F.cross_entropy(scores, targets, reduction="none")
    return sum(loss / counted for loss in losses)


@SHARE.right
def the_mean_times_the_share_of_targets(scores, targets, counted, microbatches, stages):
    own = (targets != -100).sum().item()
    if own == 0:
        return 0 * scores.sum()
    return F.cross_entropy(scores, targets) * own / counted


@SHARE.wrong("[5, 5, 5, 5]", "sum of the microbatches' means", "weight them")
def the_plain_cross_entropy(scores, targets, counted, microbatches, stages):
    return F.cross_entropy(scores, targets)


@SHARE.wrong("[6, 5, 5]", "plain mean of the microbatches' means", "different numbers of targets")
def divided_by_the_microbatches(scores, targets, counted, microbatches, stages):
    return F.cross_entropy(scores, targets) / microbatches


@SHARE.wrong("[6, 5, 5]", "weighted by their examples", "padding does not count")
def the_share_of_examples(scores, targets, counted, microbatches, stages):
    examples = {15: 20, 20: 20, 11: 16, 3: 8, 7: 9}[counted]
    return F.cross_entropy(scores, targets) * len(targets) / examples


@SHARE.wrong("of which 0 targets count", "loss nan", "0/0")
def a_mean_over_nothing(scores, targets, counted, microbatches, stages):
    return F.cross_entropy(scores, targets) * (targets != -100).sum() / counted


@SHARE.wrong("stages do not share the loss", "Do not divide by them")
def divided_by_the_stages(scores, targets, counted, microbatches, stages):
    return F.cross_entropy(scores, targets) / stages


@SHARE.wrong("stages do not share the loss")
def divided_by_both(scores, targets, counted, microbatches, stages):
    return F.cross_entropy(scores, targets) / (microbatches * stages)


@SHARE.wrong("divided by the number of microbatches, too", "all the weight")
def averaged_over_the_microbatches(scores, targets, counted, microbatches, stages):
    return summed(scores, targets) / counted / microbatches


@SHARE.wrong("sum over all targets", "the mean is asked for")
def the_sum(scores, targets, counted, microbatches, stages):
    return summed(scores, targets)


@SHARE.wrong("multiply it by its own targets")
def the_mean_over_what_counts(scores, targets, counted, microbatches, stages):
    return F.cross_entropy(scores, targets) / counted


@SHARE.wrong("not the batch's gradient", "mean over all targets that count")
def the_share_upside_down(scores, targets, counted, microbatches, stages):
    return F.cross_entropy(scores, targets) * (counted / len(targets))


@SHARE.wrong("a tensor", "backward()")
def a_python_float(scores, targets, counted, microbatches, stages):
    return summed(scores, targets).item() / counted


@SHARE.wrong("a tensor", "backward()")
def a_detached_loss(scores, targets, counted, microbatches, stages):
    return summed(scores.detach(), targets) / counted


@SHARE.wrong("a single number")
def a_loss_for_each_example(scores, targets, counted, microbatches, stages):
    return F.cross_entropy(scores, targets, reduction="none") / counted


@SHARE.wrong("returned None")
def going_backward_itself(scores, targets, counted, microbatches, stages):
    (summed(scores, targets) / counted).backward()


# --------------------------------------------------------------- 3. the smallest bubble that fits


def divisors(B, smallest):
    """The numbers of microbatches that leave each at least ``smallest`` examples."""
    return [m for m in range(1, B + 1) if B % m == 0 and B // m >= smallest]


@CHOOSE.right
def downwards_and_out(B, p, bytes_an_example, room, smallest):
    for m in range(B // smallest, 0, -1):
        if B % m == 0 and min(m, p) * B // m * bytes_an_example <= room:
            return m


@CHOOSE.right
def the_most_microbatches_take_the_least(B, p, bytes_an_example, room, smallest):
    m = max(divisors(B, smallest), default=None)
    if m is None or min(m, p) * (B // m) * bytes_an_example > room:
        return None
    return m


@CHOOSE.right
def by_the_size_of_a_microbatch(B, p, bytes_an_example, room, smallest):
    for size in range(smallest, B + 1):
        if B % size == 0 and min(B, p * size) * bytes_an_example <= room:
            return B // size
    return None


@CHOOSE.right
def by_the_bubble(B, p, bytes_an_example, room, smallest):
    fits = [
        m
        for m in divisors(B, smallest)
        if max(lesson_05.held(one_f_one_b(p, m))) * (B // m) <= room / bytes_an_example
    ]
    return min(fits, key=lambda m: (p - 1) / (m + p - 1), default=None)


@CHOOSE.wrong("15,000 bytes of room", "None is right", "yours is 16", "16,000 bytes")
def ignoring_the_memory(B, p, bytes_an_example, room, smallest):
    return max(divisors(B, smallest))


@CHOOSE.wrong("32 is right, and yours is 512", "1 of the examples", "too few")
def ignoring_the_smallest(B, p, bytes_an_example, room, smallest):
    fits = [m for m in divisors(B, 1) if min(m, p) * (B // m) * bytes_an_example <= room]
    return max(fits, default=None)


@CHOOSE.wrong("64 is right", "yours is None", "holds 4", "32,000 bytes")
def holding_all_microbatches(B, p, bytes_an_example, room, smallest):
    fits = [m for m in divisors(B, smallest) if m * (B // m) * bytes_an_example <= room]
    return max(fits, default=None)


@CHOOSE.wrong("B = 60", "6 is right", "yours is None", "holds 6")
def holding_as_many_as_gpus(B, p, bytes_an_example, room, smallest):
    fits = [m for m in divisors(B, smallest) if p * (B // m) * bytes_an_example <= room]
    return max(fits, default=None)


@CHOOSE.wrong("64 is right", "yours is None")
def holding_one_more_than_gpus(B, p, bytes_an_example, room, smallest):
    fits = [m for m in divisors(B, smallest) if min(m, p + 1) * B // m * bytes_an_example <= room]
    return max(fits, default=None)


@CHOOSE.wrong("None is right", "yours is 16", "holds 4")
def holding_one_less_than_gpus(B, p, bytes_an_example, room, smallest):
    fits = [m for m in divisors(B, smallest) if min(m, p - 1) * B // m * bytes_an_example <= room]
    return max(fits, default=None)


@CHOOSE.wrong("64 is right", "yours is None")
def wanting_room_to_spare(B, p, bytes_an_example, room, smallest):
    fits = [m for m in divisors(B, smallest) if min(m, p) * (B // m) * bytes_an_example < room]
    return max(fits, default=None)


@CHOOSE.wrong("B = 60", "yours is 8", "8 does not divide the batch")
def not_dividing_the_batch(B, p, bytes_an_example, room, smallest):
    m = B // smallest
    return m if min(m, p) * (B // m) * bytes_an_example <= room else None


@CHOOSE.wrong("yours is 1", "with more microbatches the bubble is smaller")
def the_fewest(B, p, bytes_an_example, room, smallest):
    fits = [m for m in divisors(B, smallest) if min(m, p) * (B // m) * bytes_an_example <= room]
    return min(fits, default=None)


@CHOOSE.wrong("None if nothing fits", "yours is 0")
def zero_if_nothing_fits(B, p, bytes_an_example, room, smallest):
    return downwards_and_out(B, p, bytes_an_example, room, smallest) or 0


@CHOOSE.wrong("whole number", "yours is 512.0")
def a_float(B, p, bytes_an_example, room, smallest):
    m = downwards_and_out(B, p, bytes_an_example, room, smallest)
    return m and float(m)


@CHOOSE.wrong("yours is 1", "with more microbatches the bubble is smaller")
def the_size_of_a_microbatch(B, p, bytes_an_example, room, smallest):
    m = downwards_and_out(B, p, bytes_an_example, room, smallest)
    return m and B // m


@CHOOSE.wrong("512 is right", "yours is None")
def forgetting_to_return(B, p, bytes_an_example, room, smallest):
    downwards_and_out(B, p, bytes_an_example, room, smallest)
