"""State tracking: permutations carried out one after the other."""

import numpy as np

from experiments.data.environments.contracts import Environment, Problem

LETTERS = b"abcdefghijklmnopqrstuvwxyz"


class Permutations(Environment):
    """`bac cab abc:` and the answer `cba`: abc rearranged by each word in turn, which says what place a letter comes
    from.

    With 2 items it is the parity of the words `ba`, with 5 the word problem of S5 (Merrill, Petty and Sabharwal, arXiv
    2404.08819). An attempt is a random arrangement.

    Args:
        items: how many things are moved, from 2 to 26.
        length: how many permutations.
    """

    def __init__(self, items: int = 3, length: int = 6):
        if not 2 <= items <= len(LETTERS) or length < 1:
            raise ValueError(f"items={items} must be from 2 to {len(LETTERS)}, and length={length} at least 1")
        self.letters, self.length = LETTERS[:items], length
        self.name = f"permutations-{items}x{length}"
        self.alphabet = b" :" + self.letters
        self.longest = length * (items + 1), items

    def problem(self, random: np.random.Generator) -> Problem:
        prompt = b" ".join(self.attempt(b"", random) for _ in range(self.length)) + b":"
        return Problem(prompt, self._end(prompt))

    def attempt(self, prompt: bytes, random: np.random.Generator) -> bytes:
        return bytes(random.permutation(list(self.letters)).tolist())

    def check(self, prompt: bytes, answer: bytes) -> float:
        return float(answer == self._end(prompt))

    def _end(self, prompt: bytes) -> bytes:
        state = self.letters
        for word in prompt.rstrip(b":").split():
            state = bytes(state[letter - ord("a")] for letter in word)
        return state
