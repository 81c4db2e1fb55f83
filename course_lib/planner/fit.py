"""Fits the planner's constants on the published tables, and says how far off they are.

    python -m course_lib.planner.fit          # prints the errors from the constants that are kept
    python -m course_lib.planner.fit --write  # fits anew (minutes), and keeps what it finds

Links within a node are fitted on all-reduces alone, memory on memory alone, the rest on seconds of
steps. A row counts one over the root of its table's rows, so that a long table does not outvote the
others. The rival knows one number: the part of the peak that runs of that table reach.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np

from course_lib.planner import mixture_runs, searched_runs
from course_lib.planner.clusters import cluster
from course_lib.planner.communication import Network
from course_lib.planner.constants import FILE, Constants, fitted, held_out, meanings
from course_lib.planner.least_squares import Problem, minimize
from course_lib.planner.memory import gpu_memory
from course_lib.planner.published import READERS, all_runs
from course_lib.planner.rows import TABLES, Run, read, source
from course_lib.planner.splits import SPLITS, Split, rivals_errors
from course_lib.planner.timing import step_time

# Where the search starts, and what holds a constant that the rows say little about. Parts of the
# peak are those of the best products of stas00/ml-engineering@744d01e (gpu_specs.csv); hops are
# NCCL's own (nccl_alpha_constants.csv); the others are round numbers.
START = Constants(
    product_a100=0.85,
    product_a100_2021=0.8,
    product_h100=0.75,
    product_h100_500w=0.6,
    product_b200=0.75,
    product_b300=0.75,
    fp8_gain=0.7,
    wave=0.3,
    product_traffic=0.5,
    attention_a100=0.5,
    flash1_h100=0.25,
    flash2_h100=0.35,
    flash3_h100=0.5,
    scores_traffic=1.0,
    eager_traffic=1.0,
    fused_traffic=0.7,
    compiled_traffic=0.5,
    host_layer=1e-3,
    fixed_layer=2e-4,
    step=0.01,
    nvlink_part=0.8,
    nvlink_base=30e-6,
    nvlink_hop=3.4e-6,
    network_part=0.8,
    network_hop=14e-6,
    exchange_2021=1.0,
    hidden=0.8,
    outside=4e9,
    fragments=1.1,
)
LINKS = ("nvlink_part", "nvlink_base", "nvlink_hop")
MEMORY = ("outside", "fragments")
EXCHANGE = ("exchange_2021",)
STEPS = tuple(name for name in asdict(START) if name not in LINKS + MEMORY + EXCHANGE)
PARTS = frozenset(
    name
    for name in asdict(START)
    if name.startswith(("product_a", "product_h", "product_b", "attention", "flash"))
    or name in ("fp8_gain", "nvlink_part", "network_part", "exchange_2021", "hidden")
)
ITS_OWN = "bloom"  # another fabric and another framework: one constant alone is fitted on it
_EVERY = {"vtrain_single": 24}  # of a table with hundreds of rows


def predicted_seconds(run: Run, constants: Constants) -> float:
    """Seconds of a step."""
    return step_time(run.model, run.cluster, run.layout, constants).total


def predicted_memory(run: Run, constants: Constants) -> float:
    """Bytes, counted as the source counted them."""
    if run.counted != "all":
        constants = replace(constants, outside=0.0)
    if run.counted == "tensors":
        constants = replace(constants, fragments=1.0)
    return gpu_memory(run.model, run.layout, constants).total


def fit_links() -> Constants:
    """Fit NVLink's three constants on all-reduces of float32 within a node of A100s."""
    rows = read("a100_nvlink_allreduce")
    sizes = np.array([float(row["MiB"]) for row in rows])
    measured = np.array([float(row["time_ns"]) * 1e-9 for row in rows])

    def errors(constants: Constants) -> np.ndarray:
        network = Network(cluster("A100", 8), constants)
        rings = [
            network.ring("", size * 2**20, int(row["gpus"]), 1, 2, 1.0)
            for row, size in zip(rows, sizes, strict=True)
        ]
        return np.log([ring.seconds for ring in rings] / measured)

    weights = np.sqrt(sizes / sizes.mean())  # steps send tens and hundreds of MB
    return minimize(Problem(errors, weights, LINKS, PARTS), START)


def fit_memory(train: Sequence[Run], start: Constants) -> Constants:
    """Fit the two constants of memory."""
    rows = [run for run in train if run.memory]
    measured = np.array([run.memory for run in rows])

    def errors(constants: Constants) -> np.ndarray:
        return np.log([predicted_memory(run, constants) for run in rows] / measured)

    return minimize(Problem(errors, _weights(rows), MEMORY, PARTS), start)


