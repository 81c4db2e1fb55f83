"""The checks of lesson 01 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

import copy
import itertools

import torch
from torch.nn import functional as F

from course_lib.exercises import lesson_01
from exercise_answers import Answers

FLOPS = Answers("01", "flops", lesson_01.check_flops)
MEMORY = Answers("01", "memory", lesson_01.check_memory)
ACCUMULATE = Answers("01", "accumulate", lesson_01.check_accumulate)
EXERCISES = [FLOPS, MEMORY, ACCUMULATE]


# ------------------------------------------------------------ 1. operations of any MLP


@FLOPS.right
def all_layers_thrice_but_for_the_pixels(widths, batch):
    sizes = [a * b for a, b in itertools.pairwise(widths)]
    return 6 * batch * sum(sizes) - 2 * batch * sizes[0]


@FLOPS.right
def forward_weights_and_inputs_in_floats(widths, batch):
    pairs = list(itertools.pairwise(widths))
    forward = sum(2.0 * batch * a * b for a, b in pairs)
    inputs = sum(2.0 * batch * a * b for a, b in pairs[1:])
    return forward + forward + inputs


@FLOPS.wrong("gradient of the input, and you count it")
def six_operations_a_weight(widths, batch):
    return 6 * batch * sum(a * b for a, b in itertools.pairwise(widths))


@FLOPS.wrong("comes with an addition", "nobody needs the gradient of the input")
def three_operations_a_weight(widths, batch):
    return six_operations_a_weight(widths, batch) // 2


@FLOPS.wrong("comes with an addition", "count both")
def multiplications_alone(widths, batch):
    return all_layers_thrice_but_for_the_pixels(widths, batch) / 2


@FLOPS.wrong("forward alone")
def forward_of_the_step(widths, batch):
    return 2 * batch * sum(a * b for a, b in itertools.pairwise(widths))


@FLOPS.wrong("backward alone")
def backward_of_the_step(widths, batch):
    return all_layers_thrice_but_for_the_pixels(widths, batch) - forward_of_the_step(widths, batch)


@FLOPS.wrong("one example's")
def forgetting_the_batch(widths, batch):
    return all_layers_thrice_but_for_the_pixels(widths, 1)


@FLOPS.wrong("The last layer is missing")
def without_the_last_layer(widths, batch):
    return all_layers_thrice_but_for_the_pixels(widths[:-1], batch)


@FLOPS.wrong("[20, 30, 7]")
def the_three_layers_of_the_lesson(widths, batch):
    return 222_035_968 if widths[1] == 512 else 0


@FLOPS.wrong("Biases cost an addition each")
def biases_taken_for_weights(widths, batch):
    pairs = list(itertools.pairwise(widths))
    return 6 * batch * sum(a * b + b for a, b in pairs) - 2 * batch * widths[0] * widths[1]


@FLOPS.wrong("Biases take no product", "input's gradient")
def six_times_all_parameters(widths, batch):
    return 6 * batch * sum(a * b + b for a, b in itertools.pairwise(widths))


@FLOPS.wrong("one product for the first layer")
def no_backward_through_the_first_layer(widths, batch):
    pairs = list(itertools.pairwise(widths))
    forward = sum(2 * batch * a * b for a, b in pairs)
    return forward + sum(4 * batch * a * b for a, b in pairs[1:])


@FLOPS.wrong("None", "return")
def flops_not_returned(widths, batch):
    6 * batch * sum(widths)


@FLOPS.wrong("stopped with", "IndexError", "line")
def one_layer_too_far(widths, batch):
    return sum(6 * batch * widths[i] * widths[i + 1] for i in range(len(widths)))


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


@MEMORY.wrong("megabytes", "return bytes")
def megabytes(parameters, optimizer):
    return parameters * {"sgd": 8, "momentum": 12, "adamw": 16}[optimizer] / 1e6


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


@ACCUMULATE.wrong("2,048 times too large", "the sum of the losses")
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


@ACCUMULATE.wrong("on the host")
def on_a_cpu_copy(model, x, y, pieces):
    there = copy.deepcopy(model).cpu()
    F.cross_entropy(there(x.cpu()), y.cpu()).backward()
    for ours, theirs in zip(model.parameters(), there.parameters(), strict=True):
        ours.grad = theirs.grad.to(x.device)


@ACCUMULATE.wrong("the model's parameters changed")
def stepping_an_optimizer(model, x, y, pieces):
    for x_piece, y_piece in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        (F.cross_entropy(model(x_piece), y_piece) / pieces).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@ACCUMULATE.wrong("NaN or infinite in the gradients")
def the_square_root_of_minus_one(model, x, y, pieces):
    for x_piece, y_piece in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        (F.cross_entropy(model(x_piece), y_piece) * float("nan")).backward()


@ACCUMULATE.wrong("256 times too small", "a mean over its examples already")
def divided_by_the_examples(model, x, y, pieces):
    for x_piece, y_piece in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        (F.cross_entropy(model(x_piece), y_piece) / len(x)).backward()


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
