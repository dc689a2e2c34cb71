"""Narrow number formats, emulated exactly: what the numbers of a matrix are once it is quantised and read again.

    FORMATS["mxfp8"].quantised(x_RC, (1, 32))

Shape letters: R rows and C columns of a matrix, I and J rows and columns of blocks.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EXPONENT_BITS = 0x7F800000  # of float32


class Element(NamedTuple):
    """Floating-point numbers of few bits, without infinities.

    mantissa: bits behind the point. least: exponent of the least normal number; the subnormal ones lie as far apart as
    the normal ones there. largest: the largest number.
    """

    mantissa: int
    least: int
    largest: float


E4M3 = Element(mantissa=3, least=-6, largest=448.0)
E5M2 = Element(mantissa=2, least=-14, largest=57344.0)
E2M1 = Element(mantissa=1, least=0, largest=6.0)


def rounded(x: Tensor, element: Element) -> Tensor:
    """The number of an element nearest to each of x, float32: of two equally near the even one, and the largest where x
    is beyond it. NaN stays."""
    x = x.clamp(-element.largest, element.largest)
    step = power_below(x).clamp(min=2.0**element.least) * 2.0**-element.mantissa
    return (x / step).round() * step


def power_below(x: Tensor) -> Tensor:
    """The greatest power of two that is not above |x|, of x in float32; 0 below float32's normal numbers, and infinite
    for NaN and infinities."""
    return (x.view(torch.int32) & EXPONENT_BITS).view(torch.float32)


def real_scale(largest_IJ: Tensor, element: Element) -> Tensor:
    """A float32 by which the largest number of a block becomes the largest of the elements."""
    return largest_IJ / element.largest


def power_scale(largest_IJ: Tensor, element: Element) -> Tensor:
    """A power of two (E8M0, exponents -127 to 127) by which the largest number of a block has the exponent of the
    largest element (OCP Microscaling Formats v1.0, section 6.3); where its mantissa is beyond that, it is cut."""
    exponent = math.frexp(element.largest)[1] - 1
    return (power_below(largest_IJ) * 2.0**-exponent).clamp(2.0**-127, 2.0**127)


def two_level_scale(largest_IJ: Tensor, element: Element) -> Tensor:
    """An E4M3 for each block, times one float32 for the whole matrix by which the largest of them is E4M3's largest."""
    whole = largest_IJ.amax() / (element.largest * E4M3.largest)
    return rounded(largest_IJ / element.largest / _divisor(whole), E4M3) * whole


def _divisor(scale: Tensor) -> Tensor:
    """A scale, or 1 where it is 0, which nothing can be divided by and anything times which is 0."""
    return torch.where(scale == 0, 1.0, scale)


class Format(NamedTuple):
    """Elements that share a scale block by block.

    scale: from the largest absolute number of each block. activations, weights: rows and columns of a block, of what
    runs over tokens and of weights.
    """

    element: Element
    scale: Callable[[Tensor, Element], Tensor]
    activations: tuple[int, int]
    weights: tuple[int, int]

    def quantised(self, x_RC: Tensor, block: tuple[int, int]) -> Tensor:
        """The numbers, float32, that x has in this format, cut into blocks of so many rows and columns; the last are
        smaller where they do not divide it. What is NaN or infinite makes its block so, or some of it."""
        if not x_RC.numel():
            return x_RC.float()
        (R, C), (rows, columns) = x_RC.shape, block
        tiles = (
            F.pad(x_RC.float(), (0, -C % columns, 0, -R % rows)).unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        )
        scale = self.scale(tiles.abs().amax((1, 3), keepdim=True), self.element)
        tiles = rounded(tiles / _divisor(scale), self.element) * scale
        return tiles.flatten(2, 3).flatten(0, 1)[:R, :C]


FORMATS = {
    # DeepSeek-V3 (arXiv 2412.19437, section 3.3): E4M3 for gradients too.
    "fp8_tiles": Format(E4M3, real_scale, activations=(1, 128), weights=(128, 128)),
    # OCP Microscaling Formats v1.0; E4M3 for gradients too, as in NVIDIA's recipe (arXiv 2506.08027).
    "mxfp8": Format(E4M3, power_scale, activations=(1, 32), weights=(1, 32)),
    "mxfp8_e5m2": Format(E5M2, power_scale, activations=(1, 32), weights=(1, 32)),
    # NVIDIA (arXiv 2509.25149): square blocks of weights, which are the same numbers forward and backward.
    "nvfp4": Format(E2M1, two_level_scale, activations=(1, 16), weights=(16, 16)),
}
