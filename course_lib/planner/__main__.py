"""The planner as a command.

    python -m course_lib.planner --model llama3-405b --gpus 16384 --gpu H100 --batch 2048 \
        --sequence 8192 --tensor 8 --pipeline 16 --virtual 8 --sharded 2
    python -m course_lib.planner --model llama3-8b --gpus 64 --gpu A100 --batch 512 --search
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any, NoReturn

from course_lib.planner.clusters import GPUS, cluster
from course_lib.planner.configs import model_named
from course_lib.planner.layouts import (
    ATTENTION,
    KERNELS,
    PRECISIONS,
    RECOMPUTE,
    SCHEDULES,
    Layout,
    divisors,
)
from course_lib.planner.models import MODELS, Model
from course_lib.planner.planning import describe, plan
from course_lib.planner.searching import search


class OneLine(argparse.ArgumentParser):
    """Refuses in one line, as the rest of the command does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"planner: {message}; --help lists the options\n")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = OneLine(
        prog="python -m course_lib.planner",
        description="Predicts seconds, memory and cost of a training run. Constants are fitted on "
        "published runs; python -m course_lib.planner.fit prints how far off they are.",
    )
    add = options.add_argument
    add("--model", required=True, help=f"{', '.join(MODELS)}, or a Hugging Face config.json")
    add("--gpu", default="H100", help=", ".join(GPUS))
    add("--gpus", type=int, required=True, help="how many")
    add("--node", type=int, default=8, help="GPUs in a node")
    add("--network", type=float, default=0.0, help="Gb/s that a GPU has to other nodes")
    add("--batch", type=int, help="sequences a step (default: about 4 M tokens' worth)")
    add("--sequence", type=int, help="tokens in a sequence (default: 8192, or all positions)")
    add("--tokens", type=float, default=0.0, help="tokens to train on, for days and GPU-hours")
    add("--search", action="store_true", help="look for the fastest layouts that fit")
    for name in ("data", "tensor", "pipeline", "virtual", "context", "expert", "microbatch"):
        add(f"--{name}", type=int, help=f"{name} (default: 1; data: what is left)")
    add("--sharded", type=int, choices=(0, 1, 2, 3), help="ZeRO's stage (default: 0)")
    add("--shard-group", type=int, default=0, help="replicas that share one copy (HSDP)")
    add("--schedule", choices=SCHEDULES)
    add("--recompute", choices=RECOMPUTE)
    add("--precision", choices=PRECISIONS, default="bf16")
    add("--attention", choices=ATTENTION, default="flash3")
    add("--kernels", choices=KERNELS, default="fused")
    return options


def main(words: list[str] | None = None) -> int:
    """Print a plan, or the best that a search finds; 2 where something does not go together."""
    asked = parser().parse_args(words)
    try:
        print(_answer(asked))
    except ValueError as error:
        print(f"planner: {error}", file=sys.stderr)
        return 2
    return 0


def _answer(asked: argparse.Namespace) -> str:
    for name in ("network", "tokens"):
        if not 0 <= getattr(asked, name) < math.inf:
            raise ValueError(f"--{name} is a number above 0, not {getattr(asked, name)}")
    where = cluster(asked.gpu, asked.gpus, asked.node, asked.network * 1e9 / 8)
    model = model_named(asked.model)
    sequence, fixed = _sequence(asked.sequence, model), _fixed(asked)
    usual = max(1, 2**22 // sequence)
    if asked.search:
        batch = usual if asked.batch is None else asked.batch
        found = search(model, where, batch, sequence, **fixed)
        lines = [found.best[0].report(asked.tokens), "", "the fastest:"]
        lines += [
            f"  {each.seconds:8.4g} s, {each.memory.total / 1e9:4.0f} GB: {describe(each.layout)}"
            for each in found.best
        ]
        lines.append(f"of {found.tried} layouts, these fell out:")
        lines += [f"  {count:6}  {why}" for why, count in found.fell_out.most_common() if count]
        return "\n".join(lines)
    fixed.setdefault("data", _replicas(asked.gpus, fixed))
    at_once = max(1, fixed["data"] * fixed.get("microbatch", 1))
    batch = -(-usual // at_once) * at_once if asked.batch is None else asked.batch
    return plan(model, where, Layout(batch, sequence, **fixed)).report(asked.tokens)


def _sequence(asked: int | None, model: Model) -> int:
    """Tokens in a sequence, no more than the model has positions."""
    most = model.positions or math.inf
    sequence = int(min(8192, most)) if asked is None else asked
    if sequence < 1:
        raise ValueError(f"--sequence is a number of tokens above 0, not {sequence}")
    if sequence > most:
        raise ValueError(
            f"--sequence {sequence} is more than {model.name} has learned positions: at most {most}"
        )
    return sequence


def _replicas(gpus: int, fixed: dict[str, Any]) -> int:
    """The GPUs that are left for data parallelism."""
    names = ("tensor", "pipeline", "context")
    replica = math.prod(max(1, fixed.get(name, 1)) for name in names)
    if gpus % replica:
        words = " x ".join(f"{name} {fixed[name]}" for name in names if fixed.get(name, 1) > 1)
        raise ValueError(
            f"{gpus} GPUs do not divide into replicas of {words}: take a product that divides "
            f"{gpus}, as {divisors(gpus)} do"
        )
    return gpus // replica


def _fixed(asked: argparse.Namespace) -> dict[str, Any]:
    """The fields of a layout that were asked for."""
    names = ["data", "tensor", "pipeline", "context", "expert", "microbatch", "sharded"]
    names += ["schedule", "recompute"]
    given = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    if asked.virtual is not None:
        given["virtual_stages"] = asked.virtual
        if asked.virtual > 1:
            given.setdefault("schedule", "interleaved")
    if asked.shard_group:
        given["shard_group"] = asked.shard_group
    if given.get("tensor", 1) > 1:
        given["sequence_parallel"] = True
    for name in ("precision", "attention", "kernels"):
        given[name] = getattr(asked, name)
    return given


if __name__ == "__main__":
    sys.exit(main())
