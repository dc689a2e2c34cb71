"""Dense channel mixers, and the hidden layer that experts share with them.

Shape letters: B sequences, T tokens, D model width.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.contracts import Channel

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
    "clamped_silu": lambda x: x * torch.sigmoid(1.702 * x),
}


def check_activation(activation: str, gated: bool) -> None:
    """
    Raises:
        ValueError: for an activation that is not known, or that cannot do without a gate.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not known: choose one of {sorted(ACTIVATIONS)}")
    if activation == "clamped_silu" and not gated:
        raise ValueError("activation 'clamped_silu' clamps a gated hidden layer: set gated to true, or choose 'silu'")


def activate(hidden: Tensor, activation: str, gated: bool) -> Tensor:
    """The hidden layer [..., H] after its activation; where gated it comes as [..., 2 H], the gate in the first half.

    `clamped_silu` is gpt-oss's: the gate is at most 7, the other half within -7 and 7 and shifted by one.
    """
    if not gated:
        return ACTIVATIONS[activation](hidden)
    gate, up = hidden.chunk(2, dim=-1)
    if gate.device.type == "cpu":
        gate = gate.contiguous()  # PyTorch's loops over half rows take three times as long, forward and backward
    if activation == "clamped_silu":
        gate, up = gate.clamp(max=7), up.clamp(-7, 7) + 1
    return ACTIVATIONS[activation](gate) * up


def hidden_width(width: int, expansion: float | None, multiple_of: int, hidden: int | None) -> int:
    """Returns `hidden` where it is given, else `expansion` times the width rounded up to a multiple."""
    if (expansion is None) == (hidden is None):
        raise ValueError(f"expansion {expansion} and hidden {hidden}: give one of them, and leave the other out")
    if expansion is not None:
        hidden = -(-int(expansion * width) // multiple_of) * multiple_of
    if hidden is None or hidden < 1:
        raise ValueError(f"a hidden width of {hidden} at width {width} is empty: raise expansion or hidden")
    return hidden


class MLP(Channel):
    """Two-layer perceptron, plain or gated: out(act(up x)) or out(act(gate x) * up x) (Shazeer, arXiv 2002.05202).

    Args:
        width: model width.
        activation: "gelu", "gelu_tanh" (GPT-2's approximation), "silu", "relu2" (So et al., arXiv 2109.08668),
            or "clamped_silu" (gpt-oss; gated only).
        gated: SwiGLU is "silu" gated.
        expansion: hidden width over model width; gated, 8/3 costs as much as a plain MLP of 4.
        multiple_of: the hidden width is rounded up to a multiple of this.
        hidden: exact hidden width, in place of `expansion`.
        bias: biases in both layers.

    Raises:
        ValueError: for an unknown activation, or unless exactly one of `expansion` and `hidden` is given.
    """

    def __init__(
        self,
        width: int,
        *,
        activation: str,
        gated: bool,
        expansion: float | None = None,
        multiple_of: int = 1,
        hidden: int | None = None,
        bias: bool = False,
    ):
        super().__init__()
        check_activation(activation, gated)
        hidden = hidden_width(width, expansion, multiple_of, hidden)
        self.activation, self.gated = activation, gated
        self.gate_up = nn.Linear(width, 2 * hidden if gated else hidden, bias=bias)
        self.out_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Bring x [..., width] to the same shape."""
        return self.out_proj(activate(self.gate_up(x_BTD), self.activation, self.gated))

    def residual_projections(self) -> tuple[nn.Linear]:
        return (self.out_proj,)

    def flops(self, T: int) -> int:
        """Forward FLOPs of one sequence of T tokens."""
        return 2 * T * (self.gate_up.weight.numel() + self.out_proj.weight.numel())
