"""One GPT twice: the course's, with shapes and no numbers, and as the planner describes it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from course_lib.models import GPT
from course_lib.planner import Model, gpt


@dataclass(frozen=True)
class BareGPT:
    """Its sizes; ``depth`` unless a test asks for another one."""

    vocabulary: int
    length: int
    width: int
    heads: int
    depth: int

    def a_gpt(self, depth: int | None = None) -> GPT:
        sizes = self.vocabulary, self.length, self.width, self.heads, depth or self.depth
        with torch.device("meta"):
            return GPT(*sizes, tied=False).to(torch.bfloat16)

    def sizes(self, depth: int | None = None) -> Model:
        described = gpt("", depth or self.depth, self.width, self.heads, self.vocabulary)
        return replace(described, positions=self.length, tied=False)

    def tokens(self, rows: int, device: torch.device | str = "cpu") -> Tensor:
        return torch.zeros(rows, self.length, dtype=torch.int64, device=device)
