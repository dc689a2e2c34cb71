"""A chain of operations modulo a prime."""

import numpy as np

from experiments.data.environments.contracts import Environment, Problem

SIGNS = b"+-*"
PRIMES = (2, 3, 5, 7)


class ModularArithmetic(Environment):
    """`3+5*2-6:` and the answer `123`: what there is after each operation, from left to right, modulo a prime (here 7).

    Numbers are at least 1, so each operation can be undone and the last result depends on all that stands in front of
    it. An attempt has random digits.

    Args:
        modulus: 2, 3, 5 or 7.
        operations: how many, at least 1.
    """

    def __init__(self, modulus: int = 7, operations: int = 6):
        if modulus not in PRIMES or operations < 1:
            raise ValueError(f"modulus={modulus} must be one of {PRIMES}, and operations={operations} at least 1")
        self.modulus, self.operations = modulus, operations
        self.name = f"modular-{modulus}x{operations}"
        self.alphabet = SIGNS + b"0123456789"[:modulus] + b":"
        self.longest = 2 * operations + 2, operations

    def problem(self, random: np.random.Generator) -> Problem:
        numbers = b"".join(b"%d" % number for number in random.integers(1, self.modulus, self.operations + 1))
        signs = bytes(SIGNS[i] for i in random.integers(len(SIGNS), size=self.operations))
        pairs = zip(signs, numbers[1:], strict=True)
        prompt = numbers[:1] + b"".join(map(bytes, pairs)) + b":"
        return Problem(prompt, self._results(prompt))

    def attempt(self, prompt: bytes, random: np.random.Generator) -> bytes:
        return b"".join(b"%d" % digit for digit in random.integers(self.modulus, size=self.operations))

    def check(self, prompt: bytes, answer: bytes) -> float:
        return float(answer == self._results(prompt))

    def _results(self, prompt: bytes) -> bytes:
        total, results = int(prompt[:1]), b""
        for sign, number in zip(prompt[1:-1:2], map(int, prompt[2:-1:2].decode()), strict=True):
            total = total + number if sign == ord("+") else total - number if sign == ord("-") else total * number
            total %= self.modulus
            results += b"%d" % total
        return results
