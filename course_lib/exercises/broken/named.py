"""Whether a learner has named a broken program's line at fault, and an instrument that shows it.

The line is named by its words, copied; the instrument by its name. What is named wrongly is said to
be wrong, and no more.
"""

from __future__ import annotations

from functools import cache

import torch

from course_lib.doctor import INSTRUMENTS
from course_lib.exercises.broken.cases import CASES
from course_lib.exercises.verdict import NOT_ATTEMPTED, RIGHT, WRONG, Verdict


def with_names(verdict: Verdict, name: str, text: str, line: object, instrument: object) -> Verdict:
    """The verdict on a mended program, and on what its learner named.

    Right is who has mended it and named both; who has named something, and mended nothing yet, is
    told whether that is right.

    Args:
        verdict: on the program.
        name: of the case.
        text: the program as it was.
        line, instrument: what the learner typed; ``None`` if nothing.
    """
    if verdict.status == NOT_ATTEMPTED and line is None and instrument is None:
        return verdict
    answers = [_of_line(name, text, line), _of_instrument(name, instrument)]
    said = " ".join(words for _, words in answers)
    named = all(is_right for is_right, _ in answers)
    if verdict.status == RIGHT:
        if named:
            return Verdict(RIGHT, f"{verdict.message} {said}", verdict.facts)
        return Verdict(WRONG, f"the program is mended. {said}", verdict.facts)
    if verdict.status == NOT_ATTEMPTED:
        typed = [given for given in (line, instrument) if given is not None]
        rights = sum(is_right for is_right, _ in answers)
        status = NOT_ATTEMPTED if rights == len(typed) else WRONG
        return Verdict(
            status, f"{said} The program is still to be mended: delete the line that raises."
        )
    return Verdict(
        WRONG, f"{verdict.message} {said}" if line or instrument else verdict.message, verdict.facts
    )


def _of_line(name: str, text: str, line: object) -> tuple[bool, str]:
    if line is None:
        return False, "LINE is open: which line is it?"
    if not isinstance(line, str) or not line.strip():
        return False, "LINE is the line at fault, copied from the program, in quotes."
    words = " ".join(line.split())
    there = {
        found for found in (" ".join(row.split()) for row in text.splitlines()) if words in found
    }
    if not there:
        return False, "LINE is no line of the program as it was: copy one, and nothing else."
    at_fault = {row for row in there if any(part in row for part in CASES[name].lines)}
    if at_fault == there:
        return True, "LINE is right."
    if at_fault:
        return False, f"LINE is in {len(there)} lines: copy a whole one."
    return False, "LINE is not the one at fault."


def _of_instrument(name: str, instrument: object) -> tuple[bool, str]:
    if instrument is None:
        return False, "INSTRUMENT is open: which one shows it?"
    if not isinstance(instrument, str) or instrument not in INSTRUMENTS:
        return False, f"INSTRUMENT is one of {', '.join(INSTRUMENTS)}."
    reading = readings(name).get(instrument)
    if reading is None:
        return False, f"INSTRUMENT: {instrument} is silent on this program."
    return True, f"INSTRUMENT shows it, {reading}."


@cache
def readings(name: str) -> dict[str, str]:
    """What each instrument that finds something reads first of a broken program."""
    with torch.random.fork_rng(devices=[]):
        report = CASES[name].examine()
    return {
        each.instrument: f"step {each.step}: {' '.join(each.reading.split())}"
        for each in report.findings
    }
