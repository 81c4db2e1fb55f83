"""The checks of lesson 14 tell right answers from wrong ones, and say which mistake it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from course_lib.exercises import lesson_14
from course_lib.planner import Layout
from exercise_answers import Answers

CONFIG = Answers("14", "config", lesson_14.check_config)
STAGES = Answers("14", "stages", lesson_14.check_stages)
VIRTUAL = Answers("14", "virtual", lesson_14.check_virtual)
FEWEST = Answers("14", "fewest", lesson_14.check_fewest)
LAYOUTS = Answers("14", "layouts", lesson_14.check_layouts)
EXERCISES = [CONFIG, STAGES, VIRTUAL, FEWEST, LAYOUTS]


# -------------------------------------------------------------- 1. from a config to parameters


def counted(config, kv=None, matrices=3, norms=2, last=1, tables=None, head=None):
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    head = head or config.get("head_dim") or hidden // heads
    width = (kv or config["num_key_value_heads"]) * head
    layer = 2 * hidden * heads * head + 2 * hidden * width
    layer += matrices * hidden * config["intermediate_size"] + norms * hidden
    tables = tables or (1 if config["tie_word_embeddings"] else 2)
    return layers * layer + tables * config["vocab_size"] * hidden + last * hidden


@CONFIG.right
def matrix_by_matrix(config):
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head = config["head_dim"] if "head_dim" in config else hidden // config["num_attention_heads"]
    queries, keys = (config[f"num_{name}_heads"] * head for name in ("attention", "key_value"))
    shapes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    shapes += [(hidden, ffn), (hidden, ffn), (ffn, hidden), (hidden, 1), (hidden, 1)]
    total = sum(rows * columns for rows, columns in shapes) * config["num_hidden_layers"] + hidden
    for _ in range(2 - config["tie_word_embeddings"]):
        total += config["vocab_size"] * hidden
    return total


@CONFIG.right
def as_a_float(config):
    return float(counted(config))


@CONFIG.wrong("Llama 3 8B has 8,030,261,248 parameters", "too many", "num_key_value_heads")
def keys_of_every_head(config):
    return counted(config, kv=config["num_attention_heads"])


@CONFIG.wrong("too few", "SwiGLU has three matrices.")
def two_matrices(config):
    return counted(config, matrices=2)


@CONFIG.wrong("525,336,576 too few", "A head that is not tied")
def no_head(config):
    return counted(config, tables=1)


@CONFIG.wrong("Llama 3.2 1B has 1,235,814,400", "262,668,288 too many", "counts once")
def a_tied_head_counted_twice(config):
    return counted(config, tables=2)


@CONFIG.wrong("266,240 too few", "The norms are missing")
def no_norms(config):
    return counted(config, norms=0, last=0)


@CONFIG.wrong("4,096 too few", "behind the last layer")
def no_last_norm(config):
    return counted(config, last=0)


@CONFIG.wrong("Mistral Nemo 12B has 12,247,782,400", "head_dim says how wide a head is")
def heads_that_share_the_width(config):
    return counted(config, head=config["hidden_size"] // config["num_attention_heads"])


@CONFIG.wrong("209,715,200 too many", "the output of attention goes from")
def an_output_that_is_square(config):
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    queries = heads * config.get("head_dim", hidden // heads)
    return counted(config) + config["num_hidden_layers"] * hidden * (hidden - queries)


@CONFIG.wrong("changed the config")
def popped(config):
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return counted(config)


@CONFIG.wrong("returned None")
def no_count(config):
    counted(config)


# ------------------------------------------------------------------------- 2. bytes of each stage


def stages(model, layout, kept, flight=None, each=None, ends=True, norm=True, logits=True):
    p, table = layout.pipeline, model.vocabulary * model.hidden
    each = each or 6 + 12 / layout.data
    flight = flight or (lambda r: min(p - r, layout.microbatches))
    found = []
    for r in range(p):
        parameters = model.layers // p * model.layer_parameters
        if ends:
            parameters += table * ((r == 0) + (r == p - 1)) + norm * model.hidden * (r == p - 1)
        held = parameters / layout.tensor * each + model.layers // p * kept * flight(r)
        if logits and r == p - 1:
            tokens = layout.microbatch * layout.sequence_length
            held += 12 * tokens * model.vocabulary / layout.tensor
        found.append(held)
    return found


@STAGES.right
def from_the_last_to_the_first(model, layout, kept):
    p, m = layout.pipeline, layout.microbatches
    layers = model.layers // p
    held = [layers * (model.layer_parameters / layout.tensor * (6 + 12 / layout.data))] * p
    held = [each + layers * kept * min(m, 1 + back) for back, each in enumerate(held)]
    table = model.vocabulary * model.hidden / layout.tensor
    held[0] += (table + model.hidden / layout.tensor) * (6 + 12 / layout.data)
    held[0] += 12 * layout.microbatch * layout.sequence_length * model.vocabulary / layout.tensor
    held[-1] += table * (6 + 12 / layout.data)
    return held[::-1]


@STAGES.right
def a_tuple(model, layout, kept):
    return tuple(stages(model, layout, kept))


@STAGES.right
def an_array(model, layout, kept):
    return np.array(stages(model, layout, kept))


@STAGES.wrong("a stage of your list is None")
def a_list_not_filled(model, layout, kept):
    return [None] * layout.pipeline


@STAGES.wrong("stage 1 holds", "Under 1F1B stage r keeps p - r")
def as_many_as_the_first_everywhere(model, layout, kept):
    return stages(model, layout, kept, flight=lambda r: layout.pipeline)


@STAGES.wrong("stage 0 holds", "A stage keeps several microbatches at once")
def one_microbatch(model, layout, kept):
    return stages(model, layout, kept, flight=lambda r: 1)


@STAGES.wrong("stage 0 holds", "All microbatches at once is GPipe")
def all_microbatches(model, layout, kept):
    return stages(model, layout, kept, flight=lambda r: layout.microbatches)


@STAGES.wrong("pipeline 8", "4 microbatches: stage 0 holds", "never more than there are")
def more_microbatches_than_there_are(model, layout, kept):
    return stages(model, layout, kept, flight=lambda r: layout.pipeline - r)


@STAGES.wrong("stage 0 holds", "p - r of them at stage r")
def the_wrong_way_round(model, layout, kept):
    return stages(model, layout, kept, flight=lambda r: min(r + 1, layout.microbatches))


@STAGES.wrong("stage 0 holds", "Under 1F1B stage r keeps p - r")
def one_too_few(model, layout, kept):
    flight = lambda r: min(layout.pipeline - r - 1, layout.microbatches)  # noqa: E731
    return stages(model, layout, kept, flight=flight)


@STAGES.wrong("Right are 20.43 GB of state, 22.48 of activations and 0.00 of logits")
def divided_by_tensor_once_more(model, layout, kept):
    return stages(model, layout, kept / layout.tensor)


@STAGES.wrong("ZeRO-1 divides the optimizer's 12 bytes by the replicas")
def nothing_sharded(model, layout, kept):
    return stages(model, layout, kept, each=18)


@STAGES.wrong("ZeRO-1 divides the optimizer's 12 bytes, and no others")
def everything_sharded(model, layout, kept):
    return stages(model, layout, kept, each=18 / layout.data)


@STAGES.wrong("Gradients are float32 here")
def lesson_08s_sixteen_bytes(model, layout, kept):
    return stages(model, layout, kept, each=4 + 12 / layout.data)


@STAGES.wrong("stage 0 holds", "The embedding is on the first stage")
def layers_alone(model, layout, kept):
    return stages(model, layout, kept, ends=False)


@STAGES.wrong("stage 3 holds", "The norm before the head")
def no_norm(model, layout, kept):
    return stages(model, layout, kept, norm=False)


@STAGES.wrong("stage 3 holds", "The last stage has logits")
def no_logits(model, layout, kept):
    return stages(model, layout, kept, logits=False)


@STAGES.wrong("return a list of 4 numbers")
def the_first_stage_alone(model, layout, kept):
    return stages(model, layout, kept)[:1]


# --------------------------------------------------------------------------- 3. virtual stages


def fitting(p, m, layers, share, of_step=True, divides=True, groups=True):
    for v in range(1, layers // p + 1):
        bubble = (p - 1) / (v * m)
        part = bubble / (1 + bubble) if of_step else bubble
        if (divides and layers // p % v) or (groups and v > 1 and m % p):
            continue
        if part <= share:
            return v
    return None


@VIRTUAL.right
def by_slots(p, m, layers, share):
    """Work is m v slots, and waiting p - 1."""
    choices = [v for v in range(1, layers // p + 1) if layers // p % v == 0]
    choices = choices if m % p == 0 else [1]
    return next((v for v in choices if p - 1 <= share * (m * v + p - 1)), None)


@VIRTUAL.right
def the_least_of_all(p, m, layers, share):
    fine = [v for v in range(1, layers + 1) if layers % (p * v) == 0 and (v == 1 or m % p == 0)]
    return min((v for v in fine if 1 - m * v / (m * v + p - 1) <= share), default=None)


@VIRTUAL.wrong(
    "8 stages, 64 microbatches", "1 is right, and yours is 2", "of the step, work and wait together"
)
def of_the_work_alone(p, m, layers, share):
    return fitting(p, m, layers, share, of_step=False)


@VIRTUAL.wrong("12 layers", "3 is right, and yours is 2", "divide evenly")
def parts_of_layers(p, m, layers, share):
    return fitting(p, m, layers, share, divides=False)


@VIRTUAL.wrong("12 microbatches, 64 layers", "None is right", "groups of p")
def any_number_of_microbatches(p, m, layers, share):
    return fitting(p, m, layers, share, groups=False)


@VIRTUAL.wrong("a share of 0.1: None is right, and yours is 9", "at least one layer")
def more_virtual_stages_than_layers(p, m, layers, share):
    found = fitting(p, m, layers, share)
    return found or next(
        v for v in range(layers // p + 1, 999) if (p - 1) / (v * m + p - 1) <= share
    )


@VIRTUAL.wrong("1 stage, 8 microbatches", "1 is right, and yours is None")
def less_than_the_share(p, m, layers, share):
    return None if p == 1 else fitting(p, m, layers, share)


@VIRTUAL.wrong("a share of 0.1: None is right, and yours is 0", "None if no number is enough")
def zero_for_none(p, m, layers, share):
    return fitting(p, m, layers, share) or 0


@VIRTUAL.wrong("should return a number, and returned a str")
def in_words(p, m, layers, share):
    return str(fitting(p, m, layers, share))


@VIRTUAL.wrong("1 is right, and yours is 8", "9.9 % of the step, work and wait together")
def a_stage_a_layer(p, m, layers, share):
    return layers // p


@VIRTUAL.wrong("a share of 0.4: 1 is right, and yours is None", "takes any number")
def multiples_always(p, m, layers, share):
    return fitting(p, m, layers, share) if m % p == 0 else None


# ------------------------------------------------------------------------ 4. the fewest GPUs


def days_or_never(best_plan, count, tokens):
    try:
        return best_plan(count).days(tokens)
    except ValueError:
        return float("inf")


@FEWEST.right
def all_that_are_enough(best_plan, counts, tokens, days):
    enough = [count for count in counts if days_or_never(best_plan, count, tokens) <= days]
    return min(enough, default=None)


@FEWEST.right
def from_above(best_plan, counts, tokens, days):
    found = None
    for count in reversed(counts):
        if days_or_never(best_plan, count, tokens) > days:
            break
        found = count
    return found


@FEWEST.wrong("stopped with ValueError: llama3-70b does not fit")
def it_always_fits(best_plan, counts, tokens, days):
    return next((n for n in counts if best_plan(n).days(tokens) <= days), None)


@FEWEST.wrong("1024 is right, and yours is None", "raises a ValueError: more GPUs may still do")
def nothing_fits_if_the_first_does_not(best_plan, counts, tokens, days):
    try:
        return next((n for n in counts if best_plan(n).days(tokens) <= days), None)
    except ValueError:
        return None


@FEWEST.wrong("1 billion tokens in 30 days: 32 is right, and yours is 8", "it does not fit")
def hours_divided(best_plan, counts, tokens, days):
    """What is known of the largest count, divided: as if each GPU were as good everywhere."""
    hours = best_plan(counts[-1]).gpu_hours(tokens)
    return next((n for n in counts if hours / n / 24 <= days), None)


@FEWEST.wrong("2,300 billion tokens in 30 days: None is right, and yours is 1024")
def the_hours_of_64_gpus_divided(best_plan, counts, tokens, days):
    hours = best_plan(64).gpu_hours(tokens)
    fits = [n for n in counts if days_or_never(best_plan, n, tokens) < float("inf")]
    return next((n for n in fits if hours / n / 24 <= days), None)


@FEWEST.wrong("1,850 billion tokens in 30 days: 1024 is right, and yours is 768", "30.5 days")
def the_hours_of_the_first_that_fits_divided(best_plan, counts, tokens, days):
    fits = [n for n in counts if days_or_never(best_plan, n, tokens) < float("inf")]
    if days_or_never(best_plan, counts[-1], tokens) > days:
        return None
    hours = best_plan(fits[0]).gpu_hours(tokens)
    return next((n for n in fits if hours / n / 24 <= days), None)


@FEWEST.wrong("150 billion tokens in 30 days: 64 is right, and yours is 96", "so are fewer")
def the_hours_of_the_largest_divided(best_plan, counts, tokens, days):
    fits = [n for n in counts if days_or_never(best_plan, n, tokens) < float("inf")]
    hours = best_plan(counts[-1]).gpu_hours(tokens)
    return next((n for n in fits if hours / n / 24 <= days), None)


@FEWEST.wrong("1 billion tokens", "are enough, and so are fewer")
def the_largest(best_plan, counts, tokens, days):
    enough = [n for n in counts if days_or_never(best_plan, n, tokens) <= days]
    return max(enough, default=None)


@FEWEST.wrong("2,000 billion tokens in 30 days", "it takes")
def the_first_that_fits(best_plan, counts, tokens, days):
    return next(n for n in counts if days_or_never(best_plan, n, tokens) < float("inf"))


@FEWEST.wrong("2,300 billion tokens in 30 days: None is right", "On 1024 it takes 32.2 days")
def the_last_one_at_least(best_plan, counts, tokens, days):
    return all_that_are_enough(best_plan, counts, tokens, days) or counts[-1]


# ----------------------------------------------------------------------------- 5. three layouts

SHARDED = Layout(512, 8192, data=64, sharded=3)
SLOW = Layout(512, 4096, data=8, sharded=1, tensor=4, sequence_parallel=True, pipeline=8)
LARGE = Layout(
    512, 8192, data=16, sharded=1, tensor=8, sequence_parallel=True, pipeline=16,
    schedule="interleaved", virtual_stages=8, recompute="alternate",
)  # fmt: skip


@LAYOUTS.right
def others_as_good():
    return (
        replace(SHARDED, data=32, sharded=1, tensor=2, sequence_parallel=True),
        replace(SLOW, data=16, pipeline=4),
        replace(LARGE, virtual_stages=4),
    )


@LAYOUTS.right
def with_selective_recomputation():
    return [replace(SHARDED, recompute="selective"), replace(SLOW, recompute="selective"), LARGE]


@LAYOUTS.wrong("8B on 64 H100", "72 are allowed", "The most is")
def plain_data_parallelism():
    return [replace(SHARDED, sharded=0), SLOW, LARGE]


@LAYOUTS.wrong("70B on 256 A100", "s are possible", "communication that nothing hides")
def zero_3_on_a_slow_network():
    return [SHARDED, Layout(512, 4096, data=256, sharded=3, recompute="full"), LARGE]


@LAYOUTS.wrong("405B on 2,048 H100", "Most is lost in the bubble")
def no_virtual_stages():
    return [SHARDED, SLOW, replace(LARGE, schedule="1F1B", virtual_stages=1)]


@LAYOUTS.wrong("405B on 2,048 H100", "The most is activations")
def nothing_computed_again():
    return [SHARDED, SLOW, replace(LARGE, recompute="none")]


@LAYOUTS.wrong("8B on 64 H100", "Most is lost to compute again")
def everything_computed_again():
    return [replace(SHARDED, recompute="full"), SLOW, LARGE]


@LAYOUTS.wrong("8B on 64 H100: data 32 x tensor 1", "makes 32 GPUs")
def half_of_the_gpus():
    return [replace(SHARDED, data=32), SLOW, LARGE]


@LAYOUTS.wrong("the schedule is '1F1B' or 'interleaved' here, and yours is 'ZB-1p'")
def zero_bubble():
    return [SHARDED, replace(SLOW, schedule="ZB-1p"), LARGE]


@LAYOUTS.wrong("precision stays 'bf16', and yours is 'fp8'")
def eight_bits():
    return [replace(SHARDED, precision="fp8"), SLOW, LARGE]


@LAYOUTS.wrong("three layouts")
def one_for_all():
    return SHARDED


@LAYOUTS.wrong("should be a Layout, and is a dict")
def dictionaries():
    return [{"data": 64}, {"data": 8}, {"data": 16}]
