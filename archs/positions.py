"""Position encodings."""

import torch
from torch import Tensor


def rotary(x: Tensor, offset: int, base: float) -> Tensor:
    """Rotary position embedding in split halves (Su et al., RoFormer, arXiv 2104.09864, section 3.4).

    Args:
        x: [B, T, H, D] with D even; dimension i turns together with i + D / 2.
        offset: position of the first token of x.
        base: theta, 10000 in the paper.

    Returns:
        [B, T, H, D] in x's dtype; angles are computed in float32.
    """
    T, half = x.shape[1], x.shape[-1] // 2
    frequency_D = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    position_T = torch.arange(offset, offset + T, device=x.device, dtype=torch.float32)
    angle_TD = torch.outer(position_T, frequency_D)
    cos_TD, sin_TD = angle_TD.cos()[:, None].to(x.dtype), angle_TD.sin()[:, None].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos_TD - second * sin_TD, second * cos_TD + first * sin_TD], dim=-1)
