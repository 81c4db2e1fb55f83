"""The fastest layouts of a model on a cluster, and why the others fell out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from course_lib.planner.clusters import Cluster
from course_lib.planner.constants import Constants, fitted
from course_lib.planner.layouts import Layout, check
from course_lib.planner.memory import gpu_memory
from course_lib.planner.models import Model
from course_lib.planner.planning import Plan, plan


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        best: plans that fit, fastest first.
        tried: how many layouts were looked at.
        fell_out: for each reason, how many layouts.
    """

    best: list[Plan]
    tried: int
    fell_out: Counter[str] = field(default_factory=Counter)


def search(
    model: Model,
    cluster: Cluster,
    batch: int,
    sequence_length: int,
    memory_limit: float = 0.0,
    keep: int = 5,
    constants: Constants | None = None,
    **fixed: Any,
) -> Search:
    """Look for the fastest layouts whose fullest GPU has room.

    Tensor and context parallelism stay within a node; all that divides is tried for them, for
    pipeline and virtual stages, experts, sharding, microbatch and recomputation.

    Args:
        batch: sequences a step, over all GPUs.
        memory_limit: bytes a GPU may use; nine tenths of its memory if 0.
        keep: how many of the fastest to keep.
        fixed: fields of :class:`Layout` that the search leaves as they are, as in
            ``precision="fp8"``.

    Raises:
        ValueError: nothing fits; says what comes nearest.
    """
    constants = constants or fitted()
    limit = memory_limit or 0.9 * cluster.gpu.memory
    found: list[Plan] = []
    fell_out: Counter[str] = Counter()
    tried, nearest = 0, None
    for layout in candidates(model, cluster, batch, sequence_length, fixed):
        tried += 1
        try:
            check(model, cluster, layout)
        except ValueError as error:
            fell_out[_kind(str(error))] += 1
            continue
        needed = gpu_memory(model, layout, constants).total
        if needed > limit:
            fell_out["too large for the memory"] += 1
            if nearest is None or needed < nearest[0]:
                nearest = (needed, layout)
            continue
        found.append(plan(model, cluster, layout, constants))
    found.sort(key=lambda each: each.seconds)
    fell_out["slower than the best"] = max(0, len(found) - keep)
    if not found and nearest is None:
        names = _SEARCHED - {"sequence_parallel"}
        asked = [f"{name} {value}" for name, value in fixed.items() if name in names]
        given, leave = "", ""
        if asked:
            given, leave = f" with {', '.join(asked)}", f" leave {asked[0].split()[0]} to it, or"
        raise ValueError(
            f"the search found no layout{given} that divides batch {batch} and {model.name} over "
            f"{cluster.gpus} GPUs:{leave} change the batch or the number of GPUs to ones with more "
            "divisors"
        )
    if not found:
        assert nearest is not None
        raise ValueError(
            f"{model.name} does not fit on {cluster.gpus} x {cluster.gpu.name}: the smallest "
            f"layout needs {nearest[0] / 1e9:.3g} GB a GPU, and {limit / 1e9:.3g} GB are allowed; "
            "take more GPUs, or GPUs with more memory"
        )
    return Search(found[:keep], tried, fell_out)


def candidates(
    model: Model, cluster: Cluster, batch: int, sequence_length: int, fixed: dict[str, Any]
) -> Iterator[Layout]:
    """All layouts worth a look; some do not pass :func:`check`."""

    def choices(name: str, usual: list[Any]) -> list[Any]:
        return [fixed[name]] if name in fixed else usual

    usual = {name: value for name, value in fixed.items() if name not in _SEARCHED}
    start = Layout(batch, sequence_length, **usual)
    node = _divisors(cluster.node_size)
    for tensor in choices("tensor", node):
        for context in choices(
            "context", [part for part in node if sequence_length >= 32768 * part] or [1]
        ):
            for pipeline in choices("pipeline", _divisors(cluster.gpus)):
                if pipeline > model.layers + 2 or cluster.gpus % (tensor * context * pipeline):
                    continue
                data = cluster.gpus // (tensor * context * pipeline)
                if batch % data or fixed.get("data", data) != data:
                    continue
                cut = replace(
                    start,
                    data=data,
                    tensor=tensor,
                    sequence_parallel=bool(fixed.get("sequence_parallel", tensor > 1)),
                    context=context,
                    pipeline=pipeline,
                )
                usual_experts = [part for part in _divisors(model.experts) if data % part == 0]
                for expert in choices("expert", usual_experts):
                    yield from _refined(model, replace(cut, expert=expert), choices)


def _refined(
    model: Model, cut: Layout, choices: Callable[[str, list[Any]], list[Any]]
) -> Iterator[Layout]:
    """The same cut with all stages, shards, microbatches and policies."""
    replica = cut.batch // cut.data
    layers = cut.stage_layers(model.layers)  # of the fullest stage
    virtual = [1, *(part for part in (2, 3, 4, 5, 6, 8) if part <= layers and cut.pipeline > 1)]
    sharded = [0, 1, 3] if cut.data > 1 else [0]
    if cut.pipeline > 1 and 3 in sharded:
        sharded.remove(3)  # gathers anew for every microbatch, or holds all: neither pays
    microbatches = [part for part in (1, 2, 3, 4, 6, 8, 12, 16, 32) if replica % part == 0]
    for parts in choices("virtual_stages", virtual):
        schedule = "interleaved" if parts > 1 else "1F1B"
        for shards in choices("sharded", sharded):
            for microbatch in choices("microbatch", microbatches):
                for recompute in choices("recompute", ["none", "selective", "alternate", "full"]):
                    yield replace(
                        cut,
                        virtual_stages=parts,
                        schedule=choices("schedule", [schedule])[0],
                        sharded=shards,
                        microbatch=microbatch,
                        recompute=recompute,
                    )


_SEARCHED = {
    "data", "tensor", "sequence_parallel", "context", "pipeline", "virtual_stages", "schedule",
    "sharded", "microbatch", "recompute", "expert",
}  # fmt: skip
_KINDS = {
    "does not divide": "sizes that do not divide",
    "no multiple": "microbatches that are no multiple of the stages",
    "too few": "more stages than layers",
}


def _kind(reason: str) -> str:
    return next((kind for words, kind in _KINDS.items() if words in reason), reason)


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]
