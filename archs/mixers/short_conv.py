"""A gated short convolution as a mixer of its own: the cheapest one, which sees a few tokens back."""

import torch
from torch import Tensor, nn

from archs.state import RecurrentState
from archs.visibility import BIDIRECTIONAL, CAUSAL, Visibility
from kernels.causal_conv1d import causal_conv1d
from kernels.causal_conv1d.torch import causal_conv1d_flops


class ShortConv(nn.Module):
    """y = out_proj(c * conv(b * u)) with b, c, u from the token, as in LFM2 (Liquid AI, arXiv 2511.23404).

    Under bidirectional visibility the convolution runs in both directions with the same weights, and the two are added.

    Args:
        width: model width.
        conv_width: taps of the convolution; 1 looks at no other token.
    """

    visibilities = frozenset({CAUSAL, BIDIRECTIONAL})

    def __init__(self, width: int, *, conv_width: int):
        super().__init__()
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(width, conv_width))
        self.out_proj = nn.Linear(width, width, bias=False)
        nn.init.uniform_(self.conv_weight, -(conv_width**-0.5), conv_width**-0.5)

    def forward(
        self, x_BTD: Tensor, visibility: Visibility, state: RecurrentState | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        """Mix x [B, T, width]. With a state, x continues the tokens in it, which must be causal."""
        b, c, u = self.in_proj(x_BTD).chunk(3, dim=-1)
        u = b * u
        mixed, conv = causal_conv1d(
            u, self.conv_weight, initial_state=None if state is None else state.conv, activation=None
        )
        if visibility is BIDIRECTIONAL:
            mixed = mixed + causal_conv1d(u.flip(1), self.conv_weight, activation=None)[0].flip(1)
        return self.out_proj(c * mixed), None if state is None else RecurrentState(conv)

    def empty_state(self, batch: int) -> RecurrentState:
        channels, taps = self.conv_weight.shape
        return RecurrentState(self.in_proj.weight.new_zeros(batch, taps - 1, channels))

    def flops(self, T: int, visibility: Visibility) -> int:
        """Forward FLOPs of one sequence: projections, and the convolution once a direction."""
        projections = 2 * T * (self.in_proj.weight.numel() + self.out_proj.weight.numel())
        directions = 2 if visibility is BIDIRECTIONAL else 1
        return projections + directions * causal_conv1d_flops(T, *self.conv_weight.shape)
