"""minGRU: a gated recurrent unit whose gate and candidate look at the token alone, so that it can be scanned.

Shape letters: B sequences, T tokens, D model width, E channels of the memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.mixers.recurrent import RecurrentMixer
from archs.state import RecurrentState


class MinGRU(RecurrentMixer):
    """h_t = (1 - z_t) h_{t-1} + z_t c_t in each channel, with z = sigmoid of one projection and c another (Feng et al.,
    arXiv 2410.01201, section 3.1).

    A short causal convolution passes over both projections first (the paper has one in front of the unit), and its
    biases are those of the gate and the candidate.

    Args:
        width: model width.
        expand: channels of the memory, as a multiple of the width.
        conv_width: taps of the short convolution.
    """

    def __init__(self, width: int, *, expand: float, conv_width: int):
        super().__init__()
        self.inner = round(width * expand)
        self.in_proj = nn.Linear(width, 2 * self.inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(2 * self.inner, conv_width))
        self.conv_bias = nn.Parameter(torch.empty(2 * self.inner))
        self.out_proj = nn.Linear(self.inner, width, bias=False)
        self.memory_shape = (self.inner,)
        self.reset_convolution()

    def project(self, x_BTD: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        return (self.in_proj(x_BTD),), x_BTD

    def scan(
        self, streams: tuple[Tensor, ...], state: RecurrentState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        both, conv = self.convolve(streams[0], state, cu_seqlens, activation=None)
        z_BTE, c_BTE = both.to(torch.promote_types(both.dtype, torch.float32)).chunk(2, dim=-1)
        keep_BTE, h_BTE = (-z_BTE).sigmoid(), z_BTE.sigmoid() * c_BTE
        if cu_seqlens is not None:
            keep_BTE = keep_BTE.index_fill(1, cu_seqlens[:-1], 0)
        if state is not None and state.memory is not None:
            h_BTE = torch.cat([h_BTE[:, :1] + keep_BTE[:, :1] * state.memory[:, None], h_BTE[:, 1:]], dim=1)
        reach, T = 1, h_BTE.shape[1]
        while reach < T:  # after each round h_t holds what the last `reach` tokens wrote (Hillis and Steele, 1986)
            h_BTE = h_BTE + keep_BTE * F.pad(h_BTE[:, :-reach], (0, 0, reach, 0))
            keep_BTE = keep_BTE * F.pad(keep_BTE[:, :-reach], (0, 0, reach, 0))
            reach *= 2
        return h_BTE, conv, h_BTE[:, -1]

    def read_out(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.out_proj(y.to(gate.dtype))

    def scan_flops(self, T: int) -> int:
        """0: no product of matrices is in it."""
        return 0
