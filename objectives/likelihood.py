"""What an objective says about held-out sequences and about its samples."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Likelihood:
    """-log p of B sequences in nats, or an upper bound on it.

    nats_B: [B] float64; where it is a bound, an unbiased Monte Carlo estimate of each sequence's bound.
    variance: Monte Carlo variance of the sum of nats_B given the sequences, estimated without bias; 0 where exact.
    exact: whether it is the likelihood itself and not a bound.
    """

    nats_B: Tensor
    variance: float
    exact: bool


@dataclass(frozen=True)
class Samples:
    """tokens_BT: [B, T] int64, prompt included. evaluations: passes of the network a sequence."""

    tokens_BT: Tensor
    evaluations: int
