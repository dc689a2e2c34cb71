"""Sudoku of four rows."""

from functools import cache
from itertools import permutations

import numpy as np

from experiments.data.environments.contracts import Environment, Problem

SIDE = 4
LINES = [
    *([SIDE * r + c for c in range(SIDE)] for r in range(SIDE)),
    *([SIDE * r + c for r in range(SIDE)] for c in range(SIDE)),
    *([SIDE * r + c for r in (top, top + 1) for c in (left, left + 1)] for top in (0, 2) for left in (0, 2)),
]  # the places of each row, column and box
DIGITS = b"1234"


class Sudoku(Environment):
    """Sixteen cells row by row, `12343.12214.4.21:`, and the digits of the empty ones in that order, `433`.

    The digits 1 to 4 stand once in every row, column and box of two by two. Where a grid can be filled in several ways,
    each is right. An attempt has the digits that are missing, in random order.

    Args:
        empty: how many cells are, from 1 to 16.
    """

    alphabet = b".1234:"

    def __init__(self, empty: int = 8):
        if not 1 <= empty <= SIDE**2:
            raise ValueError(f"empty={empty} must be from 1 to {SIDE**2}")
        self.empty = empty
        self.name = f"sudoku-{empty}"
        self.longest = SIDE**2 + 1, empty

    def problem(self, random: np.random.Generator) -> Problem:
        grid = bytearray(grids()[random.integers(len(grids()))])
        empty = np.sort(random.choice(SIDE**2, self.empty, replace=False))
        answer = bytes(grid[i] for i in empty)
        for i in empty:
            grid[i] = ord(".")
        return Problem(bytes(grid) + b":", answer)

    def attempt(self, prompt: bytes, random: np.random.Generator) -> bytes:
        missing = b"".join(DIGITS[i : i + 1] * (SIDE - prompt.count(DIGITS[i])) for i in range(SIDE))
        return bytes(random.permutation(list(missing)).tolist())

    def check(self, prompt: bytes, answer: bytes) -> float:
        if len(answer) != self.empty:
            return 0.0
        digits = iter(answer)
        grid = [next(digits) if cell == ord(".") else cell for cell in prompt[: SIDE**2]]
        return float(all(sorted(grid[i] for i in line) == list(DIGITS) for line in LINES))


@cache
def grids() -> list[bytes]:
    """Returns all 288 full grids."""
    found, rows = [b""], [bytes(row) for row in permutations(DIGITS)]
    for _ in range(SIDE):
        found = [grid + row for grid in found for row in rows if _agrees(grid + row)]
    return found


def _agrees(grid: bytes) -> bool:
    """Returns whether no digit stands twice in a line of the first rows of a grid."""
    lines = ([grid[i] for i in line if i < len(grid)] for line in LINES)
    return all(len(set(line)) == len(line) for line in lines)
