"""What an objective says about held-out sequences.

Shape letters: B sequences, T tokens, D model width, V token ids, N positions picked out of a batch, S draws of noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy.special import stdtrit
from torch import Generator, Tensor

from archs.language_model import LanguageModel
from kernels import linear_cross_entropy

LARGE_VOCABULARY = 2048  # from here on losses without all logits in memory are faster too; at 257 they are slower


@dataclass(frozen=True)
class Likelihood:
    """-log p of B sequences in nats, or an upper bound on it.

    nats_B: [B] float64; where it is a bound, an unbiased Monte Carlo estimate of each sequence's bound.
    variance: Monte Carlo variance of the sum of nats_B given the sequences, estimated without bias; 0 where exact.
    exact: whether it is the likelihood itself and not a bound.
    degrees: degrees of freedom of the variance, the number of draws less one; 0 where exact.
    """

    nats_B: Tensor
    variance: float
    exact: bool
    degrees: int = 0

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The range in which the exact bound of these sequences, in nats of all of them, lies with this confidence
        (Student's t)."""
        total = self.nats_B.sum().item()
        reach = stdtrit(self.degrees, (1 + confidence) / 2) * self.variance**0.5 if self.degrees else 0.0
        return total - reach, total + reach


def bound_by(draw: Callable[[Generator], Tensor], draws: int, generator: Generator) -> Likelihood:
    """The bound as the mean of independent draws, each [B] float64 nats, at least two; their spread is its error."""
    nats_SB = torch.stack([draw(generator) for _ in range(draws)])
    variance = nats_SB.sum(1).var().item() / draws
    return Likelihood(nats_SB.mean(0), variance, exact=False, degrees=draws - 1)


def check_draws(evaluation_draws: int) -> None:
    """
    Raises:
        ValueError: for fewer than two, which have no spread.
    """
    if evaluation_draws < 2:
        raise ValueError(f"evaluation_draws={evaluation_draws}: a standard error needs at least 2")


def nats_at(logits_NV: Tensor, tokens_BT: Tensor, where_BT: Tensor) -> Tensor:
    """-log p [B, T] of the N tokens where where_BT is true, 0 elsewhere."""
    nats_N = F.cross_entropy(logits_NV, tokens_BT[where_BT], reduction="none")
    return nats_N.new_zeros(tokens_BT.shape).masked_scatter(where_BT, nats_N)


def summed_nats(
    model: Any,
    hidden_BTD: Tensor,
    tokens_BT: Tensor,
    weights_BT: Tensor,
    where_BT: Tensor,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of nats times weights over the tokens where where_BT is true, with gradients, and these nats [B, T]
    without, 0 elsewhere and (with a large vocabulary) where the weight is 0. vocab_size: of the head's ids only the
    first so many can be, where it has more.

    With a large vocabulary no logits but those of a few tokens are in memory; on a GPU all hidden vectors are handed
    over, of which the kernel leaves out what weighs nothing, and nobody waits to know how many there are."""
    weights_BT = weights_BT.where(where_BT, 0)  # elsewhere they may be infinite
    if not isinstance(model, LanguageModel) or len(model.head.weight) < LARGE_VOCABULARY:
        nats_BT = nats_at(model.logits(hidden_BTD[where_BT])[:, :vocab_size], tokens_BT, where_BT)
        return (nats_BT * weights_BT.to(nats_BT)).sum(), nats_BT.detach()
    everywhere = hidden_BTD.is_cuda
    hidden_ND, tokens_N, weights_N = (
        x.flatten(0, 1) if everywhere else x[where_BT] for x in (hidden_BTD, tokens_BT, weights_BT)
    )
    vectors_ND, head, bias = model.head_product(hidden_ND)
    if vocab_size is not None and vocab_size < len(head):  # a part of the head would get its gradient by a copy
        barred = torch.arange(len(head), device=head.device) >= vocab_size
        bias = (head.new_zeros(len(head)) if bias is None else bias).masked_fill(barred, -torch.inf)
    total, nats_N = linear_cross_entropy(vectors_ND, head, tokens_N, token_weights=weights_N, bias=bias)
    if everywhere:
        return total, nats_N.view(tokens_BT.shape)
    return total, nats_N.new_zeros(tokens_BT.shape).masked_scatter(where_BT, nats_N)


def mean_nats(nats_BT: Tensor, weights_BT: Tensor, counted: Tensor) -> Tensor:
    """The sum of nats times weights over a number of tokens, those whose weight is not 0 here or in the whole batch; 0
    where there is no such token."""
    return (nats_BT * weights_BT.to(nats_BT)).sum() / counted.clamp_min(1)
