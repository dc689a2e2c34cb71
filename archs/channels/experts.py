"""The linear layers of experts.

Shape letters: P pairs of a token and an expert, sorted by expert, E experts, D and F width of the input and output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import grouped_matmul


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

    def forward(self, x_PD: Tensor, counts_E: Tensor) -> Tensor:
        """Bring rows x [P, in_features], of which the first counts[0] go through the first expert, the next counts[1]
        through the second and so on, to [P, out_features]."""
        y_PF = self.product(x_PD, counts_E)
        if self.bias is None:
            return y_PF
        expert_P = torch.repeat_interleave(counts_E, output_size=len(x_PD))
        return y_PF + F.embedding(expert_P, self.bias.to(y_PF.dtype))

    def product(self, x_PD: Tensor, counts_E: Tensor) -> Tensor:
        """As `forward`, without biases."""
        return grouped_matmul(x_PD, self.weight.mT, counts_E)
