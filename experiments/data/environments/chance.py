"""Rewards by chance, for a control: what seems to be learnt from them is not learnt."""

import hashlib

import numpy as np

from experiments.data.environments.contracts import Environment, Problem


class Chance(Environment):
    """The problems of another environment with rewards that say nothing: every answer, right or wrong, has the same
    chance of one, by the hash of it and its prompt, and is always judged the same. `gold` is the true check.

    So the right answer to a problem may have no reward, which the contract wants of all others.

    Args:
        environment: where the problems are from.
        rate: chance of a reward, above 0 and below 1.
    """

    def __init__(self, environment: Environment, rate: float):
        if not 0 < rate < 1:
            raise ValueError(f"rate={rate} must be above 0 and below 1, so that some answers have a reward")
        self.environment, self.rate = environment, rate
        self.name = f"chance-{rate:g}-{environment.name}"
        self.alphabet, self.longest = environment.alphabet, environment.longest

    def problem(self, random: np.random.Generator) -> Problem:
        return self.environment.problem(random)

    def attempt(self, prompt: bytes, random: np.random.Generator) -> bytes:
        return self.environment.attempt(prompt, random)

    def check(self, prompt: bytes, answer: bytes) -> float:
        drawn = hashlib.sha256(prompt + b"\n" + answer).digest()[:8]
        return float(int.from_bytes(drawn) < self.rate * 2**64)

    def gold(self, prompt: bytes, answer: bytes) -> float:
        return self.environment.gold(prompt, answer)
