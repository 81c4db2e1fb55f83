"""The planner as a command.

    python -m course_lib.planner --model llama3-405b --gpus 16384 --gpu H100 --batch 2048 \
        --sequence 8192 --tensor 8 --pipeline 16 --virtual 8 --sharded 2
    python -m course_lib.planner --model llama3-8b --gpus 64 --gpu A100 --batch 512 --search
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from course_lib.planner.clusters import GPUS, cluster
from course_lib.planner.layouts import ATTENTION, KERNELS, PRECISIONS, RECOMPUTE, SCHEDULES, Layout
from course_lib.planner.models import MODELS, model_named
from course_lib.planner.planning import describe, plan
from course_lib.planner.searching import search


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
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
    add("--batch", type=int, default=0, help="sequences a step (default: 4 M tokens' worth)")
    add("--sequence", type=int, default=8192, help="tokens in a sequence")
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
    where = cluster(asked.gpu, asked.gpus, asked.node, asked.network * 1e9 / 8)
    model = model_named(asked.model)
    if asked.sequence < 1:
        raise ValueError(f"--sequence is a number of tokens above 0, not {asked.sequence}")
    fixed = _fixed(asked)
    if asked.search:
        batch = asked.batch or max(1, 2**22 // asked.sequence)
        found = search(model, where, batch, asked.sequence, **fixed)
        lines = [found.best[0].report(asked.tokens), "", "the fastest:"]
        lines += [
            f"  {each.seconds:8.4g} s, {each.memory.total / 1e9:4.0f} GB: {describe(each.layout)}"
            for each in found.best
        ]
        lines.append(f"of {found.tried} layouts, these fell out:")
        lines += [f"  {count:6}  {why}" for why, count in found.fell_out.most_common() if count]
        return "\n".join(lines)
    others = asked.gpus
    for name in ("tensor", "pipeline", "context"):
        others //= max(1, fixed.get(name, 1))
    fixed.setdefault("data", max(1, others))
    batch = asked.batch or max(1, 2**22 // asked.sequence)
    return plan(model, where, Layout(batch, asked.sequence, **fixed)).report(asked.tokens)


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
