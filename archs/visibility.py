"""Which tokens a token may look at."""

from enum import Enum


class Visibility(Enum):
    """What an objective asks for and a mixer can or cannot do."""

    CAUSAL = "causal"
    BIDIRECTIONAL = "bidirectional"

    def pairs(self, T: int) -> int:
        """Number of (query, key) pairs in a sequence of T tokens: what attention has to compute."""
        return T * (T + 1) // 2 if self is Visibility.CAUSAL else T * T


CAUSAL, BIDIRECTIONAL = Visibility.CAUSAL, Visibility.BIDIRECTIONAL
