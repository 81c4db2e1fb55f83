"""Which of PyTorch's device-generic tests are not expected to pass on virtual GPUs, and why."""

from __future__ import annotations

import re

# A test is excused if its name or the words of its failure match. Each row: file, test, words.
EXCEPTIONS: list[tuple[str, str, str, str]] = []


def reason_for(file: str, test: str, failure: str) -> str | None:
    """Why ``test`` of ``file`` is excused from passing; ``None`` if it is not."""
    for in_file, name, words, reason in EXCEPTIONS:
        if in_file in file and re.search(name, test) and re.search(words, failure):
            return reason
    return None
