"""The checks of lesson 01 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

import copy
import math

import torch
from torch.nn import functional as F

from course_lib.exercises import lesson_01
from exercise_answers import Answers

FLOPS = Answers("01", "flops", lesson_01.check_flops)
MEMORY = Answers("01", "memory", lesson_01.check_memory)
ACCUMULATE = Answers("01", "accumulate", lesson_01.check_accumulate)
EXERCISES = [FLOPS, MEMORY, ACCUMULATE]


# ---------------------------------------------------- 1. the operations of a transformer block


@FLOPS.right
def one_line(B, T, D):
    return 24 * B * T * D**2 + 4 * B * T**2 * D


@FLOPS.right
def layer_by_layer(B, T, D):
    def linear(inputs, outputs):
        return 2 * B * T * inputs * outputs

    layers = [(D, 3 * D), (D, D), (D, 4 * D), (4 * D, D)]
    products = [2 * B * T * D * T, 2 * B * T * T * D]
    return sum(linear(*layer) for layer in layers) + sum(products)


@FLOPS.right
def head_by_head_in_floats(B, T, D):
    heads = 4
    attention = 2 * B * heads * (2.0 * T * T * (D / heads))
    return 2.0 * B * T * 12 * D * D + attention


@FLOPS.right
def math_prod(B, T, D):
    return 2 * math.prod([B, T, D]) * (12 * D + 2 * T)


@FLOPS.wrong("attention's two products are missing", "linear layers are right")
def forgetting_attention(B, T, D):
    return 24 * B * T * D * D


@FLOPS.wrong("comes with an addition", "count both")
def multiply_adds_counted_once(B, T, D):
    return 12 * B * T * D * D + 2 * B * T * T * D


@FLOPS.wrong("comes with an addition", "Attention's two products are missing, too")
def parameters_times_tokens(B, T, D):
    return 12 * D * D * B * T


@FLOPS.wrong("forward and backward", "only forward")
def backward_included(B, T, D):
    return 3 * (24 * B * T * D * D + 4 * B * T * T * D)


@FLOPS.wrong("forward and backward", "attention's two products are missing")
def six_operations_a_parameter(B, T, D):
    return 6 * 12 * D * D * B * T


@FLOPS.wrong("backward alone", "only forward")
def backward_alone(B, T, D):
    return 2 * (24 * B * T * D * D + 4 * B * T * T * D)


@FLOPS.wrong("Attention has two products", "one half")
def only_queries_with_keys(B, T, D):
    return 24 * B * T * D * D + 2 * B * T * T * D


@FLOPS.wrong("all T x T pairs")
def only_the_pairs_the_mask_leaves(B, T, D):
    return 24 * B * T * D * D + 4 * B * T * T * D / 2


@FLOPS.wrong("each of B passages")
def attention_of_one_passage(B, T, D):
    return 24 * B * T * D * D + 4 * T * T * D


@FLOPS.wrong("T·T·D", "not T·D·D")
def attention_with_width_for_length(B, T, D):
    return 24 * B * T * D * D + 4 * B * T * D * D


@FLOPS.wrong("from D to 4·D and back")
def an_mlp_as_narrow_as_the_block(B, T, D):
    return 2 * B * T * (3 + 1 + 1 + 1) * D * D + 4 * B * T * T * D


@FLOPS.wrong("B=3, T=32, D=64", "you count 100")
def some_number(B, T, D):
    return 100


@FLOPS.wrong("None", "return")
def flops_not_returned(B, T, D):
    24 * B * T * D * D + 4 * B * T * T * D


@FLOPS.wrong("number", "tuple")
def two_numbers(B, T, D):
    return 24 * B * T * D * D, 4 * B * T * T * D


@FLOPS.wrong("stopped with", "NameError", "heads")
def a_name_that_is_not_there(B, T, D):
    return 4 * B * heads * T * T * D  # noqa: F821


# -------------------------------------------------------------------------- 2. does it fit?


@MEMORY.right
def bytes_a_parameter(parameters, optimizer):
    return {"sgd": 8, "momentum": 12, "adamw": 16}[optimizer] * parameters


@MEMORY.right
def one_holder_after_the_other(parameters, optimizer):
    nbytes = parameters * torch.float32.itemsize * 2.0
    if optimizer != "sgd":
        nbytes += 4 * parameters
    if optimizer == "adamw":
        nbytes += 4 * parameters
    return nbytes


@MEMORY.right
def the_place_in_a_list(parameters, optimizer):
    return (["sgd", "momentum", "adamw"].index(optimizer) + 2) * parameters * 4


@MEMORY.wrong("how many numbers", "each has 4 bytes")
def numbers_and_not_bytes(parameters, optimizer):
    return parameters * {"sgd": 2, "momentum": 3, "adamw": 4}[optimizer]


@MEMORY.wrong("4 bytes, not 2")
def numbers_of_2_bytes(parameters, optimizer):
    return 2 * parameters * {"sgd": 2, "momentum": 3, "adamw": 4}[optimizer]


@MEMORY.wrong("4 bytes, not 8")
def numbers_of_8_bytes(parameters, optimizer):
    return 8 * parameters * {"sgd": 2, "momentum": 3, "adamw": 4}[optimizer]


@MEMORY.wrong("One number a parameter is missing", "its gradient")
def forgetting_the_gradients(parameters, optimizer):
    return 4 * parameters * {"sgd": 1, "momentum": 2, "adamw": 3}[optimizer]


@MEMORY.wrong("momentum", "One number a parameter is missing", "remembers one number")
def forgetting_what_the_optimizer_remembers(parameters, optimizer):
    return 4 * parameters * 2


@MEMORY.wrong("momentum", "Two numbers a parameter are missing")
def parameters_alone(parameters, optimizer):
    return 4 * parameters


@MEMORY.wrong("adamw", "One number a parameter is missing", "AdamW remembers two")
def adamw_with_one_number(parameters, optimizer):
    return 4 * parameters * (2 if optimizer == "sgd" else 3)


@MEMORY.wrong("sgd", "One number a parameter is too many", "Plain SGD remembers nothing")
def plain_sgd_with_momentum(parameters, optimizer):
    return 4 * parameters * (4 if optimizer == "adamw" else 3)


@MEMORY.wrong("momentum", "One number a parameter is too many")
def always_16_bytes(parameters, optimizer):
    return 16 * parameters


@MEMORY.wrong("None", "return")
def nothing_for_an_optimizer_called_adam(parameters, optimizer):
    if optimizer == "adam":
        return 16 * parameters


@MEMORY.wrong("stopped with KeyError", "momentum")
def an_optimizer_left_out(parameters, optimizer):
    return {"sgd": 8, "adamw": 16}[optimizer] * parameters


@MEMORY.wrong("number", "str")
def bytes_in_words(parameters, optimizer):
    return f"{parameters * 16 / 1e6} MB"


# ---------------------------------------------------------- 3. a large batch in little memory


@ACCUMULATE.right
def dividing_by_the_batch(model, x, y, pieces):
    size = len(x) // pieces
    for begin in range(0, len(x), size):
        outputs = model(x[begin : begin + size])
        loss = F.cross_entropy(outputs, y[begin : begin + size], reduction="sum")
        (loss / len(x)).backward()


@ACCUMULATE.right
def dividing_the_gradients_at_the_end(model, x, y, pieces):
    for x_piece, y_piece in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        F.cross_entropy(model(x_piece), y_piece).backward()
    for parameter in model.parameters():
        parameter.grad /= pieces


@ACCUMULATE.right
def passing_the_share_to_backward(model, x, y, pieces):
    model.zero_grad()
    xs, ys = x.view(pieces, -1, x.shape[1]), y.view(pieces, -1)
    for i in reversed(range(pieces)):
        loss = F.cross_entropy(model(xs[i]), ys[i])
        loss.backward(torch.tensor(1 / pieces, device=loss.device))


@ACCUMULATE.right
def asking_autograd_and_adding_by_hand(model, x, y, pieces):
    parameters = list(model.parameters())
    for x_piece, y_piece in zip(x.tensor_split(pieces), y.tensor_split(pieces), strict=True):
        loss = F.cross_entropy(model(x_piece), y_piece) / pieces
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient


@ACCUMULATE.right
def keeping_what_the_losses_were(model, x, y, pieces):
    losses = []
    for x_piece, y_piece in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        loss = F.cross_entropy(model(x_piece), y_piece) / pieces
        loss.backward()
        losses.append(loss.detach())
    return sum(losses).item()


@ACCUMULATE.wrong("8 times too large", "mean of the pieces' means", "not their sum")
def the_sum_of_the_means(model, x, y, pieces):
    for x_piece, y_piece in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        F.cross_entropy(model(x_piece), y_piece).backward()


@ACCUMULATE.wrong("8 times too small", "once, not twice")
def dividing_twice(model, x, y, pieces):
    for x_piece, y_piece in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        (F.cross_entropy(model(x_piece), y_piece) / pieces).backward()
    for parameter in model.parameters():
        parameter.grad /= pieces


@ACCUMULATE.wrong("32 times", "x.split(n) pieces of n")
def split_instead_of_chunk(model, x, y, pieces):
    for x_piece, y_piece in zip(x.split(pieces), y.split(pieces), strict=True):
        (F.cross_entropy(model(x_piece), y_piece) / pieces).backward()


@ACCUMULATE.wrong("2,048 times", "by what did you divide")
def the_sum_over_all_images(model, x, y, pieces):
    for x_piece, y_piece in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        F.cross_entropy(model(x_piece), y_piece, reduction="sum").backward()


@ACCUMULATE.wrong("gradient is right", "more than one piece", "keep the losses")
def keeping_the_losses_alive(model, x, y, pieces):
    total = 0
    for x_piece, y_piece in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        total = total + F.cross_entropy(model(x_piece), y_piece) / pieces
    total.backward()


@ACCUMULATE.wrong("gradient is right", "keep the losses")
def retaining_every_graph(model, x, y, pieces):
    losses = []
    for x_piece, y_piece in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        losses.append(F.cross_entropy(model(x_piece), y_piece) / pieces)
        losses[-1].backward(retain_graph=True)


@ACCUMULATE.wrong("gradient is right", "the whole batch")
def the_whole_batch_at_once(model, x, y, pieces):
    F.cross_entropy(model(x), y).backward()


@ACCUMULATE.wrong("gradient is right", "the whole batch")
def forward_on_the_whole_batch(model, x, y, pieces):
    for outputs, y_piece in zip(model(x).chunk(pieces), y.chunk(pieces), strict=True):
        (F.cross_entropy(outputs, y_piece) / pieces).backward(retain_graph=True)


@ACCUMULATE.wrong("not the gradient of the whole batch", "set the gradients to zero in between")
def zero_grad_between_the_pieces(model, x, y, pieces):
    for x_piece, y_piece in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        model.zero_grad()
        (F.cross_entropy(model(x_piece), y_piece) / pieces).backward()


@ACCUMULATE.wrong("Does every piece take part")
def returning_in_the_loop(model, x, y, pieces):
    for x_piece, y_piece in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        return (F.cross_entropy(model(x_piece), y_piece) / pieces).backward()


@ACCUMULATE.wrong("Does every piece take part")
def the_first_pieces_images_each_time(model, x, y, pieces):
    size = len(x) // pieces
    for _ in range(pieces):
        (F.cross_entropy(model(x[:size]), y[:size]) / pieces).backward()


@ACCUMULATE.wrong("no gradients", ".backward()")
def never_calling_backward(model, x, y, pieces):
    chunks = zip(x.chunk(pieces), y.chunk(pieces), strict=True)
    return sum(F.cross_entropy(model(x), y).item() for x, y in chunks) / pieces


@ACCUMULATE.wrong("no gradients")
def working_on_a_copy_of_the_model(model, x, y, pieces):
    model = copy.deepcopy(model)
    for x_piece, y_piece in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        (F.cross_entropy(model(x_piece), y_piece) / pieces).backward()


@ACCUMULATE.wrong("stopped with RuntimeError", "does not require grad")
def detaching_the_loss(model, x, y, pieces):
    for x_piece, y_piece in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        (F.cross_entropy(model(x_piece), y_piece).detach() / pieces).backward()


@ACCUMULATE.wrong("stopped with AttributeError", "float")
def backward_on_a_number(model, x, y, pieces):
    for x_piece, y_piece in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        (F.cross_entropy(model(x_piece), y_piece).item() / pieces).backward()
