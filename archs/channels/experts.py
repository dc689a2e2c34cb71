"""The linear layers of experts."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExpertLinear(nn.Module):
    """One linear layer per expert.

    weight: [experts, out_features, in_features]; bias: [experts, out_features] or None. top_k: experts that a token
    goes through, which costs are counted by.
    """

    def __init__(self, experts: int, in_features: int, out_features: int, bias: bool, top_k: int):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(experts, out_features)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, segments: Sequence[Tensor], experts: Sequence[int]) -> list[Tensor]:
        """Bring each segment [n, in_features], with n its own, through the expert named beside it: [n,
        out_features]."""
        # Where autograd records, indexing would cost a gradient as large as all experts for each of them; unbind stacks
        # them once. Where it does not, unbind would cost a view of each expert for the few that one token uses.
        stacked = torch.is_grad_enabled()
        weights = self.weight.unbind() if stacked else self.weight
        biases = self.bias.unbind() if stacked and self.bias is not None else self.bias
        return [
            F.linear(x, weights[e], None if biases is None else biases[e])
            for x, e in zip(segments, experts, strict=True)
        ]
