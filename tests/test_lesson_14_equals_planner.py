"""What lesson 14 derives in its cells is what ``course_lib.planner`` counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest

import test_lessons_equal_modules as lessons
from course_lib.exercises.stage_memory import PIPELINES, held
from course_lib.planner import MODELS, Layout, Model, cluster, gpt, plan
from course_lib.planner.activations import (
    in_backward,
    in_flight,
    in_loss,
    layer_activations,
)
from course_lib.planner.communication import Network, layer_collectives, stage_sends
from course_lib.planner.constants import fitted
from course_lib.planner.memory import gpu_memory, stage_shares
from course_lib.planner.published import runs
from course_lib.planner.timing import StepTime, idle

# A planner that knows no more than the lesson does: products and links reach all of their speed,
# nothing is hidden, nothing takes a time of its own.
IDEAL = replace(
    fitted(),
    product_a100=1.0,
    product_h100=1.0,
    wave=0.0,
    product_traffic=0.0,
    scores_traffic=0.0,
    fused_traffic=0.0,
    host_layer=0.0,
    fixed_layer=0.0,
    step=0.0,
    nvlink_part=1.0,
    nvlink_base=0.0,
    nvlink_hop=0.0,
    network_part=1.0,
    network_hop=0.0,
    hidden=0.0,
    outside=0.0,
    fragments=1.0,
)
# Sequence parallelism, so that what is sent between stages need not be put together again.
LAYOUTS = [
    Layout(16, 8192, attention="unfused"),
    Layout(32, 2048, tensor=8, sequence_parallel=True, attention="unfused", recompute="full"),
    Layout(32, 8192, tensor=8, sequence_parallel=True, pipeline=16, attention="unfused"),
    Layout(
        64, 4096, tensor=8, sequence_parallel=True, pipeline=8, microbatch=2,
        schedule="interleaved", virtual_stages=5, attention="unfused",
    ),
]  # fmt: skip
LLAMA = MODELS["llama3-70b"]


CELLS = (
    "guess-405b", "operations", "state", "kept", "guess-flight", "flight", "guess-fits", "fits",
    "guess-tensor", "tensor", "step-communication", "guess-bubble", "bubble", "step",
)  # fmt: skip


@pytest.fixture
def lesson() -> Iterator[SimpleNamespace]:
    yield lessons.definitions("14_planning_a_cluster_run.ipynb", *CELLS)
    lessons.namespaces.clear()


@pytest.mark.parametrize("name", ["gpt3-175b", "llama3-8b", "llama3-405b"])
def test_the_operations_of_a_token_are_the_same(lesson, name: str) -> None:
    model = MODELS[name]
    for length in (2048, 8192, 131072):
        assert lesson.flops_per_token(model, length) == model.flops_per_token(length)


def beyond_kept(model: Model, layout: Layout, stage: int) -> float:
    """Bytes of a stage that no layer keeps: what is worked on, and what the last two products need.

    The loss is computed before any layer's backward pass.
    """
    around = layout.tensor if layout.sequence_parallel else 1
    last = stage == layout.pipeline - 1
    ends = last * 4 * model.hidden * layout.tokens / around * in_flight(layout, stage)
    return max(in_backward(model, layout), in_loss(model, layout, stage)) + ends


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gpu_holds_the_same_bytes(lesson, layout: Layout) -> None:
    assert lesson.kept_bytes(LLAMA, layout) * layout.tokens == pytest.approx(
        layer_activations(LLAMA, layout, "none"), rel=1e-12
    )
    assert lesson.in_flight(layout) == pytest.approx(in_flight(layout, 0))
    counted = gpu_memory(LLAMA, layout, IDEAL)
    again = layer_activations(LLAMA, layout, "none") if layout.recompute == "full" else 0.0
    beyond = beyond_kept(LLAMA, layout, layout.pipeline - 1 if layout.pipeline == 1 else 0)
    assert lesson.activation_bytes(LLAMA, layout) - again + beyond == pytest.approx(
        counted.activations
    )


def test_the_state_is_the_same_where_one_gpu_has_all_of_a_model(lesson) -> None:
    for data in (1, 8, 64):
        layout = Layout(64, 8192, data=data, sharded=1)
        counted = gpu_memory(LLAMA, layout, IDEAL)
        state = counted.parameters + counted.gradients + counted.optimizer
        assert lesson.state_bytes(LLAMA, layout) == pytest.approx(state, rel=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_messages_take_the_same_seconds(lesson, layout: Layout) -> None:
    where = cluster("H100", layout.gpus)
    network = Network(where, IDEAL)
    passes = 3 if layout.recompute == "full" else 2
    sums = passes * sum(each.total for each in layer_collectives(LLAMA, layout, network))
    assert lesson.tensor_seconds(LLAMA, layout, where) == pytest.approx(sums)
    hops = 2 * layout.virtual_stages * sum(x.total for x in stage_sends(LLAMA, layout, network))
    assert lesson.hop_seconds(LLAMA, layout, where) == pytest.approx(hops)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_waits_are_the_same(lesson, layout: Layout) -> None:
    assert lesson.waits(layout) == pytest.approx(idle(layout, 1.0, 1 / 3, 2 / 3))


def beyond_the_lesson(time: StepTime) -> float:
    """Seconds of the update, and of what embedding, head, loss and norms send."""
    names = ("embedding and head", "loss", "shared gradients")
    return time.optimizer + sum(each.total for each in time.collectives if each.name in names)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_step_takes_the_seconds_of_a_planner_that_knows_no_more(lesson, layout: Layout) -> None:
    where = cluster("H100", layout.gpus)
    counted = plan(LLAMA, where, layout, IDEAL).time
    ours = lesson.step_seconds(LLAMA, layout, where, part=1.0, traffic=0.0)
    assert ours == pytest.approx(counted.total - beyond_the_lesson(counted), rel=1e-9)


def test_a_pipeline_waits_as_long_as_the_planners(lesson) -> None:
    layout = LAYOUTS[3]  # 80 layers over 8 x 5: every stage is equal
    where = cluster("H100", layout.gpus)
    counted = plan(LLAMA, where, layout, IDEAL).time
    whole = lesson.step_seconds(LLAMA, layout, where, 1.0, 0.0)
    without = lesson.step_seconds(LLAMA, layout, where, 1.0, 0.0, without=("bubble",))
    assert whole - without == pytest.approx(counted.bubble)
    assert whole == pytest.approx(counted.total - beyond_the_lesson(counted))


def test_replicas_exchange_what_the_planner_sends(lesson) -> None:
    """But for the embedding, which the planner puts on the first stage."""
    model = gpt("a GPT", 24, 2048, 16)
    for sharded in (0, 1):
        layout = Layout(64, 2048, data=64, sharded=sharded, overlap=False)
        where = cluster("A100", 64)
        counted = plan(model, where, layout, IDEAL).time.exposed
        assert lesson.exchange_seconds(model, layout, where) == pytest.approx(counted)


def test_the_runs_that_show_the_bubble_differ_in_microbatches_alone() -> None:
    plain = [run for run in runs("zero_bubble") if run.layout.schedule == "1F1B"]
    for few, many in zip(plain[0::3], plain[2::3], strict=True):
        assert (few.model, few.cluster) == (many.model, many.cluster)
        assert replace(few.layout, batch=many.layout.batch) == many.layout
        assert few.layout.microbatches < many.layout.microbatches


@pytest.mark.parametrize("model, layout", PIPELINES[:3])
def test_exercise_2_counts_the_bytes_that_the_planner_counts(model, layout) -> None:
    kept = layer_activations(model, layout, layout.recompute)
    layout = replace(layout, sharded=1)
    stages = [held(model, layout, kept, stage) for stage in range(layout.pipeline)]
    counted = gpu_memory(model, layout, IDEAL)
    buckets = counted.buffers  # DeepSpeed's, for ZeRO-1
    # What the exercise leaves out: the embedding's dropout, what all GPUs of a tensor group
    # have alike, and what no layer keeps but the logits.
    masks = layout.tokens * model.hidden * in_flight(layout, 0) if model.biased else 0.0
    logits = 12.0 * layout.tokens * model.vocabulary / layout.tensor
    whole = []
    for stage, each in enumerate(stages):
        alike = stage_shares(model, layout, stage).alike * (1 - 1 / layout.tensor)
        beyond = alike * (2 + 4 + 12 / layout.data) + beyond_kept(model, layout, stage)
        beyond += masks * (stage == 0) - logits * (stage == layout.pipeline - 1)
        whole.append(each + beyond)
    assert max(whole) == pytest.approx(counted.total - buckets, rel=1e-9)
    for stage in range(layout.pipeline):
        assert stages[stage] > stage_shares(model, layout, stage).parameters * 6


def test_exercise_2_has_pipelines_whose_first_and_whose_last_stage_is_the_fullest() -> None:
    fullest = set()
    for model, layout in PIPELINES:
        kept = layer_activations(model, layout, layout.recompute)
        stages = [held(model, layout, kept, stage) for stage in range(layout.pipeline)]
        fullest.add((stages.index(max(stages)), layout.pipeline))
    assert {(0, 4), (7, 8)} <= fullest
