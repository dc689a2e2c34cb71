"""A random order of any number of things that takes no more memory for more of them."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

KEPT = 1 << 20  # numbers at most whose order is drawn at once and kept, 8 MB of it
ROUNDS = 6


class Shuffled:
    """0 .. size - 1 in an order drawn from a key: `order[position]` is the number there.

    Up to KEPT numbers it is a permutation of NumPy's. Beyond, a number is a pair, left * R + right with left below
    L = ceil(sqrt(size)) and right below R = ceil(size / L), and a Feistel network moves each half in turn by a hash of
    the other; what comes out at size or above goes in again, so that this too is a permutation (Black and Rogaway,
    CT-RSA 2002, "Ciphers with arbitrary finite domains": generalised Feistel and cycle walking). Each position is
    computed by itself, in some ten microseconds.

    Args:
        size: >= 1.
        key: numbers >= 0.
    """

    def __init__(self, size: int, key: Sequence[int]):
        self.size = size
        self._kept = np.random.default_rng(list(key)).permutation(size) if size <= KEPT else None
        self._key = " ".join(map(str, key)).encode()
        self._left = math.isqrt(size - 1) + 1
        self._right = -(-size // self._left)

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} of {self.size} numbers")
        if self._kept is not None:
            return int(self._kept[position])
        number = self._network(position)
        while number >= self.size:
            number = self._network(number)
        return number

    def _network(self, number: int) -> int:
        left, right = divmod(number, self._right)
        for turn in range(0, ROUNDS, 2):
            left = (left + self._hash(turn, right)) % self._left
            right = (right + self._hash(turn + 1, left)) % self._right
        return left * self._right + right

    def _hash(self, turn: int, half: int) -> int:
        return int.from_bytes(hashlib.blake2b(b"%s %d %d" % (self._key, turn, half), digest_size=8).digest())
