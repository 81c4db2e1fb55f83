"""Predictions: what the reader typed into a guess cell, set beside the result."""

from __future__ import annotations


def beside(guess: object, unit: str = "") -> str:
    """What to print behind a result: the reader's guess, or nothing where it was left ``None``.

    Args:
        guess: a number or a word, whatever was typed.
        unit: what the number counts, as in ``"ms"``.

    Example:
        ``print(f"{ratio:.2f} times as fast" + beside(guess_ratio))`` prints
        ``1.72 times as fast (your guess: 3.5)``.
    """
    if guess is None:
        return ""
    return f" (your guess: {guess}{' ' + unit if unit else ''})"
