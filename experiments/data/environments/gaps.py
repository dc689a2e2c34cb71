"""Gaps in texts of a grammar, to be filled so that both ends fit."""

from itertools import pairwise
from string import ascii_lowercase

import numpy as np

from experiments.data.environments.contracts import Environment, Problem

LETTERS = ascii_lowercase.encode()


class Gaps(Environment):
    """A text of which only some letters are left, `fad:`, and the answer `kcbg`, what stood between them: `fkcabgd`.

    In the grammar each letter can be followed by a few others, drawn once; it is to be learnt. Whatever makes the whole
    text grammatical is right. An attempt begins each gap as the grammar wants and ends it anyhow.

    Args:
        letters: of the grammar, from 2 to 26.
        followers: of a letter, from 1 to all.
        gap: letters between two that are left.
        gaps: how many, at least 1.
        seed: of the grammar.
    """

    def __init__(self, letters: int = 16, followers: int = 2, gap: int = 3, gaps: int = 4, seed: int = 0):
        if not 2 <= letters <= len(LETTERS) or not 1 <= followers <= letters or gap < 1 or gaps < 1:
            raise ValueError(
                f"letters={letters} must be from 2 to {len(LETTERS)}, followers={followers} from 1 to all of them, "
                f"gap={gap} and gaps={gaps} at least 1"
            )
        random = np.random.default_rng(seed)
        known = list(LETTERS[:letters])
        self.followers = {letter: random.choice(known, followers, replace=False).tolist() for letter in known}
        self.gap, self.gaps = gap, gaps
        self.name = f"gaps-{letters}x{followers}-{gaps}x{gap}"
        self.alphabet = b":" + bytes(known)
        self.longest = gaps + 2, gap * gaps

    def problem(self, random: np.random.Generator) -> Problem:
        first = LETTERS[random.integers(len(self.followers))]
        text = bytes([first]) + self._walk(first, self.gaps * (self.gap + 1), random)
        between = b"".join(text[i + 1 : i + 1 + self.gap] for i in range(0, len(text) - 1, self.gap + 1))
        return Problem(text[:: self.gap + 1] + b":", between)

    def attempt(self, prompt: bytes, random: np.random.Generator) -> bytes:
        return b"".join(self._walk(letter, self.gap, random) for letter in prompt[:-2])

    def check(self, prompt: bytes, answer: bytes) -> float:
        parts = [answer[i : i + self.gap] for i in range(0, len(answer), self.gap)]
        if len(answer) != self.gap * self.gaps:
            return 0.0
        text = b"".join(prompt[i : i + 1] + part for i, part in enumerate(parts)) + prompt[-2:-1]
        return float(all(after in self.followers.get(before, ()) for before, after in pairwise(text)))

    def _walk(self, here: int, steps: int, random: np.random.Generator) -> bytes:
        walked = []
        for choice in random.integers(len(self.followers[here]), size=steps).tolist():
            walked.append(here := self.followers[here][choice])
        return bytes(walked)
