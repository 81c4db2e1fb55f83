"""Three clusters for which lesson 14 asks a layout, and what is said of one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

from course_lib.exercises.verdict import Wrong
from course_lib.planner import MODELS, Cluster, Layout, Model, Plan, cluster, plan, search


@dataclass(frozen=True, eq=False)
class Task:
    """A model to be cut over a cluster."""

    name: str
    model: Model
    where: Cluster
    batch: int
    length: int


TASKS = (
    Task("8B on 64 H100", MODELS["llama3-8b"], cluster("H100", 64), 512, 8192),
    Task(
        "70B on 256 A100, 25 Gb/s",
        MODELS["llama3-70b"],
        cluster("A100", 256, network=25e9 / 8),
        512,
        4096,
    ),
    Task("405B on 2,048 H100", MODELS["llama3-405b"], cluster("H100", 2048), 512, 8192),
)
CHOSEN = {
    "data", "sharded", "tensor", "sequence_parallel", "pipeline", "schedule", "virtual_stages",
    "microbatch", "recompute",
}  # fmt: skip
SCHEDULES = ("1F1B", "interleaved")  # that the search chooses between
TOLERANCE = 1.15  # times the seconds of the search's first choice


def judge(task: Task, layout: Layout) -> Plan:
    """The plan of a layout that keeps to the rules and fits."""
    plain = Layout(task.batch, task.length)
    for field in fields(Layout):
        given, wanted = getattr(layout, field.name), getattr(plain, field.name)
        if field.name not in CHOSEN and given != wanted:
            raise Wrong(f"{task.name}: {field.name} stays {wanted!r}, and yours is {given!r}.")
    if layout.schedule not in SCHEDULES:
        raise Wrong(
            f"{task.name}: the schedule is {' or '.join(map(repr, SCHEDULES))} here, and yours is "
            f"{layout.schedule!r}."
        )
    try:
        found = plan(task.model, task.where, layout)
    except ValueError as error:
        raise Wrong(f"{task.name}: {error}.") from None
    limit = 0.9 * task.where.gpu.memory
    if found.memory.total > limit:
        held = found.memory
        names = ("parameters", "gradients", "optimizer", "activations")
        most = max(names, key=lambda name: getattr(held, name))
        raise Wrong(
            f"{task.name}: {held.total / 1e9:.0f} GB a GPU, and {limit / 1e9:.0f} are allowed. The "
            f"most is {most}: {getattr(held, most) / 1e9:.0f} GB."
        )
    return found


def what_it_loses(found: Plan) -> str:
    time, layout = found.time, found.layout
    lost = {
        "in the bubble": time.bubble / found.seconds,
        "in communication that nothing hides": time.exposed / found.seconds,
        "to compute again": 1 - found.mfu / found.hfu,
    }
    where = max(lost, key=lambda name: lost[name])
    if lost[where] < 0.05:
        return f" No part of it is large: the products are small with tensor {layout.tensor}."
    return f" Most is lost {where}: {lost[where]:.0%} of the step."


@cache
def fastest(task: Task) -> float:
    return search(task.model, task.where, task.batch, task.length, keep=1).best[0].seconds
