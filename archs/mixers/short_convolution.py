"""A gated short convolution as a mixer of its own: the cheapest one, which sees a few tokens back.

Shape letters: B sequences, T tokens, D model width.
"""

import torch
from torch import Tensor, nn

from archs.mixers.recurrent import RecurrentMixer
from archs.state import RecurrentState


class ShortConvolution(RecurrentMixer):
    """y = out_proj(c * conv(b * u)) with b, c, u from the token, as in LFM2 (Liquid AI, arXiv 2511.23404).

    Args:
        width: model width.
        conv_width: taps of the convolution; 1 looks at no other token.
    """

    def __init__(self, width: int, *, conv_width: int):
        super().__init__()
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(width, conv_width))
        self.conv_bias = self.memory_shape = None
        self.out_proj = nn.Linear(width, width, bias=False)
        self.reset_convolution()

    def project(self, x_BTD: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        b, c, u = self.in_proj(x_BTD).chunk(3, dim=-1)
        return (b * u,), c

    def scan(
        self, streams: tuple[Tensor, ...], state: RecurrentState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        mixed, conv = self.convolve(streams[0], state, cu_seqlens, activation=None)
        return mixed, conv, None

    def read_out(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.out_proj(gate * y)

    def scan_flops(self, T: int) -> int:
        return 0
