"""The contract of an environment: problems whose answers are checked by a program.

An environment is one class in one file and one config in configs/data; tests/data/test_environments.py holds it to what
is said here.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Problem:
    """A question and an answer that is right; there may be others."""

    prompt: bytes
    answer: bytes


class Environment(ABC):
    """A family of problems of one difficulty, which the constructor's arguments set.

    An answer is told by its bytes alone, without eot. Whatever a model may write is an answer; most are wrong.
    """

    name: str  # of the task and its difficulty, for reports
    alphabet: bytes  # the bytes that prompts and answers are made of, each once; never the NUL byte, which is padding
    longest: tuple[int, int]  # most bytes of a prompt, and of an answer that can be right

    @abstractmethod
    def problem(self, random: np.random.Generator) -> Problem:
        """Returns a problem drawn at random, one that has an answer."""

    @abstractmethod
    def attempt(self, prompt: bytes, random: np.random.Generator) -> bytes:
        """Returns an answer of the right form, which may well be wrong, drawn from the plausible ones."""

    @abstractmethod
    def check(self, prompt: bytes, answer: bytes) -> float:
        """Returns the reward of any answer to one of this environment's prompts, from 0 (wrong) to 1 (right)."""

    def gold(self, prompt: bytes, answer: bytes) -> float:
        """Returns what the reward ought to be: something else than `check` where that has a bug."""
        return self.check(prompt, answer)

    def task(self, prompt: bytes) -> str:
        """Returns the name of the task that a prompt belongs to."""
        return self.name
