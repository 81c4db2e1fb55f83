"""Checks of lesson 14: sizes from a config, bytes by stage, virtual stages, GPUs, three layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from course_lib.exercises.cluster_tasks import TASKS, TOLERANCE, fastest, judge, what_it_loses
from course_lib.exercises.stage_memory import PIPELINES, held, mistake_of
from course_lib.exercises.verdict import Verdict, Wrong, check, require_number, right
from course_lib.planner import MODELS, Layout, Model, Plan, cluster, search
from course_lib.planner.activations import layer_activations

# Sizes as their authors publish them, in the words of a config.json.
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama 3 8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "Llama 2 7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "Llama 3.2 1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "Mistral Nemo 12B": {
        "hidden_size": 5120,
        "intermediate_size": 14336,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
        "tie_word_embeddings": False,
    },
}


@check
def check_config(parameters_of: Callable[[dict], int]) -> Verdict:
    """Graded on grouped queries, a tied head, and heads that are narrower than the model."""
    for name, config in CONFIGS.items():
        given = dict(config)
        ours = require_number(parameters_of(given))
        if given != config:
            raise Wrong("your function changed the config that it was given: leave it alone.")
        wanted = _parameters(config)
        if ours != wanted:
            raise Wrong(
                f"{name} has {wanted:,} parameters, and yours are {ours:,.0f}: "
                f"{abs(ours - wanted):,.0f} too {'many' if ours > wanted else 'few'}."
                f"{_config_hint(config, ours - wanted)}"
            )
    return right("to the last parameter, for four models.")


def _parameters(config: dict[str, Any]) -> int:
    return Model(
        name="of a config.json",
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        ffn=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        kv_heads=config["num_key_value_heads"],
        gated=True,
        tied=config["tie_word_embeddings"],
        biased=False,
        head_size=config.get("head_dim", 0),
    ).parameters


def _config_hint(config: dict[str, Any], off: float) -> str:
    """The mistake that is off by as much, if there is one."""
    hidden, layers, heads = (
        config[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    head = config.get("head_dim", hidden // heads)
    queries = heads * head
    keys_values = 2 * config["num_key_value_heads"] * head
    table, norms = config["vocab_size"] * hidden, (2 * layers + 1) * hidden
    mistakes = {
        layers * hidden * (2 * queries - keys_values): "Keys and values have fewer heads than the "
        "queries: num_key_value_heads.",
        -layers * hidden * config["intermediate_size"]: "SwiGLU has three matrices.",
        layers * hidden * config["intermediate_size"]: "SwiGLU has three matrices, and yours four.",
        -table: "A head that is not tied is a matrix of its own, as large as the embedding.",
        table: "A tied head is the embedding: it counts once.",
        -norms: "The norms are missing: two a layer and one at the end, as wide as the model.",
        -hidden: "The norm behind the last layer is missing.",
        -2 * layers * hidden: "The norms of the layers are missing: two each.",
        -layers * hidden * queries: "The output of attention has a matrix too.",
        norms: "These norms have a scale and no shift.",
        layers * hidden * (hidden - queries): "head_dim says how wide a head is: the output of "
        "attention goes from heads times head_dim to the width of the model.",
        layers * (2 * hidden * (hidden - queries)): "head_dim says how wide a head is: here heads "
        "times head_dim is not the width of the model.",
        layers * (hidden - queries) * hidden * (2 + keys_values / queries): "head_dim says how "
        "wide a head is: here heads times head_dim is not the width of the model.",
    }
    return f" {mistakes[off]}" if off and off in mistakes else ""


@check
def check_stages(stage_bytes: Callable[[Model, Layout, float], Sequence[float]]) -> Verdict:
    """Graded on every stage of four pipelines; the last one is of a published figure."""
    fullest = []
    for model, layout in PIPELINES:
        kept = layer_activations(model, layout, layout.recompute)
        ours = _numbers(stage_bytes(model, layout, kept), layout.pipeline)
        wanted = [held(model, layout, kept, stage) for stage in range(layout.pipeline)]
        for stage, (one, other) in enumerate(zip(ours, wanted, strict=True)):
            if not math.isclose(one, other, rel_tol=1e-9):
                raise Wrong(
                    f"{model.name}, tensor {layout.tensor}, pipeline {layout.pipeline}, data "
                    f"{layout.data}, {layout.microbatches} microbatches: stage {stage} holds "
                    f"{other:,.0f} bytes, and yours {one:,.0f}."
                    f"{mistake_of(model, layout, kept, stage, one)}"
                )
        fullest.append(f"{wanted.index(max(wanted))} of {layout.pipeline}")
    # What of the last one's first stage are activations: a figure states them.
    without = _numbers(stage_bytes(model, layout, 0.0), layout.pipeline)
    activations = f"{(ours[0] - without[0]) / 2**30:.2f} GiB"
    return right(
        f"every stage of four pipelines. The fullest are the stages {', '.join(fullest)}.",
        [("activations of Korthikanti's 1T", activations, "131.25 GiB, figure 1")],
    )


def _numbers(answer: Any, count: int) -> list[float]:
    if answer is None:
        raise Wrong("your function returned None: is a return statement missing?")
    if isinstance(answer, np.ndarray):
        answer = answer.tolist()
    if not isinstance(answer, (list, tuple)) or len(answer) != count:
        raise Wrong(f"return a list of {count} numbers for {count} stages, the first stage first.")
    if any(each is None for each in answer):
        raise Wrong("a stage of your list is None: each has a number of bytes.")
    return [require_number(each) for each in answer]


@check
def check_virtual(fewest_virtual_stages: Callable[[int, int, int, float], int | None]) -> Verdict:
    """Graded on shares that count idle time in the step, and on what divides."""
    for p, m, layers, share, wanted, why in (
        (8, 64, 64, 0.1, 1, "With 1 the bubble is 9.9 % of the step, work and wait together."),
        (4, 8, 12, 0.2, 3, "Each stage's layers divide evenly over its virtual stages."),
        (16, 16, 128, 0.15, 8, "4 leave 19 % of the step as bubble."),
        (16, 16, 128, 0.1, None, "None if no number is enough: a stage has at least one layer."),
        (8, 12, 64, 0.3, None, "Interleaved takes microbatches in groups of p."),
        (8, 12, 64, 0.4, 1, "A single virtual stage is 1F1B, which takes any number."),
        (1, 8, 24, 0.0, 1, "One stage waits for nobody."),
        (12, 24, 72, 0.2, 2, "1 leaves 31 % of the step as bubble."),
    ):
        ours = fewest_virtual_stages(p, m, layers, share)
        if ours is not None:
            require_number(ours)
        if ours != wanted:
            raise Wrong(
                f"{p} stage{'s' if p > 1 else ''}, {m} microbatches, {layers} layers, a share of "
                f"{share:g}: {wanted} is right, and yours is {ours!r}. {why}"
            )
    return right("the fewest virtual stages, and None where no number is enough.")


BATCH, LENGTH = 1536, 8192
COUNTS = [8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024]


@cache
def _best_plan(count: int) -> Plan:
    where = cluster("H100", count)
    return search(
        MODELS["llama3-70b"], where, BATCH, LENGTH, keep=1, recompute="full", microbatch=1
    ).best[0]


@check
def check_fewest(
    fewest_gpus: Callable[[Callable[[int], Plan], list[int], float, float], int | None],
) -> Verdict:
    """Graded on a 70B: where memory decides, where days decide, where nothing is enough."""
    facts, days = [], 30.0
    for tokens in (2e12, 1e9, 2.3e12, 1.85e12, 1.5e11):
        ours = fewest_gpus(_best_plan, list(COUNTS), tokens, days)
        wanted = next((count for count in COUNTS if _enough(count, tokens, days)), None)
        case = f"{tokens / 1e9:,g} billion tokens in {days:g} days"
        if ours != wanted:
            hint = _fewest_hint(ours, tokens, days)
            raise Wrong(f"{case}: {wanted} is right, and yours is {ours!r}.{hint}")
        facts.append((case, str(ours), str(wanted)))
    few, many = (_best_plan(count).gpu_hours(1e12) / 24 for count in (64, 1024))
    return right(
        "the fewest GPUs that have room and are fast enough. Dividing would not do: a trillion "
        f"tokens take {few:,.0f} GPU-days on 64 GPUs and {many:,.0f} on 1,024.",
        facts,
    )


def _enough(count: int, tokens: float, days: float) -> bool:
    try:
        return _best_plan(count).days(tokens) <= days
    except ValueError:
        return False


def _fewest_hint(ours: Any, tokens: float, days: float) -> str:
    if ours is None:
        return " Where it does not fit, best_plan raises a ValueError: more GPUs may still do."
    if ours not in COUNTS:
        return " Take one of the counts, or None."
    try:
        needs = _best_plan(ours).days(tokens)
    except ValueError:
        return f" On {ours} it does not fit: best_plan raises a ValueError there."
    if needs > days:
        return f" On {ours} it takes {needs:.1f} days."
    return f" {ours} are enough, and so are fewer."


@check
def check_layouts(three_layouts: Callable[[], Sequence[Layout]]) -> Verdict:
    """Graded on memory, and on seconds beside those of the search's first choice."""
    answer = three_layouts()
    if answer is None:
        raise Wrong("your function returned None: is a return statement missing?")
    if not isinstance(answer, (list, tuple)) or len(answer) != len(TASKS):
        raise Wrong("return three layouts, in the order of the three clusters.")
    facts = []
    for task, layout in zip(TASKS, answer, strict=True):
        if not isinstance(layout, Layout):
            raise Wrong(f"{task.name}: this should be a Layout, and is a {type(layout).__name__}.")
        found = judge(task, layout)
        best = fastest(task)
        target = f"{best * TOLERANCE:.2f} s or less"
        facts.append((task.name, f"{found.seconds:.2f} s, MFU {found.mfu:.0%}", target))
        if found.seconds > best * TOLERANCE:
            raise Wrong(
                f"{task.name}: {found.seconds:.2f} s a step, and {best:.2f} s are possible."
                f"{what_it_loses(found)}",
                facts,
            )
    return right("three clusters, three layouts that the search could hardly better.", facts)
