"""The checks of lesson 00 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import torch

from course_lib.exercises import lesson_00
from exercise_answers import Answers

SUM = Answers("00", "sum", lesson_00.check_sum)
TOGETHER = Answers("00", "together", lesson_00.check_together)
FITS = Answers("00", "fits", lesson_00.check_fits)
EXERCISES = [SUM, TOGETHER, FITS]


# ------------------------------------------------------------------ 1. bring them together


@SUM.right
def a_chain_of_additions(tensors):
    home = tensors[0].device
    return tensors[0] + tensors[1].to(home) + tensors[2].to(home) + tensors[3].to(home)


@SUM.right
def the_builtin_sum(tensors):
    return sum(tensor.to(tensors[0].device) for tensor in tensors)


@SUM.right
def reduce_from_the_last_to_the_first(tensors):
    return reduce(lambda a, b: a.to(b.device) + b, reversed(tensors))


@SUM.right
def stack_and_sum(tensors):
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).sum(dim=0)


@SUM.right
def copy_into_a_buffer_and_add_in_place(tensors):
    total, buffer = torch.zeros_like(tensors[0]), torch.empty_like(tensors[0])
    for tensor in tensors:
        total.add_(buffer.copy_(tensor))
    return total


@SUM.right
def a_chain_over_the_neighbours(tensors):
    total = tensors[3]
    for tensor in (tensors[2], tensors[1], tensors[0]):
        total = total.to(tensor.device) + tensor
    return total


@SUM.right
def pop_from_the_list(tensors):
    total = tensors.pop(0).clone()
    while tensors:
        total += tensors.pop().to(total.device)
    return total


@SUM.wrong("tensors[0]", "in place", "clone")
def adding_in_place_into_the_first(tensors):
    total = tensors[0]
    for tensor in tensors[1:]:
        total += tensor.to(total.device)
    return total


@SUM.wrong("tensors[2]", "in place")
def adding_in_place_into_another(tensors):
    tensors[2].add_(tensors[3].to(tensors[2].device))
    home = tensors[0].device
    return tensors[0] + tensors[1].to(home) + tensors[2].to(home)


@SUM.wrong("over the host", "from GPU to GPU")
def going_through_the_cpu(tensors):
    return sum(tensor.cpu() for tensor in tensors).to(tensors[0].device)


@SUM.wrong("over the host")
def bringing_only_the_others_through_the_cpu(tensors):
    home = tensors[0].device
    return tensors[0] + sum(tensor.cpu().to(home) for tensor in tensors[1:])


@SUM.wrong("should be on vgpu:1, and is on cpu")
def leaving_the_sum_on_the_cpu(tensors):
    return sum(tensor.cpu() for tensor in tensors)


@SUM.wrong("should be on vgpu:1, and is on vgpu:0")
def adding_on_the_last_device(tensors):
    return sum(tensor.to(tensors[-1].device) for tensor in tensors)


@SUM.wrong("should be on vgpu:1, and is on vgpu:0")
def the_gpus_of_the_notebook(tensors):
    home = torch.device("vgpu:0")  # gpus[0] of the lesson, and not of these tensors
    return sum(tensor.to(home) for tensor in tensors)


@SUM.wrong("same device", "RuntimeError")
def not_moving_anything(tensors):
    return tensors[0] + tensors[1] + tensors[2] + tensors[3]


@SUM.wrong("not the sum")
def the_mean(tensors):
    return sum(tensor.to(tensors[0].device) for tensor in tensors) / len(tensors)


@SUM.wrong("not the sum")
def forgetting_the_first(tensors):
    return sum(tensor.to(tensors[0].device) for tensor in tensors[1:])


@SUM.wrong("more crossed the links")
def carrying_the_total_to_each_device_and_back(tensors):
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total = (total.to(tensor.device) + tensor).to(tensors[0].device)
    return total


@SUM.wrong("shape (1, 100, 100)", "(100, 100)")
def keeping_the_dimension_that_is_summed(tensors):
    stacked = torch.stack([tensor.to(tensors[0].device) for tensor in tensors])
    return stacked.sum(dim=0, keepdim=True)


@SUM.wrong("should return a tensor", "None")
def printing_the_sum(tensors):
    repr(sum(tensor.to(tensors[0].device) for tensor in tensors))


@SUM.wrong("should return a tensor")
def a_single_number(tensors):
    return sum(tensor.sum().item() for tensor in tensors)


@SUM.wrong("IndexError", "list index out of range")
def one_index_too_far(tensors):
    return sum(tensors[i].to(tensors[0].device) for i in range(5))


# ------------------------------------------------------------------- 2. keep them all busy


def power(matrix, times):
    for _ in range(times):
        matrix = matrix @ matrix
    return matrix


@TOGETHER.right
def two_comprehensions(matrices, times):
    totals = [power(matrix, times).sum() for matrix in matrices]
    return [total.item() for total in totals]


@TOGETHER.right
def one_round_on_all_gpus_after_the_other(matrices, times):
    for _ in range(times):
        matrices = [torch.mm(matrix, matrix) for matrix in matrices]
    totals = [matrix.sum() for matrix in matrices]
    return tuple(float(total) for total in totals)


@TOGETHER.right
def matrix_power_and_one_read(matrices, times):
    totals = [torch.linalg.matrix_power(matrix, 2**times).sum() for matrix in matrices]
    return torch.stack([total.to(matrices[0].device) for total in totals]).tolist()


@TOGETHER.right
def writing_into_the_matrices(matrices, times):
    for matrix in matrices:
        for _ in range(times):
            matrix.copy_(matrix @ matrix)
    return list(map(torch.Tensor.item, [matrix.sum() for matrix in matrices]))


@TOGETHER.wrong("took turns", "Which line of your loop waits")
def item_inside_the_loop(matrices, times):
    return [power(matrix, times).sum().item() for matrix in matrices]


@TOGETHER.wrong("took turns")
def float_inside_the_loop(matrices, times):
    answers = []
    for matrix in matrices:
        answers.append(float(power(matrix, times).sum()))
    return answers


@TOGETHER.wrong("took turns")
def printing_a_value_inside_the_loop(matrices, times):
    totals = []
    for matrix in matrices:
        totals.append(power(matrix, times).sum())
        f"{totals[-1]}"
    return [total.item() for total in totals]


@TOGETHER.wrong("vgpu:0 multiplied nothing", "where it is")
def working_on_the_cpu(matrices, times):
    return [power(matrix.cpu(), times).sum().item() for matrix in matrices]


@TOGETHER.wrong("vgpu:1 multiplied nothing", "move none")
def moving_all_work_to_the_first_gpu(matrices, times):
    totals = [power(matrix.to(matrices[0].device), times).sum() for matrix in matrices]
    return [total.item() for total in totals]


@TOGETHER.wrong("tensors", "a float is what .item() returns")
def returning_tensors(matrices, times):
    return [power(matrix, times).sum() for matrix in matrices]


@TOGETHER.wrong("m = m @ m", "times")
def the_matrix_to_the_power_of_times(matrices, times):
    totals = [torch.linalg.matrix_power(matrix, times).sum() for matrix in matrices]
    return [total.item() for total in totals]


@TOGETHER.wrong("m = m @ m")
def squaring_each_number(matrices, times):
    totals = [(matrix ** (2**times)).sum() for matrix in matrices]
    return [total.item() for total in totals]


@TOGETHER.wrong("add up all numbers")
def the_mean_of_the_numbers(matrices, times):
    totals = [power(matrix, times).mean() for matrix in matrices]
    return [total.item() for total in totals]


@TOGETHER.wrong("a list of four floats", "not")
def one_total_of_all(matrices, times):
    totals = [power(matrix, times).sum() for matrix in matrices]
    return sum(total.item() for total in totals)


@TOGETHER.wrong("a list of four floats")
def returning_in_the_loop(matrices, times):
    for matrix in matrices:
        return [power(matrix, times).sum().item()]


@TOGETHER.wrong("a list of four floats", "None")
def no_return(matrices, times):
    [power(matrix, times) for matrix in matrices]


@TOGETHER.wrong("four floats", "one is a str")
def texts(matrices, times):
    totals = [power(matrix, times).sum() for matrix in matrices]
    return [f"{total.item():.3f}" for total in totals]


@TOGETHER.wrong("stopped with", "RuntimeError")
def item_of_a_whole_matrix(matrices, times):
    return [power(matrix, times).item() for matrix in matrices]


# ---------------------------------------------------------------------- 3. to the last byte


@FITS.right
def a_float_root_rounded_down(free_bytes):
    return math.floor(math.sqrt(free_bytes / 4))


@FITS.right
def an_int_of_half_the_root(free_bytes):
    return int(free_bytes**0.5 / 2)


@FITS.right
def trying_one_after_the_other(free_bytes):
    side = 0
    while 4 * (side + 1) ** 2 <= free_bytes:
        side += 1
    return side


@FITS.right
def a_whole_number_of_numpy(free_bytes):
    return np.sqrt(free_bytes / 4).astype(np.int64)


@FITS.right
def the_element_size_of_torch(free_bytes):
    return math.isqrt(free_bytes // torch.float32.itemsize)


@FITS.wrong("8944 x 8944", "4 bytes", "does not fit")
def forgetting_that_a_number_has_4_bytes(free_bytes):
    return math.isqrt(free_bytes)


@FITS.wrong("does not fit")
def forgetting_the_root(free_bytes):
    return free_bytes // 4


@FITS.wrong("room for a larger one", "A float32 number has 4 bytes")
def thinking_of_float64(free_bytes):
    return math.isqrt(free_bytes // 8)


@FITS.wrong("room for a larger one", "4 bytes")
def counting_bits(free_bytes):
    return math.isqrt(free_bytes // 32)


@FITS.wrong("6324 x 6324", "4 bytes", "does not fit")
def bfloat16(free_bytes):
    return math.isqrt(free_bytes // 2)


@FITS.wrong("12,345,678", "1757", "does not fit", "Round down")
def rounding_to_the_nearest(free_bytes):
    return round(math.sqrt(free_bytes / 4))


@FITS.wrong("4473", "does not fit", "Round down")
def rounding_up(free_bytes):
    return math.ceil(math.sqrt(free_bytes / 4))


@FITS.wrong("room for a larger one", "the last byte may be used")
def leaving_one_row_free(free_bytes):
    return math.isqrt(free_bytes // 4) - 1


@FITS.wrong("4472 is right", "4472.0 is a float")
def a_float_that_is_whole(free_bytes):
    return math.sqrt(free_bytes / 4) // 1


@FITS.wrong("you say 2236", "room for a larger one", "4 bytes")
def a_float_that_is_whole_and_too_small(free_bytes):
    return math.sqrt(free_bytes) // 4


@FITS.wrong("no whole number", "round down")
def not_rounding(free_bytes):
    return math.sqrt(free_bytes / 4)


@FITS.wrong("None", "return")
def no_number(free_bytes):
    math.isqrt(free_bytes // 4)


@FITS.wrong("number", "tuple")
def rows_and_columns(free_bytes):
    side = math.isqrt(free_bytes // 4)
    return side, side


@FITS.wrong("number", "str")
def a_text(free_bytes):
    return str(math.isqrt(free_bytes // 4))


@FITS.wrong("no side of a matrix")
def nothing_at_all(free_bytes):
    return 0


@FITS.wrong("stopped with TypeError", "float")
def isqrt_of_a_float(free_bytes):
    return math.isqrt(free_bytes / 4)


@TOGETHER.wrong("a matrix was copied to the host")
def adding_up_on_the_host(matrices, times):
    sums = []
    for matrix in matrices:
        for _ in range(times):
            matrix = matrix @ matrix
        sums.append(float(matrix.cpu().sum()))
    return sums
