"""Queries and keys of the lightning indexer in fp8, as DeepSeek-V3.2-Exp quantises them (`act_quant` in its
inference/kernel.py, whose scales are powers of two by "scale_fmt": "ue8m0" in its config).
"""

import torch
from torch import Tensor

from kernels.common.arguments import at_least_float32

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
LEAST_MAXIMUM = 1e-4  # a row whose numbers are all smaller is scaled as if this were its largest
MANTISSA, EXPONENT = 0x007FFFFF, 0x7F800000  # bits of float32


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [..., D] as fp8 (E4M3), and the scale [...] of each row in float32, by which it is to be multiplied: the
    least power of two by which no number of the row lies above 448, the largest of E4M3. What is NaN or infinite
    becomes NaN."""
    x = x.float()
    ratio = x.abs().amax(-1, keepdim=True).clamp(min=LEAST_MAXIMUM) * (1 / LARGEST)
    scale = ((ratio.view(torch.int32) + MANTISSA) & EXPONENT).view(torch.float32)
    return (x / scale).clamp(-LARGEST, LARGEST).to(FP8), scale.squeeze(-1)


def restored(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what fp8 numbers [..., D] and the scales [...] of their rows stand for, in `dtype`."""
    return (numbers.float() * scale[..., None]).to(dtype)


def rounded(x: Tensor) -> Tensor:
    """Return the numbers that x has in fp8: in float32, which holds them all, or float64 for float64."""
    return restored(*quantised(x), at_least_float32(x))
