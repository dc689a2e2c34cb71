"""Sorting numbers."""

import numpy as np

from experiments.data.environments.contracts import Environment, Problem


class Sorting(Environment):
    """`31 7 25:` and the answer `7 25 31`. An attempt is a random order.

    Args:
        length: how many numbers, at least 2.
        digits: most digits of a number.
    """

    alphabet = b" 0123456789:"

    def __init__(self, length: int = 5, digits: int = 1):
        if length < 2 or digits < 1:
            raise ValueError(f"length={length} and digits={digits} must be at least 2 and 1")
        self.length, self.digits = length, digits
        self.name = f"sorting-{length}x{digits}"
        self.longest = length * (digits + 1), length * (digits + 1) - 1

    def problem(self, random: np.random.Generator) -> Problem:
        numbers = random.integers(10**self.digits, size=self.length)
        return Problem(listed(numbers) + b":", listed(np.sort(numbers)))

    def attempt(self, prompt: bytes, random: np.random.Generator) -> bytes:
        return listed(random.permutation(numbers_of(prompt)))

    def check(self, prompt: bytes, answer: bytes) -> float:
        return float(answer == listed(np.sort(numbers_of(prompt))))


def numbers_of(prompt: bytes) -> np.ndarray:
    """Returns the numbers that are to be sorted."""
    return np.array(prompt.rstrip(b":").split(), int)


def listed(numbers: np.ndarray) -> bytes:
    """Returns numbers as they stand in prompts and answers."""
    return b" ".join(b"%d" % number for number in numbers)
