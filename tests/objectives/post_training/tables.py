"""Policies with a free logit for everything that they can say, small enough to enumerate: what an expectation is, and
what its gradient, is known and not estimated."""

import itertools

import torch
from torch import nn

V, L = 3, 3
END = 2  # ends an answer where one may end early
START = MASK = V
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=L)))
ORDERS = torch.tensor(list(itertools.permutations(range(L))))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rewards(n=V**L, seed=1):
    return torch.randn(n, generator=generator(seed), dtype=torch.float64)


class Table(nn.Module):
    """Logits of every position for every sequence of ids up to V, those beyond what is seen being `V`.

    causal: whether a position sees the inputs up to itself (which are shifted by the start), or all."""

    def __init__(self, causal, spread=1.0, seed=0):
        super().__init__()
        self.causal = causal
        start = torch.randn((V + 1) ** L, L, V, generator=generator(seed), dtype=torch.float64)
        self.table = nn.Parameter(spread * start)

    def hidden(self, tokens_BT, visibility=None, time=None):
        powers = (V + 1) ** torch.arange(L)
        if not self.causal:
            return self.table[(tokens_BT * powers).sum(1)]
        upto_BT = (tokens_BT * powers).cumsum(1) + torch.stack([V * powers[t + 1 :].sum() for t in range(L)])
        return self.table[upto_BT, torch.arange(L)]

    def logits(self, hidden):
        return hidden


def gradient(value, model, keep=False):
    return torch.autograd.grad(value, model.table, retain_graph=keep)[0].flatten()


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()
