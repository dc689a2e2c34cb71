"""Several environments as one."""

from collections.abc import Sequence
from string import ascii_uppercase

import numpy as np

from experiments.data.environments.contracts import Environment, Problem


class Mixture(Environment):
    """Problems of several environments, each as likely. The first byte of a prompt, A, B, ..., tells which it is from.

    Args:
        environments: from 1 to 26, of different names.
    """

    def __init__(self, environments: Sequence[Environment]):
        names = [environment.name for environment in environments]
        if not 1 <= len(names) <= len(ascii_uppercase) or len(set(names)) < len(names):
            raise ValueError(f"environments={names} must be from 1 to {len(ascii_uppercase)}, each of another name")
        self.environments = dict(zip(ascii_uppercase.encode(), environments, strict=False))
        self.name = "+".join(names)
        self.alphabet = bytes(sorted({*self.environments, *b"".join(each.alphabet for each in environments)}))
        prompts, answers = zip(*(environment.longest for environment in environments), strict=True)
        self.longest = 1 + max(prompts), max(answers)

    def problem(self, random: np.random.Generator) -> Problem:
        tag = list(self.environments)[random.integers(len(self.environments))]
        problem = self.environments[tag].problem(random)
        return Problem(bytes([tag]) + problem.prompt, problem.answer)

    def attempt(self, prompt: bytes, random: np.random.Generator) -> bytes:
        return self.environments[prompt[0]].attempt(prompt[1:], random)

    def check(self, prompt: bytes, answer: bytes) -> float:
        return self.environments[prompt[0]].check(prompt[1:], answer)

    def gold(self, prompt: bytes, answer: bytes) -> float:
        return self.environments[prompt[0]].gold(prompt[1:], answer)

    def task(self, prompt: bytes) -> str:
        return self.environments[prompt[0]].task(prompt[1:])
