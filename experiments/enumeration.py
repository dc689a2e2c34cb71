"""Policies with a free logit for everything that they can say, on a language of 27 sequences: expectations over what
they write, and the gradients of these, are sums and not estimates.

Shape letters: B sequences, T tokens, L tokens of a sequence, V token ids, M ways of writing (a sequence and an order),
    P pairs of answers, N sequences whose reward is known.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from objectives.contracts import Batch, Objective
from objectives.post_training.policy_gradient import PolicyGradient
from objectives.post_training.sampled_likelihood import SampledLikelihood
from objectives.post_training.tuning import Reward

V, L = 3, 3
START = MASK = V
END = 2  # ends an answer where one may end early
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=L)))
ORDERS = torch.tensor(list(itertools.permutations(range(L))))  # the pass in which each token is drawn
WAYS = torch.tensor(list(itertools.product(range(len(SEQUENCES)), range(len(ORDERS)))))
WRITTEN, DRAWN_IN = SEQUENCES[WAYS[:, 0]], ORDERS[WAYS[:, 1]]


def generator(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def rewards(number: int = V**L, seed: int = 1) -> Tensor:
    """Normal rewards [number] float64, one per sequence."""
    return torch.randn(number, generator=generator(seed), dtype=torch.float64)


class Table(nn.Module):
    """Logits of every position for every sequence of ids up to V, which stands for what is not seen.

    Args:
        causal: whether a position sees the inputs up to itself (which are shifted by the start), or all of them.
        spread: standard deviation of the logits.
    """

    def __init__(self, causal: bool, spread: float = 1.0, seed: int = 0):
        super().__init__()
        self.causal = causal
        start = torch.randn((V + 1) ** L, L, V, generator=generator(seed), dtype=torch.float64)
        self.table = nn.Parameter(spread * start)

    def hidden(self, tokens_BT: Tensor, visibility=None, time: Tensor | None = None) -> Tensor:
        powers_L = (V + 1) ** torch.arange(L)
        if not self.causal:
            return self.table[(tokens_BT * powers_L).sum(1)]
        unseen_L = torch.stack([V * powers_L[t + 1 :].sum() for t in range(L)])
        return self.table[(tokens_BT * powers_L).cumsum(1) + unseen_L, torch.arange(L)]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def gradient(value: Tensor, model: Any, keep: bool = False) -> Tensor:
    """The gradient of a scalar with respect to the model's table, flat."""
    return torch.autograd.grad(value, model.table, retain_graph=keep)[0].flatten()


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a, b, dim=0).item()


class Known(Reward):
    """Rewards [N] of sequences [N, L], looked up."""

    def __init__(self, tokens_NL: Tensor, reward_N: Tensor):
        self.tokens_NL, self.reward_N = tokens_NL, reward_N

    def __call__(self, tokens_BT: Tensor, drawn_BT: Tensor) -> Tensor:
        found_BN = (tokens_BT[:, None] == self.tokens_NL).all(-1)
        return self.reward_N[found_BN.byte().argmax(1)]

    def flops(self, T: int) -> float:
        return 0.0


def answers(ending: bool) -> tuple[Tensor, Tensor]:
    """All answers, and which of their tokens count: all of them, or those up to the first end."""
    if not ending:
        return SEQUENCES, torch.ones_like(SEQUENCES, dtype=torch.bool)
    counted = ((SEQUENCES == END).cumsum(1) - (SEQUENCES == END).long()) == 0
    tokens = torch.unique(SEQUENCES.masked_fill(~counted, -1), dim=0)
    return tokens.clamp(min=0), tokens >= 0


def log_probs(base: Objective, model: Any, tokens_BT: Tensor, counted_BT: Tensor) -> Tensor:
    """log p [B] of answers under an autoregressive policy."""
    return -base.nats(model, Batch(tokens_BT, counted_BT.double()), generator()).sum(1)


def group_gradient(objective: PolicyGradient, model: Any, tokens_BT: Tensor, counted_BT: Tensor) -> Tensor:
    """The expected gradient of what a policy gradient increases, over all groups of two that the policy may write."""
    p_B = log_probs(objective.base, model, tokens_BT, counted_BT).exp().detach()
    pairs_P2 = torch.tensor(list(itertools.product(range(len(tokens_BT)), repeat=2)))
    weight_P1 = p_B[pairs_P2].prod(1, keepdim=True) * len(pairs_P2)
    reward_B = objective.reward(tokens_BT, counted_BT)
    advantage_P2, rows = objective.advantages(reward_B[pairs_P2]) * weight_P1, pairs_P2.flatten()
    extras = {"order": torch.zeros_like(tokens_BT[rows]), "seed": torch.zeros_like(rows)}
    extras["advantage"] = advantage_P2.flatten()
    batch = Batch(tokens_BT[rows], counted_BT[rows].double(), extras=extras)
    return -gradient(objective.loss(model, batch, generator()), model)


def log_p_by_order(model: Any) -> Tensor:
    """log p [27, 6] of each sequence when a masked denoiser draws its tokens one at a time in each order."""
    total_M = torch.zeros(len(WAYS), dtype=torch.float64)
    for k in range(L):
        logits = model.hidden(WRITTEN.masked_fill(DRAWN_IN >= k, MASK))
        log_p_ML = logits.log_softmax(-1).gather(2, WRITTEN[..., None])[..., 0]
        total_M = total_M + (log_p_ML * (DRAWN_IN == k)).sum(1)
    return total_M.view(len(SEQUENCES), len(ORDERS))


def reward_gradient(model: Any, reward: Tensor) -> Tensor:
    """The gradient of the expected reward of a masked denoiser that draws in random order."""
    return gradient((log_p_by_order(model).exp().mean(1) * reward).sum(), model)


def bound_gradient(model: Any, reward: Tensor) -> Tensor:
    """The expected policy gradient by the bound, which is the mean over orders of log p given the order."""
    log_p = log_p_by_order(model)
    return gradient((log_p.exp().mean(1).detach() * reward * log_p.mean(1)).sum(), model)


def policy_gradient(
    likelihood: SampledLikelihood, base: Objective, model: Any, reward: Tensor, draws: int = 1
) -> Tensor:
    """The expected policy gradient of a masked denoiser that draws in random order, with a likelihood in the place of
    log p; exact where that has no noise of its own, else by so many draws of it for each way of writing."""
    weight_M = (log_p_by_order(model).exp().detach() / len(ORDERS) * reward[:, None]).flatten()
    rows = WRITTEN.repeat(draws, 1)
    batch = Batch(rows, torch.ones(rows.shape), extras={"order": DRAWN_IN.repeat(draws, 1)})
    log_p = likelihood.log_probs(base, model, batch, generator()).sum(1)
    return gradient((weight_M.repeat(draws) * log_p).sum() / draws, model)
