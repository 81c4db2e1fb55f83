"""Does a lesson print the same on other CPUs, and with other numbers of threads?

    python tools/portable.py [notebooks/02_x.ipynb ...]

Runs each lesson as on a CPU without vector instructions, with AVX2, and with all that this machine
has, then with two and with eight threads, and names the cells that print something else than what
is committed. Takes a few minutes a lesson.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from notebook_tools import execute, lessons, said


def instructions(aten: str, mkl: str, onednn: str) -> dict[str, str]:
    """The variables with which PyTorch's kernels, MKL and oneDNN are told what the CPU can do."""
    return {
        "ATEN_CPU_CAPABILITY": aten,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
        "ONEDNN_MAX_CPU_ISA": onednn,
    }


MACHINES: dict[str, Mapping[str, str]] = {
    "no vector instructions": instructions("default", "SSE4_2", "SSE41"),
    "AVX2": instructions("avx2", "AVX2", "AVX2"),
    "this CPU": {},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "eight threads": {"OMP_NUM_THREADS": "8"},
}


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the kernels that start in the block."""
    before = dict(os.environ)
    os.environ.update({"COURSE_DEVICES": "virtual", "OMP_NUM_THREADS": "1", **variables})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def differences(committed: NotebookNode, run: NotebookNode) -> list[str]:
    """The cells that say something else than they did, with the first line that differs."""
    found = []
    for before, now in zip(committed.cells, run.cells, strict=True):
        if now.cell_type != "code" or "nbval-ignore-output" in now.metadata.get("tags", []):
            continue
        old, new = said(before).splitlines(), said(now).splitlines()
        if old != new:
            pairs = zip([*old, ""], [*new, ""], strict=False)
            one, other = next((pair for pair in pairs if pair[0] != pair[1]), ("", "more lines"))
            found.append(f"{now.id}: {one!r} is now {other!r}")
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", type=Path, help="all notebooks if none is given")
    bad = 0
    for path in parser.parse_args(arguments).paths or lessons():
        committed = nbformat.read(path, as_version=4)
        for machine, variables in MACHINES.items():
            with environment(variables):
                found = differences(committed, execute(committed, cwd=path.parent))
            print(f"{path.name}, {machine}: {len(found)} cells differ", flush=True)
            for line in found:
                print("  " + line)
            bad += len(found)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
