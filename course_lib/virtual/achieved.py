"""What of a data sheet measured training reaches.

The numbers are those that ``python -m course_lib.planner.fit`` finds on published runs; a test
holds them equal. They stand here because a spec knows nothing of planners.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Achieved:
    """Parts of a GPU's speeds, each above 0 and at most 1.

    Attributes:
        product: of the peak, which large matrix products reach.
        link: of the links within a node, which large collectives reach.
        network: of the network, which large collectives reach.
    """

    product: float
    link: float = 0.7232
    network: float = 0.8345

    def __post_init__(self) -> None:
        for name, part in vars(self).items():
            if not 0 < part <= 1:
                raise ValueError(f"{name} of Achieved is a part, above 0 and at most 1: {part!r}")
