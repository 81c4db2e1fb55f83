"""The data that all lessons share. Nothing is downloaded.

* :func:`digits`: 1,797 real images of handwritten digits, 8 x 8 pixels, for the MLP.
* :func:`text`: the founding documents of the United States, character by character, for the GPT.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor

TEST_IMAGES = 360


@dataclass(frozen=True)
class Digits:
    """Images of digits, on the CPU.

    Attributes:
        x_train, x_test: pixels from 0 to 1, float32, shape (images, 64).
        y_train, y_test: the digit of each image, int64, shape (images,).
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def digits() -> Digits:
    """Alpaydin and Kaynak's digits (see ``digits/README.md``), in one random order, 360 held out.

    They are those of scikit-learn's ``load_digits``.
    """
    with files("course_lib").joinpath("digits/digits.npz").open("rb") as file:
        arrays = np.load(file)
        images, labels = arrays["images"], arrays["labels"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(images, dtype=torch.float32) / 16)[order]
    y = torch.tensor(labels, dtype=torch.int64)[order]
    return Digits(x[TEST_IMAGES:], y[TEST_IMAGES:], x[:TEST_IMAGES], y[:TEST_IMAGES])


@dataclass(frozen=True)
class Text:
    """A text as numbers.

    Attributes:
        tokens: one number for each character, int64, shape (characters,).
        vocabulary: the characters; a token is a position in it.
    """

    tokens: Tensor
    vocabulary: str

    def encode(self, string: str) -> Tensor:
        """The tokens of ``string``, int64."""
        return torch.tensor([self.vocabulary.index(character) for character in string])

    def decode(self, tokens: Tensor) -> str:
        """The characters of ``tokens``."""
        return "".join(self.vocabulary[token] for token in tokens.tolist())

    def batch(self, size: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
        """Random passages and, for each of their characters, the next one.

        Args:
            size: how many passages, B.
            length: characters in each, T.
            seed: the same seed gives the same passages.

        Returns:
            Two int64 tensors of shape (B, T): the inputs and the targets.
        """
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(self.tokens) - length, (size, 1), generator=generator)
        positions_BT = starts + torch.arange(length)
        return self.tokens[positions_BT], self.tokens[positions_BT + 1]


def text() -> Text:
    """The Declaration of Independence and the Constitution of the United States."""
    source = files("course_lib").joinpath("texts/founding_documents.txt").read_text("utf-8")
    vocabulary = "".join(sorted(set(source)))
    position = {character: index for index, character in enumerate(vocabulary)}
    return Text(torch.tensor([position[character] for character in source]), vocabulary)
