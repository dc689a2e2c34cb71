"""The pairs of a token and an expert that it goes to, sorted by expert, and the ways of tokens there and back.

Both ways read and write each row once, forward and backward, in an order of their own: nothing is added up atomically,
and no zeros are laid out for what is to be added to.

Shape letters: N tokens, D model width, K experts per token, P = N K pairs.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pairs:
    """order_P: of each pair, in the order of experts, its place in the order of tokens; place_NK: the other way about;
    token_P: the token of each pair."""

    order_P: Tensor
    place_NK: Tensor
    token_P: Tensor

    @classmethod
    def of(cls, chosen_NK: Tensor) -> "Pairs":
        """Return the pairs of tokens whose experts are these; those of one expert in the order of their tokens."""
        order_P = chosen_NK.flatten().argsort(stable=True)
        place_P = torch.empty_like(order_P)
        place_P[order_P] = torch.arange(len(order_P), device=order_P.device)
        return cls(order_P, place_P.view_as(chosen_NK), order_P // chosen_NK.shape[1])

    def spread(self, x_ND: Tensor) -> Tensor:
        """Return each pair's token, [P, D]."""
        return Spread.apply(x_ND, self)

    def collect(self, y_PD: Tensor, gates_NK: Tensor) -> Tensor:
        """Return of each token the sum of its pairs' rows, weighted by its gates, [N, D]."""
        return Collect.apply(y_PD, gates_NK, self)


class Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return x_ND.index_select(0, pairs.token_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        return F.embedding_bag(ctx.pairs.place_NK, grads[0], mode="sum"), None


class Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, gates_NK: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        ctx.save_for_backward(y_PD, gates_NK)
        return F.embedding_bag(pairs.place_NK, y_PD, per_sample_weights=gates_NK, mode="sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        y_PD, gates_NK = ctx.saved_tensors
        pairs = ctx.pairs
        d_PD = grads[0].index_select(0, pairs.token_P)
        # What autograd takes for the weights of a bag: a product per pair, without a copy of y or of the gradient.
        N, K = gates_NK.shape
        token_NK = torch.arange(N, device=gates_NK.device).repeat_interleave(K)
        dgates_P = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grads[0], y_PD, pairs.place_NK.flatten(), token_NK[::K] * K, token_NK, 0
        )
        return d_PD.mul_(gates_NK.flatten()[pairs.order_P][:, None]), dgates_P.view_as(gates_NK), None
