"""Facts that only who has read them can know."""

import hashlib
from string import ascii_lowercase

import numpy as np

from experiments.data.environments.contracts import Environment, Problem

NAME = 4  # letters
LETTERS = ascii_lowercase.encode()


class Facts(Environment):
    """`qhxk:` and the answer `knn`, letters drawn by the name's hash: nothing tells them but memory.

    Problems that are held out are therefore beyond all knowledge; `environment_data` with `known` asks for those that
    were trained on. An attempt has random letters.

    Args:
        letters: that an answer can have at each place, from 2 to 26.
        length: letters of an answer, at least 1.
        seed: of the facts.
    """

    alphabet = LETTERS + b":"

    def __init__(self, letters: int = 16, length: int = 3, seed: int = 0):
        if not 2 <= letters <= len(LETTERS) or length < 1:
            raise ValueError(f"letters={letters} must be from 2 to {len(LETTERS)}, and length={length} at least 1")
        self.letters, self.length, self.seed = letters, length, seed
        self.name = f"facts-{letters}x{length}"
        self.longest = NAME + 1, length

    def problem(self, random: np.random.Generator) -> Problem:
        prompt = self._word(random, len(LETTERS), NAME) + b":"
        return Problem(prompt, self._answer(prompt))

    def attempt(self, prompt: bytes, random: np.random.Generator) -> bytes:
        return self._word(random, self.letters, self.length)

    def check(self, prompt: bytes, answer: bytes) -> float:
        return float(answer == self._answer(prompt))

    def _answer(self, prompt: bytes) -> bytes:
        digest = hashlib.sha256(b"%d " % self.seed + prompt).digest()
        return self._word(np.random.default_rng(list(digest)), self.letters, self.length)

    def _word(self, random: np.random.Generator, letters: int, length: int) -> bytes:
        return bytes(LETTERS[i] for i in random.integers(letters, size=length))
