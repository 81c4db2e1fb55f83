"""A learner's answers, judged anew."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from course_lib.exercises.verdict import NOT_ATTEMPTED, WRONG
from course_lib.progress.judging import READY
from course_lib.progress.lessons import Exercise
from course_lib.progress.saved import MISSING, Work, answer_of, own_cells


@dataclass(frozen=True)
class Limits:
    """What the answers in one notebook may take.

    Attributes:
        seconds: of a real clock, for the notebook.
        gigabytes: of memory, its program included.
    """

    seconds: float = 300.0
    gigabytes: float = 4.0


def judge_again(work: Work, limits: Limits) -> list[str]:
    """Judge all answers of ``work`` in another process, and set its states.

    An answer may use what the lesson's set-up and functions give it, and functions in cells that
    the learner added.

    Returns:
        A note for each answer that ended the process, or one that nothing could be judged; then the
        states are what the notebook says.
    """
    left: list[tuple[Exercise, str]] = []
    for exercise in work.lesson.exercises:
        answer = answer_of(work, exercise)
        if answer is not None:
            left.append((exercise, answer))
        elif work.states[exercise.name] != MISSING:
            work.states[exercise.name] = NOT_ATTEMPTED
    notes: list[str] = []
    where = f"{work.learner}, lesson {work.lesson.number}"
    while left:
        judged, why = _one_process(work, left, limits)
        if judged is None:
            return [*notes, f"{where}: not judged again, the process {why}"]
        work.states.update(judged)
        left = left[len(judged) :]
        if why and left:
            exercise, _ = left.pop(0)  # the one at work when the process ended
            work.states[exercise.name] = WRONG
            notes.append(f"{where}, {exercise.name}: the process {why}")
    return notes


def _one_process(
    work: Work, answers: list[tuple[Exercise, str]], limits: Limits
) -> tuple[dict[str, str] | None, str]:
    """What was judged, by name (``None`` if the lesson's set-up did not run), and why the process
    ended before all were.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        task, results = Path(folder, "task.json"), Path(folder, "results.jsonl")
        results.touch()
        contents = {
            "setup": work.lesson.setup,
            "own": own_cells(work),
            "answers": [
                {"name": exercise.name, "answer": answer, "check": exercise.check}
                for exercise, answer in answers
            ],
        }
        task.write_text(json.dumps(contents), encoding="utf-8")
        why = _ended(task, results, limits, folder)
        lines = results.read_text("utf-8").splitlines()
    if lines[:1] != [READY]:
        return None, why
    judged = [json.loads(line) for line in lines[1:]]
    return {each["name"]: each["status"] for each in judged}, why


def _ended(task: Path, results: Path, limits: Limits, folder: str) -> str:
    """Run the judge; why it did not come to its end, or nothing."""
    environment = {
        **os.environ,
        "COURSE_DEVICES": "virtual",
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
        # The process works in a folder of its own, and needs to find this package from there.
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    program = [sys.executable, "-m", "course_lib.progress.judging"]
    process = subprocess.Popen(
        [*program, str(task), str(results), str(limits.gigabytes)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        _, said = process.communicate(timeout=limits.seconds)
    except subprocess.TimeoutExpired:
        _kill(process)
        return f"was still at work after {limits.seconds:g} seconds, and was stopped"
    except BaseException:
        _kill(process)
        raise
    if process.returncode == 0:
        return ""
    last = (said.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
    return f"ended: {last[:200]}"


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:  # Windows
        process.kill()
    process.communicate()
