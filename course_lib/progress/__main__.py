"""``python -m course_lib.progress FOLDER``: who solved what."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from tqdm import tqdm

from course_lib.progress.again import Limits, judge_again
from course_lib.progress.lessons import lessons_in
from course_lib.progress.saved import read_class
from course_lib.progress.tables import as_text, write_csv

LESSONS = Path(__file__).resolve().parents[2] / "notebooks"


def main(arguments: list[str]) -> None:
    """Print the table of a class.

    Raises:
        SystemExit: what was asked for cannot be done; the message is one line.
    """
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a console that has no tick prints something else
        sys.stdout.reconfigure(errors="replace")
    try:
        lessons = lessons_in(options.lessons)
        found = read_class(options.folder, lessons)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if options.again:
        limits = Limits(60 * options.minutes, options.gigabytes)
        for work in tqdm(found.works.values(), desc="judging", unit="notebook"):
            found.notes += judge_again(work, limits)
    print(as_text(found, lessons))
    for note in found.notes:
        print(f"note: {note}")
    if options.csv is not None:
        try:
            write_csv(found, lessons, options.csv)
        except OSError as error:
            raise SystemExit(f"{options.csv} cannot be written: {error.strerror}") from None
        print(f"written: {options.csv}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m course_lib.progress", description="Who of a class solved which exercise."
    )
    parser.add_argument("folder", type=Path, help="a folder for each learner, or their notebooks")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a table for a gradebook")
    parser.add_argument("--again", action="store_true", help="judge every answer anew")
    parser.add_argument(
        "--minutes", type=_positive, default=5.0, help="that a notebook may take (5)"
    )
    parser.add_argument(
        "--gigabytes", type=_positive, default=4.0, help="of memory that a notebook may take (4)"
    )
    parser.add_argument(
        "--lessons", type=Path, default=LESSONS, help="the course's own notebooks (notebooks/)"
    )
    return parser


def _positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise ValueError
    return number


if __name__ == "__main__":
    main(sys.argv[1:])
