"""The checks of lesson 11 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
)

from course_lib.exercises import lesson_11
from exercise_answers import Answers

UNTRAINED = Answers("11", "untrained", lesson_11.check_untrained)
FIT = Answers("11", "fit", lesson_11.check_fit)
PLAN = Answers("11", "plan", lesson_11.check_plan)
ACCUMULATE = Answers("11", "accumulate", lesson_11.check_accumulate)
COLLECT = Answers("11", "collect", lesson_11.check_collect)
EXERCISES = [UNTRAINED, FIT, PLAN, ACCUMULATE, COLLECT]


# ------------------------------------------------------------------------------ 1. a guard


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


@UNTRAINED.right
def with_is(model, optimizer):
    known = parameters_of(optimizer)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return [n for n in names if not any(model.get_parameter(n) is each for each in known)]


@UNTRAINED.right
def a_set_of_parameters(model, optimizer):
    learning = {p: name for name, p in model.named_parameters() if p.requires_grad}
    return {learning[p] for p in learning.keys() - set(parameters_of(optimizer))}


@UNTRAINED.wrong("in the optimizer: 0.token.weight is named")
def frozen_ones_as_well(model, optimizer):
    known = set(map(id, parameters_of(optimizer)))
    return [name for name, p in model.named_parameters() if id(p) not in known]


@UNTRAINED.wrong("compared by their numbers", unsaid="aten")
def asked_with_in(model, optimizer):
    known = parameters_of(optimizer)
    return [name for name, p in model.named_parameters() if p.requires_grad and p not in known]


@UNTRAINED.wrong("two groups, of all weights and of all biases", "is named")
def the_first_group_alone(model, optimizer):
    known = set(map(id, optimizer.param_groups[0]["params"]))
    named = model.named_parameters()
    return [name for name, p in named if p.requires_grad and id(p) not in known]


@UNTRAINED.wrong("made before fully_shard", "all of those it lacks are not named")
def by_shapes(model, optimizer):
    known = [p.shape for p in parameters_of(optimizer)]
    named = model.named_parameters()
    return [name for name, p in named if p.requires_grad and p.shape not in known]


@UNTRAINED.wrong("made after it", "is named")
def those_without_a_gradient(model, optimizer):
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@UNTRAINED.wrong("a name is a str", "DTensor")
def the_parameters_themselves(model, optimizer):
    known = set(map(id, parameters_of(optimizer)))
    return [p for p in model.parameters() if p.requires_grad and id(p) not in known]


@UNTRAINED.wrong("bytes were sent")
def with_a_look_at_the_numbers(model, optimizer):
    names = with_is(model, optimizer)
    for name in ("1.norm_1.weight", "1.norm_2.weight"):
        parameter = model.get_parameter(name)
        getattr(parameter, "full_tensor", parameter.sum)()
    return names


@UNTRAINED.wrong("return statement missing")
def printed(model, optimizer):
    for name, parameter in model.named_parameters():
        assert name and parameter is not None


# ------------------------------------------------------------------------------ 2. make it fit


def shard_with(model, keeps):
    for place, layer in enumerate(model):
        fully_shard(layer, reshard_after_forward=not keeps(place, len(model)))
    fully_shard(model)


@FIT.right
def the_last_three(model):
    shard_with(model, lambda place, count: place >= count - 3)


@FIT.right
def set_afterwards(model):
    shard_with(model, lambda place, count: False)
    for layer in list(model)[-3:]:
        layer.set_reshard_after_forward(False)


@FIT.wrong("it fits and sends too much")
def all_resharded(model):
    shard_with(model, lambda place, count: False)


@FIT.wrong("sends little and does not fit", "it matters which")
def none_resharded(model):
    shard_with(model, lambda place, count: True)


@FIT.wrong("sends little and does not fit", "it matters which")
def the_first_three(model):
    shard_with(model, lambda place, count: place < 3)


@FIT.wrong("one unit for all layers")
def the_root_alone(model):
    fully_shard(model)


@FIT.wrong("no parameter of the model is sharded")
def nothing(model):
    pass


@FIT.wrong("your code stopped with", "line")
def a_layer_twice(model):
    for layer in model:
        fully_shard(layer)
        fully_shard(layer)


@FIT.wrong("is not the same one everywhere", "all_gather")
def rank_0_alone(model):
    if dist.get_rank() == 0:
        next(iter(model.parameters()))
        dist.all_gather_object([None] * 4, "sharded")
    shard_with(model, lambda place, count: False)


@FIT.wrong("is not the same one everywhere", "lesson_11.py", unsaid="threading")
def other_units_on_rank_0(model):
    if dist.get_rank():
        shard_with(model, lambda place, count: False)
    else:
        fully_shard(model)


# ------------------------------------------------------------------------------ 3. a plan

COLUMNS = ["attention.wq", "attention.wk", "attention.wv", "mlp.gate", "mlp.up"]
ROWS = ["attention.wo", "mlp.down"]
ONCE = {"input_layouts": (Replicate(),), "desired_input_layouts": (Replicate(),)}


def columns_and_rows():
    columns = {name: ColwiseParallel() for name in COLUMNS}
    return columns | {name: RowwiseParallel() for name in ROWS}


def doors():
    return {name: PrepareModuleInput(**ONCE) for name in ("attention", "mlp")}


@PLAN.right
def with_stars():
    # The order matters: the last style that fits a name is applied as well as the first.
    columns = {name: ColwiseParallel() for name in ("attention.w[qkv]", "mlp.gate", "mlp.up")}
    return columns | {name: RowwiseParallel() for name in ROWS} | doors()


@PLAN.right
def prepared_with_words():
    one = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate())
    return {"mlp": one, "attention": one, **columns_and_rows()}


@PLAN.wrong("backward sends 5 all-reduces", "the same x")
def nothing_at_the_doors():
    return columns_and_rows()


@PLAN.wrong("backward sends 3 all-reduces", "the same x")
def one_door_alone():
    return columns_and_rows() | {"attention": PrepareModuleInput(**ONCE)}


@PLAN.wrong("some weights are whole")
def attention_alone():
    return {n: s for n, s in (columns_and_rows() | doors()).items() if n.startswith("attention")}


@PLAN.wrong("some weights are whole")
def an_empty_plan():
    return {}


@PLAN.wrong("the block has no module 'wq'")
def names_without_their_module():
    return {name.split(".")[1]: style for name, style in columns_and_rows().items()}


@PLAN.wrong("with this plan the block stops with", "Which layers take in what another has split?")
def all_columns():
    return {name: ColwiseParallel() for name in COLUMNS + ROWS}


@PLAN.wrong("forward sends more than two all-reduces")
def gathered_between():
    gathered = {
        name: ColwiseParallel(output_layouts=Replicate(), use_local_output=True)
        for name in ("mlp.gate", "mlp.up", "mlp.down")
    }
    return columns_and_rows() | doors() | gathered


@PLAN.wrong("return a dictionary", "NoneType")
def no_return():
    columns_and_rows()


@PLAN.wrong("is not the same one everywhere", "barrier")
def rank_0_waits():
    if dist.get_rank() == 0:
        dist.barrier()
    return columns_and_rows() | doors()


# ------------------------------------------------------------------------------ 4. accumulate


def accumulate_with(
    model, optimizer, microbatches, loss_function, syncs, weight=None, zero=True, step=True
):
    """With ``syncs(number, count)`` before each backward; ``None`` leaves the setting."""
    if zero:
        optimizer.zero_grad()
    total = sum(len(y) for _, y in microbatches)
    for number, (x, y) in enumerate(microbatches):
        setting = syncs(number, len(microbatches))
        if setting is not None:
            model.set_requires_gradient_sync(setting)
        share = len(y) / total if weight is None else weight
        (loss_function(model(x), y) * share).backward()
    if step:
        optimizer.step()


def last(number, count):
    return number == count - 1


@ACCUMULATE.right
def the_last_one_after_the_loop(model, optimizer, microbatches, loss_function):
    total = sum(len(y) for _, y in microbatches)
    optimizer.zero_grad()
    model.set_requires_gradient_sync(False)
    for x, y in microbatches[:-1]:
        (loss_function(model(x), y) * (len(y) / total)).backward()
    model.set_requires_gradient_sync(True)
    x, y = microbatches[-1]
    (loss_function(model(x), y) * (len(y) / total)).backward()
    optimizer.step()


@ACCUMULATE.right
def set_on_each_layer(model, optimizer, microbatches, loss_function):
    def on_layers(number, count):
        for layer in [*model, model]:
            layer.set_requires_gradient_sync(last(number, count), recurse=False)

    accumulate_with(model, optimizer, microbatches, loss_function, on_layers)


@ACCUMULATE.wrong("the step is right, and sends less than 7", "put together")
def one_batch_of_all(model, optimizer, microbatches, loss_function):
    x, y = (torch.cat(each) for each in zip(*microbatches, strict=True))
    optimizer.zero_grad()
    loss_function(model(x), y).backward()
    optimizer.step()


@ACCUMULATE.wrong("the step is right, and sends 9 times")
def sums_every_time(model, optimizer, microbatches, loss_function):
    accumulate_with(model, optimizer, microbatches, loss_function, lambda number, count: None)


@ACCUMULATE.wrong("no parameter changed")
def never_summed(model, optimizer, microbatches, loss_function):
    accumulate_with(model, optimizer, microbatches, loss_function, lambda number, count: False)


@ACCUMULATE.wrong("counts the same", "twice the examples")
def a_mean_of_means(model, optimizer, microbatches, loss_function):
    accumulate_with(model, optimizer, microbatches, loss_function, last, 1 / len(microbatches))


@ACCUMULATE.wrong("means of the microbatches are added")
def a_sum_of_means(model, optimizer, microbatches, loss_function):
    accumulate_with(model, optimizer, microbatches, loss_function, last, 1)


@ACCUMULATE.wrong("the first call is right, and the second is not")
def gradients_never_dropped(model, optimizer, microbatches, loss_function):
    accumulate_with(model, optimizer, microbatches, loss_function, last, zero=False)


@ACCUMULATE.wrong("what trains the model afterwards is not")
def turned_off_at_the_end(model, optimizer, microbatches, loss_function):
    accumulate_with(model, optimizer, microbatches, loss_function, last)
    model.set_requires_gradient_sync(False)


@ACCUMULATE.wrong("is not the same one everywhere", "lesson_11.py", unsaid="threading")
def turned_off_on_rank_0(model, optimizer, microbatches, loss_function):
    accumulate_with(model, optimizer, microbatches, loss_function, last)
    model.set_requires_gradient_sync(dist.get_rank() > 0)


@ACCUMULATE.wrong("your code stopped with AttributeError", "no_sync")
def as_with_ddp(model, optimizer, microbatches, loss_function):
    with model.no_sync():
        accumulate_with(model, optimizer, microbatches[:-1], loss_function, last)


@ACCUMULATE.wrong("no parameter changed")
def without_a_step(model, optimizer, microbatches, loss_function):
    accumulate_with(model, optimizer, microbatches, loss_function, last, step=False)


@ACCUMULATE.wrong("is not the same one everywhere", "reduce_scatter")
def rank_0_sums_alone(model, optimizer, microbatches, loss_function):
    def once(number, count):
        return last(number, count) and dist.get_rank() == 0

    accumulate_with(model, optimizer, microbatches, loss_function, once)


# ------------------------------------------------------------------------------ 5. collect


@COLLECT.right
def through_the_state_dict(model):
    found = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor()
        if not dist.get_rank():
            found[name] = whole.to("cpu")
    return found


@COLLECT.right
def pytorchs_own(model):
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


@COLLECT.wrong("a deadlock: rank 0 waits in all_gather")
def rank_0_alone_gathers(model):
    if dist.get_rank() == 0:
        return {name: p.detach().full_tensor().cpu() for name, p in model.named_parameters()}
    return {}


@COLLECT.wrong("rank 1 returned", "only rank 0 should")
def on_every_rank(model):
    return {name: p.detach().full_tensor().cpu() for name, p in model.named_parameters()}


@COLLECT.wrong("more than one rank copies the model to the host")
def copied_and_dropped(model):
    found = on_every_rank(model)
    return {} if dist.get_rank() else found


@COLLECT.wrong("times the largest parameter", "before the next comes")
def all_gathered_first(model):
    found = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
    return {} if dist.get_rank() else {name: whole.cpu() for name, whole in found.items()}


@COLLECT.wrong("should be a tensor on the host")
def left_on_the_gpu(model):
    found = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
    return {} if dist.get_rank() else found


@COLLECT.wrong("has shape", "and the whole")
def its_own_shards(model):
    found = {name: p.detach().to_local().cpu() for name, p in model.named_parameters()}
    return {} if dist.get_rank() else found


@COLLECT.wrong("is a DTensor", "gather it")
def the_state_dict_itself(model):
    return {} if dist.get_rank() else model.state_dict()


@COLLECT.wrong("is not the same one everywhere", "all_gather")
def each_in_another_order(model):
    named = list(model.named_parameters())
    found = {}
    for name, parameter in named[:: -1 if dist.get_rank() else 1]:
        whole = parameter.detach().full_tensor()
        if not dist.get_rank():
            found[name] = whole.cpu()
    return found


@COLLECT.wrong("sends more than its shards, once")
def gathered_again_to_look(model):
    found = through_the_state_dict(model)
    for parameter in model.parameters():
        assert torch.isfinite(parameter.detach().full_tensor()).all()
    return found


@COLLECT.wrong("the model's own shards are not what they were")
def shards_set_to_zero(model):
    found = through_the_state_dict(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return found


@COLLECT.wrong("not sharded any more")
def left_unsharded(model):
    for layer in [*model, model]:
        layer.unshard()
    whole = {name: p.detach().cpu() for name, p in model.named_parameters()}
    return {} if dist.get_rank() else whole
