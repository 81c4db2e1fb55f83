"""Make the tables beside this script anew: ``python -m course_lib.sweeps``; about 20 minutes.

Steps depend a little on the CPU, since rounding does. Simulated seconds and bytes do not.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median

from course_lib import hardware
from course_lib.sweeps import experts, overlap, training
from course_lib.sweeps.tables import best_rates, read
from course_lib.sweeps.training import LINKS, METHODS, SGD_RATES

HERE = Path(__file__).parent
BATCHES = (8, 16, 32, 64, 128, 256)
COUNTS = (1, 2, 4, 8)
SEEDS = (0, 1, 2)
COUNT = 4  # GPUs of the methods' sweep


def batches() -> Iterator[list[object]]:
    cases = [(b, rate, seed) for b in BATCHES for rate in SGD_RATES for seed in SEEDS]
    for batch, rate, seed in cases:
        yield [batch, rate, seed, training.steps_to_loss(batch, rate, seed)]


def methods() -> Iterator[list[object]]:
    cases = [
        (m, rate, seed) for m, (rates, _) in METHODS.items() for rate in rates for seed in SEEDS
    ]
    for method, rate, seed in cases:
        with hardware.fresh_devices(COUNT, training.SPEC) as gpus:
            yield [method, rate, seed, training.method_steps(method, gpus, rate, seed)]


def curves() -> Iterator[list[object]]:
    """Of each method that arrives: its best rate, and the seed that takes the median steps."""
    for method, (rate, steps) in best_rates(read("methods"), "method").items():
        if median(steps) == math.inf:
            continue
        seed = SEEDS[steps.index(median(steps))]
        with hardware.fresh_devices(COUNT, training.SPEC) as gpus:
            for look, loss in enumerate(training.method_losses(method, gpus, rate, seed), start=1):
                yield [method, rate, seed, training.PERIOD * look, f"{loss:.3g}"]


def costs() -> Iterator[list[object]]:
    cases = [("float32", n, link, b) for b in BATCHES for n in COUNTS for link in LINKS]
    cases += [(m, COUNT, link, 64) for m in METHODS for link in LINKS if m != "float32"]
    for case in cases:
        seconds, nbytes = training.step_cost(*case)
        yield [*case, f"{seconds:.6g}", f"{nbytes:g}"]


def overlaps() -> Iterator[list[object]]:
    for method in overlap.MEETING:
        for rate in METHODS[method][0]:
            for seed in SEEDS:
                with hardware.fresh_devices(COUNT, training.SPEC) as gpus:
                    yield [method, rate, seed, overlap.overlapped_steps(method, gpus, rate, seed)]


def overlap_costs() -> Iterator[list[object]]:
    for method in overlap.MEETING:
        for link in LINKS:
            seconds, nbytes = overlap.overlapped_cost(method, COUNT, link)
            yield [method, COUNT, link, f"{seconds:.6g}", f"{nbytes:g}"]


def expert_runs() -> Iterator[list[object]]:
    """The loss on the way: all rates with the first seed, then the best one with the others."""
    for kind in experts.MODELS:
        looks: dict[float, list[float]] = {}
        for rate in experts.RATES:
            looks[rate] = list(experts.losses(kind, rate, SEEDS[0]))
            yield from expert_rows(kind, rate, SEEDS[0], looks[rate])
        arrived = [rate for rate, seen in looks.items() if seen[-1] <= experts.TARGET]
        best = min(arrived, key=lambda rate: len(looks[rate]))
        for seed in SEEDS[1:]:
            yield from expert_rows(kind, best, seed, experts.losses(kind, best, seed))


def expert_rows(kind: str, rate: float, seed: int, seen: Iterable[float]) -> Iterator[list[object]]:
    for look, loss in enumerate(seen, start=1):
        yield [kind, rate, seed, experts.EVERY * look, f"{loss:.4g}"]


def expert_costs() -> Iterator[list[object]]:
    for kind in experts.MODELS:
        for link in experts.LINKS:
            seconds, nbytes, peak = experts.step_cost(kind, link)
            yield [kind, link, f"{seconds:.6g}", nbytes["within a node"], nbytes["network"], peak]


TABLES = {
    "batches": ("batch,rate,seed,steps", batches),
    "methods": ("method,rate,seed,steps", methods),
    "curves": ("method,rate,seed,steps,loss", curves),  # of the methods' best rates
    "costs": ("method,gpus,link,batch,seconds,bytes", costs),
    "experts": ("model,rate,seed,steps,loss", expert_runs),
    "expert_costs": ("model,link,seconds,within,across,peak", expert_costs),
    "overlap": ("method,rate,seed,steps", overlaps),
    "overlap_costs": ("method,gpus,link,seconds,bytes", overlap_costs),
}


def write(name: str, columns: str, rows: Iterable[list[object]]) -> None:
    with (HERE / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns.split(","))
        for row in rows:
            print(name, *row)
            writer.writerow(row)
            file.flush()


if __name__ == "__main__":
    for name in sys.argv[1:] or TABLES:
        columns, make_rows = TABLES[name]
        write(name, columns, make_rows())
