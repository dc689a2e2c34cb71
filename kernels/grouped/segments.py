"""The grouped product as one product per expert, on any device, and the count of its FLOPs.

Shape letters: N rows, D numbers of a row, E experts, F numbers of a row of the output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 64  # half precision on CPUs: a product takes a multiple of so many rows


def grouped_matmul_flops(N: int, D: int, F: int) -> int:
    """Return the FLOPs of y [N, F] of x [N, D], whichever experts the rows go to."""
    return 2 * N * D * F


def segment_products(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return y [N, F]: x [N, D], in segments of `counts` [E], times weight [E, D, F]."""
    if _takes_grouped_mm(x, weight.shape[2]):
        return F.grouped_mm(x, weight, offs=_ends(counts))
    y, begin = x.new_empty(len(x), weight.shape[2]), 0
    for matrix, rows in zip(weight.unbind(), counts.tolist(), strict=True):
        end, reach = begin + rows, begin + _filled(rows, x)
        if rows and reach <= len(y):
            # What lies beyond the segment is of the experts that come after, who write over it.
            torch.mm(x[begin:reach], matrix, out=y[begin:reach])
        elif rows:
            y[begin:end] = (F.pad(x[begin:end], (0, 0, 0, reach - end)) @ matrix)[:rows]
        begin = end
    return y


def segment_outer_products(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """Return [E, D, F], of each expert x^T y over its segment: x [N, D] and y [N, F] in segments of `counts` [E]; zeros
    for an expert without rows."""
    if _takes_grouped_mm(x, y.shape[1]):
        return F.grouped_mm(x.T, y, offs=_ends(counts))
    sizes = counts.tolist()
    sums = x.new_empty(len(sizes), x.shape[1], y.shape[1])
    for total, a, b in zip(sums.unbind(), x.split(sizes), y.split(sizes), strict=True):
        if not len(a):
            total.zero_()
            continue
        if more := _filled(len(a), x) - len(a):
            a, b = F.pad(a, (0, 0, 0, more)), F.pad(b, (0, 0, 0, more))
        torch.mm(a.T, b, out=total)
    return sums


def _filled(rows: int, x: Tensor) -> int:
    """Return how many rows a product of so many takes. In half precision on a CPU, oneDNN prepares a product anew for
    every number of rows, which takes ten to a hundred times as long as the product: few numbers are used there."""
    half = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    return -(-rows // ROWS) * ROWS if half and rows > 1 else rows


def _takes_grouped_mm(x: Tensor, outputs: int) -> bool:
    """Return True where PyTorch's own grouped product has a kernel: bfloat16 on a GPU, rows of whole 16 bytes. On a CPU
    it is a loop as the one here, in half precision without the filling up."""
    return x.is_cuda and x.dtype == torch.bfloat16 and x.shape[1] % 8 == 0 and outputs % 8 == 0


def _ends(counts: Tensor) -> Tensor:
    return counts.cumsum(0, dtype=torch.int32)
