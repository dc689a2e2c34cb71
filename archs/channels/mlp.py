"""Dense channel mixers."""

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """Gated MLP (Shazeer, arXiv 2002.05202): down(silu(gate x) * up x).

    Args:
        width: model width.
        expansion: hidden width over model width; 8/3 costs as much as a plain MLP of 4.
        multiple_of: the hidden width is rounded up to a multiple of this.
    """

    def __init__(self, width: int, *, expansion: float, multiple_of: int):
        super().__init__()
        hidden = -(-int(expansion * width) // multiple_of) * multiple_of
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.out_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.out_proj(F.silu(gate) * up)

    def flops(self, T: int) -> int:
        """Forward FLOPs of one sequence of T tokens."""
        return 2 * T * (self.gate_up.weight.numel() + self.out_proj.weight.numel())
