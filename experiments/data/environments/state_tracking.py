"""State tracking: permutations carried out one after the other."""

from string import ascii_lowercase

import numpy as np

from experiments.data.environments.contracts import Environment, Problem

LETTERS = ascii_lowercase.encode()


class Permutations(Environment):
    """`bac cab abc:` and the answer `cba`: abc rearranged by each word in turn, which says what place a letter comes
    from.

    With 2 items it is the parity of the words `ba`, with 5 the word problem of S5 (Merrill, Petty and Sabharwal, arXiv
    2404.08819). An attempt is a random arrangement.

    Args:
        items: how many things are moved, from 2 to 26.
        length: how many permutations.
        states: whether the arrangement after every word is asked for, `bac cba cba`, and not the last alone.
    """

    def __init__(self, items: int = 3, length: int = 6, states: bool = False):
        if not 2 <= items <= len(LETTERS) or length < 1:
            raise ValueError(f"items={items} must be from 2 to {len(LETTERS)}, and length={length} at least 1")
        self.letters, self.length, self.states = LETTERS[:items], length, states
        self.name = f"permutations-{items}x{length}" + ("-states" if states else "")
        self.alphabet = b" :" + self.letters
        self.longest = length * (items + 1), length * (items + 1) - 1 if states else items

    def problem(self, random: np.random.Generator) -> Problem:
        prompt = self._words(self.length, random) + b":"
        return Problem(prompt, self._answer(prompt))

    def attempt(self, prompt: bytes, random: np.random.Generator) -> bytes:
        return self._words(self.length if self.states else 1, random)

    def check(self, prompt: bytes, answer: bytes) -> float:
        return float(answer == self._answer(prompt))

    def _words(self, number: int, random: np.random.Generator) -> bytes:
        return b" ".join(bytes(random.permutation(list(self.letters)).tolist()) for _ in range(number))

    def _answer(self, prompt: bytes) -> bytes:
        states = [self.letters]
        for word in prompt.rstrip(b":").split():
            states.append(bytes(states[-1][letter - ord("a")] for letter in word))
        return b" ".join(states[1:]) if self.states else states[-1]
