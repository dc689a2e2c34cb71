"""Countdown: make a number of given ones."""

import re

import numpy as np

from experiments.data.environments.contracts import Environment, Problem

TARGETS = range(100)
EXPRESSION = re.compile(rb"[1-9]([-+*][1-9])*")


class Countdown(Environment):
    """Digits and a target, `3 5 7=56:`; the answer joins all digits by + - * and is read from left to right, `3+5*7`.

    The digits are drawn from 1 to 9, then their order and the signs until the value lies from 0 to 99, so every problem
    can be solved. An attempt has the digits in random order and random signs.

    Args:
        numbers: how many digits, at least 2; an answer has 2 numbers - 1 bytes.
    """

    alphabet = b" *+-0123456789:="

    def __init__(self, numbers: int = 3):
        if numbers < 2:
            raise ValueError(f"numbers={numbers} must be at least 2, so that there is a sign to choose")
        self.numbers = numbers
        self.name = f"countdown-{numbers}"
        self.longest = 2 * numbers + 3, 2 * numbers - 1

    def problem(self, random: np.random.Generator) -> Problem:
        numbers = random.integers(1, 10, self.numbers)
        while (target := value(answer := _expression(numbers, random))) not in TARGETS:
            pass
        return Problem(b"%s=%d:" % (b" ".join(b"%d" % i for i in numbers), target), answer)

    def attempt(self, prompt: bytes, random: np.random.Generator) -> bytes:
        return _expression(np.array(prompt.partition(b"=")[0].split(), int), random)

    def check(self, prompt: bytes, answer: bytes) -> float:
        given, _, target = prompt.rstrip(b":").partition(b"=")
        if not EXPRESSION.fullmatch(answer) or sorted(answer[::2]) != sorted(given[::2]):
            return 0.0
        return float(value(answer) == int(target))


def value(expression: bytes) -> int:
    """Returns the value of digits joined by + - *, from left to right: that of 3+5*7 is 56."""
    total = int(expression[:1])
    for sign, digit in zip(expression[1::2], expression[2::2], strict=True):
        number = digit - ord("0")
        total = total + number if sign == ord("+") else total - number if sign == ord("-") else total * number
    return total


def _expression(numbers: np.ndarray, random: np.random.Generator) -> bytes:
    signs = random.integers(3, size=len(numbers))
    return b"".join(b"%c%d" % (b"+-*"[s], i) for s, i in zip(signs, random.permutation(numbers), strict=True))[1:]
