"""``python -m course_lib.ranks 4 train.py ...``: a script for ``torchrun``, on virtual GPUs.

The script runs once a rank, as ``torchrun --nproc-per-node 4 train.py ...`` would run it. What each
rank sent, held and took is printed at the end. ``--cuda`` is for scripts that say "cuda" where
others ask ``torch.accelerator``; :mod:`course_lib.ranks.cuda_scripts` says how they are read.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import course_lib
from course_lib import format_bytes, ranks
from course_lib.ranks.cuda_scripts import explain, read_differently
from course_lib.ranks.script import main_program
from course_lib.virtual import spec as specs


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; see ``python -m course_lib.ranks --help``."""
    options = _parser().parse_args(arguments)
    if not options.script.is_file():
        raise SystemExit(f"there is no script {options.script}")
    gpu: specs.Spec = getattr(specs, options.gpu)
    try:
        gpus = course_lib.devices(options.ranks, gpu / options.divide, backing=options.backing)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from None
    program = _cuda_program if options.cuda else main_program
    with program(options.script, options.arguments) as run, course_lib.trace() as trace:
        try:
            ranks.run(run, gpus)
        except Exception as error:
            explain(error, options.cuda)
            raise
    print(_summary(trace, gpus))
    if options.trace is not None:
        _save(trace, options.trace)


@contextmanager
def _cuda_program(script: Path, arguments: list[str]) -> Iterator[Callable[[], None]]:
    """As ``main_program``, of a script that says "cuda"; at the end it says what that changed."""
    with read_differently(script.resolve().parent) as reading:
        try:
            given = reading.arguments(arguments)
            with main_program(script, given, reading.code) as run:
                yield run
        finally:
            print(reading)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m course_lib.ranks", description=__doc__)
    kinds = [name for name, value in vars(specs).items() if isinstance(value, specs.Spec)]
    parser.add_argument("--gpu", default="A100", choices=kinds, help="which GPU each is like")
    parser.add_argument("--divide", type=float, default=1, help="so many times smaller and slower")
    parser.add_argument("--backing", default="cpu", help="'meta': shapes, memory and time alone")
    parser.add_argument("--cuda", action="store_true", help='run a script that says "cuda"')
    parser.add_argument(
        "--trace", type=Path, help="a file to save: .json for Perfetto, or a picture"
    )
    parser.add_argument("ranks", type=int, help="how many ranks, each with one GPU")
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the script is given")
    return parser


def _summary(trace: course_lib.Trace, gpus: list) -> str:
    """One line a rank: bytes sent, the peak of memory, seconds at work."""
    lines = [f"{trace.seconds * 1e3:.4g} ms {trace.provenance}"]
    for rank, gpu in enumerate(gpus):
        lines.append(
            f"rank {rank}: sent {format_bytes(trace.bytes_sent(gpu))}, "
            f"held {format_bytes(trace.peak_memory[rank])} at most, "
            f"worked {trace.busy_seconds(rank) * 1e3:.4g} ms"
        )
    return "\n".join(lines)


def _save(trace: course_lib.Trace, path: Path) -> None:
    if path.suffix == ".json":
        trace.save(path)
    else:
        figure = trace.plot().get_figure(root=True)
        assert figure is not None
        figure.savefig(path)
    print(f"saved {path}")


if __name__ == "__main__":
    main()
