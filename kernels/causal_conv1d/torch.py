"""The short convolution through PyTorch's depthwise convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_torch(x: Tensor, weight: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes as in `causal_conv1d`."""
    padded = torch.cat([initial_state.to(x.dtype), x], dim=1)
    y_BCT = F.conv1d(padded.mT, weight[:, None].to(x.dtype), groups=x.shape[2])
    return F.silu(y_BCT).mT, padded[:, x.shape[1] :]


def causal_conv1d_flops(T: int, channels: int, width: int) -> int:
    """Forward FLOPs of one sequence of T tokens."""
    return 2 * width * channels * T