def fit_steps(train: Sequence[Run], start: Constants, rounds: int = 15) -> Constants:
    """Fit the constants of seconds."""
    rows = [run for run in train if run.row % _EVERY.get(run.table, 1) == 0]
    rows = [run for run in rows if run.table != ITS_OWN]
    measured = np.array([run.seconds for run in rows])

    def errors(constants: Constants) -> np.ndarray:
        return np.log([predicted_seconds(run, constants) for run in rows] / measured)

    return minimize(Problem(errors, _weights(rows), STEPS, PARTS), start, rounds)


def fit_exchange(train: Sequence[Run], start: Constants) -> Constants:
    """Fit the one constant of ZeRO-1's exchange in 2021, when all others stand."""
    rows = [run for run in train if run.table == ITS_OWN]
    if not rows:
        return start
    measured = np.array([run.seconds for run in rows])

    def errors(constants: Constants) -> np.ndarray:
        return np.log([predicted_seconds(run, constants) for run in rows] / measured)

    # A whole table says what it is: the start is to hold it no longer.
    return minimize(Problem(errors, np.full(len(rows), 100.0), EXCHANGE, PARTS), start, rounds=40)


def errors_of(
    split: Split, constants: Constants, seen: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """Relative errors of a split's rows: the planner's, and those of its rival.

    Args:
        seen: whether the rival has seen these rows too, as the constants have.
    """
    everything = all_runs()
    held = [run for run in everything if split.held(run)]
    if split.quantity == "memory":
        held = [run for run in held if run.memory]
        return np.array([predicted_memory(run, constants) / run.memory - 1 for run in held]), None
    train = [run for run in everything if seen or not split.held(run)]
    seconds = np.array([run.seconds for run in held])
    ours = np.array([predicted_seconds(run, constants) for run in held])
    return ours / seconds - 1, rivals_errors(held, train)


def write() -> None:
    """Fit on everything, then on every split without its held-out rows, and keep all of it."""
    everything = all_runs()
    links = fit_links()
    whole = fit_exchange(everything, fit_steps(everything, fit_memory(everything, links)))
    kept = {"fitted": asdict(whole), "held_out": {}}
    for split in SPLITS:
        train = [run for run in everything if not split.held(run)]
        found = fit_memory(train, links)
        if split.quantity == "seconds":
            found = fit_exchange(train, fit_steps(train, found))
        kept["held_out"][split.name] = asdict(found)
        print(f"fitted without: {split.name}", flush=True)
    FILE.write_text(json.dumps(_rounded(kept), indent=1) + "\n")


def report() -> None:
    """Print constants, errors of rows that nobody fitted beside the rival's, and sources."""
    everything = all_runs()
    for name, value in asdict(fitted()).items():
        print(f"{name:20} {value:<10.4g} {meanings()[name]}")
    print(f"\n{'rows that nobody fitted':44}  rows   mean  median  worst  rival")
    for split in SPLITS:
        _print_errors(split.name, *errors_of(split, held_out()[split.name]))
    for table in searched_runs.TABLES:
        ours = np.array(searched_runs.errors(table, fitted()))
        _print_errors(f"{table}: never fitted", ours, searched_runs.own_rival(table))
    for kind, (ours, others) in mixture_runs.judged(fitted(), everything).items():
        _print_errors(f"{kind}: never fitted", ours, others)
    unseen = [np.abs(rivals_errors(list(searched_runs.stated(t)), everything)).mean()
              for t in searched_runs.TABLES]  # fmt: skip
    print("on megatron_core the rival knows the middle of these very rows; from the other tables "
          f"it is off by {unseen[0]:.1%} and {unseen[1]:.1%}")  # fmt: skip
    print("\nrows that were fitted, by both")
    for table in READERS:
        _print_errors(table, *errors_of(Split(table, _of(table)), fitted(), seen=True))
    _print_errors("memory", *errors_of(Split("memory", lambda run: True, "memory"), fitted()))
    print("\ntables")
    for path in sorted(TABLES.glob("*.csv")):
        print(f"{path.stem}: {source(path.stem)}")


def _of(table: str) -> Callable[[Run], bool]:
    return lambda run: run.table == table


def _print_errors(name: str, ours: np.ndarray, others: np.ndarray | None = None) -> None:
    size = np.abs(ours)
    line = f"{name:44} {len(ours):5} {size.mean():6.1%} {np.median(size):7.1%} {size.max():6.1%}"
    if others is not None:
        theirs = float(np.abs(others).mean())
        line += f" {theirs:6.1%}" + (" wins" if theirs < size.mean() else "")
    print(line)


def _weights(rows: Sequence[Run]) -> np.ndarray:
    counts: dict[str, int] = {}
    for run in rows:
        counts[run.table] = counts.get(run.table, 0) + 1
    return np.array([counts[run.table] ** -0.5 for run in rows])


def _rounded(values: object) -> object:
    if isinstance(values, dict):
        return {name: _rounded(value) for name, value in values.items()}
    return float(f"{values:.4g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="fit anew, and keep what is found")
    if parser.parse_args().write:
        write()
    report()
