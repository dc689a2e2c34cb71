"""Which tokens a token may look at."""

from enum import Enum


class Visibility(Enum):
    """What an objective asks for and a mixer can or cannot do."""

    CAUSAL = "causal"
    BIDIRECTIONAL = "bidirectional"

    def pairs(self, T: int, window: int | None = None) -> int:
        """Number of (query, key) pairs in a sequence of T tokens: what attention has to compute. A window is the
        number of tokens that a query sees, itself included, in each direction that it sees at all."""
        unseen = max(0, T - window) if window is not None else 0
        causal = T * (T + 1) // 2 - unseen * (unseen + 1) // 2
        return causal if self is Visibility.CAUSAL else 2 * causal - T


CAUSAL, BIDIRECTIONAL = Visibility.CAUSAL, Visibility.BIDIRECTIONAL
