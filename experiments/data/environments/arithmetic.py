"""Addition and multiplication, with room for a working where it is wanted."""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from experiments.data.environments.contracts import Environment, Problem

DIGITS = b"0123456789"


class Arithmetic(Environment):
    """`47+85:` and the answer `=132`, or any text of at most `scratch` bytes in front of the last equals sign.

    Where there is room for it, half of the answers given show a working, `12,13=132`, so that what is learnt from them
    can grow longer or shorter. An attempt is the answer to another problem.
    """

    def __init__(self, kind: str, sign: bytes, digits: int, operands: int, scratch: int):
        if digits < 1 or operands < 2:
            raise ValueError(f"digits={digits} and operands={operands} must be at least 1 and 2")
        self.sign, self.most, self.operands, self.scratch = sign, 10**digits - 1, operands, scratch
        largest = [self.most] * operands
        needed = len(self.working(largest))
        if scratch and scratch < needed:
            raise ValueError(f"scratch={scratch} must be 0, for none, or at least {needed}, the bytes of a working")
        self.name = f"{kind}-{operands}x{digits}" + (f"-scratch{scratch}" if scratch else "")
        self.alphabet = bytes(sorted(sign + b",:=" + DIGITS))
        self.longest = operands * (digits + 1), scratch + 1 + len(str(self.result(largest)))

    @abstractmethod
    def result(self, numbers: Sequence[int]) -> int:
        """Returns the right result."""

    @abstractmethod
    def working(self, numbers: Sequence[int]) -> bytes:
        """Returns the steps to the result, none longer than that of the largest numbers."""

    def problem(self, random: np.random.Generator) -> Problem:
        numbers = random.integers(self.most, size=self.operands, endpoint=True).tolist()
        working = self.working(numbers) if self.scratch and random.random() < 0.5 else b""
        prompt = self.sign.join(b"%d" % number for number in numbers)
        return Problem(prompt + b":", b"%s=%d" % (working, self.result(numbers)))

    def attempt(self, prompt: bytes, random: np.random.Generator) -> bytes:
        return self.problem(random).answer

    def check(self, prompt: bytes, answer: bytes) -> float:
        free, equals, result = answer.rpartition(b"=")
        right = b"%d" % self.result([int(number) for number in prompt.rstrip(b":").split(self.sign)])
        return float(bool(equals) and result == right and len(free) <= self.scratch)


class Addition(Arithmetic):
    """Sums; a working is the sum of each column with its carry, from the right: 12,13 for 47+85.

    Args:
        digits: most digits of a number.
        operands: how many numbers.
        scratch: most bytes of free text in front of the result; 0 for none.
    """

    def __init__(self, digits: int = 3, operands: int = 2, scratch: int = 0):
        super().__init__("addition", b"+", digits, operands, scratch)

    def result(self, numbers: Sequence[int]) -> int:
        return sum(numbers)

    def working(self, numbers: Sequence[int]) -> bytes:
        columns = range(len(str(max(numbers))))
        sums = [sum(number // 10**i % 10 for number in numbers) for i in columns]
        return b",".join(b"%d" % total for total in accumulate(sums, lambda before, column: before // 10 + column))


class Multiplication(Arithmetic):
    """Products of two numbers; a working is the first times each digit of the second, from the right: 48,36 for 12*34.

    Args:
        digits: most digits of a number.
        scratch: most bytes of free text in front of the result; 0 for none.
    """

    def __init__(self, digits: int = 2, scratch: int = 0):
        super().__init__("multiplication", b"*", digits, 2, scratch)

    def result(self, numbers: Sequence[int]) -> int:
        return numbers[0] * numbers[1]

    def working(self, numbers: Sequence[int]) -> bytes:
        return b",".join(b"%d" % (numbers[0] * int(digit)) for digit in reversed(str(numbers[1])))
