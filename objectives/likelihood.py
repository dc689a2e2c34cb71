"""What an objective says about held-out sequences and about its samples."""

from dataclasses import dataclass

import torch.nn.functional as F
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


def answer_nats(logits_NV: Tensor, tokens_BT: Tensor, answers_BT: Tensor) -> Tensor:
    """-log p [B, T] of the N tokens where answers_BT is true, 0 elsewhere."""
    nats_N = F.cross_entropy(logits_NV, tokens_BT[answers_BT], reduction="none")
    return nats_N.new_zeros(tokens_BT.shape).masked_scatter(answers_BT, nats_N)


def mean_nats(nats_BT: Tensor, answers_BT: Tensor | None) -> Tensor:
    """Mean over the answers; over all tokens where none are marked; 0 of a batch that has no answer."""
    return nats_BT.mean() if answers_BT is None else nats_BT.sum() / answers_BT.sum().clamp_min(1)
