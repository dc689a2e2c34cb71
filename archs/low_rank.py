"""The contract of a linear layer with a low-rank adapter, for those who read a weight and do not call the layer.

Shape letters: none; A and B are the two matrices of an adapter, named as peft names them.
"""

from typing import Any

from torch import Tensor, nn


class LowRank(nn.Module):
    """A linear layer with weight W [..., out, in] that computes W x + scale B (A x).

    lora_A, lora_B: linear layers of their own, whose weights are A [..., rank, in] and B [..., out, rank].
    """

    weight: Any
    bias: Any
    lora_A: Any
    lora_B: Any
    scale: float

    def whole_weight(self) -> Tensor:
        """W + scale B A."""
        return self.weight + self.scale * (self.lora_B.weight @ self.lora_A.weight)


def whole_weight(layer: nn.Linear) -> Tensor:
    """The weight [out, in] by which a linear layer multiplies, the share of its adapter included."""
    return layer.whole_weight() if isinstance(layer, LowRank) else layer.weight
