"""The inverse of triangular matrices with ones on their diagonal."""

import torch
from torch import Tensor

PART = 8  # rows of the blocks on the diagonal that are inverted row by row


def unit_triangular_inverse(A: Tensor) -> Tensor:
    """Return (I + A)^-1 of strictly lower triangular A [M, C, C] with C a multiple of PART: the blocks on the
    diagonal row by row, those below from the ones above them. Stable whatever the size of its entries, which powers
    of A are not."""
    M, C, _ = A.shape
    blocks = (C // PART, PART)
    on_diagonal = lambda x: x.unflatten(1, blocks).unflatten(3, blocks).diagonal(dim1=1, dim2=3)  # noqa: E731
    a = on_diagonal(A).permute(1, 2, 0, 3).contiguous()
    inverse = torch.zeros_like(a)
    inverse.diagonal(dim1=0, dim2=1).fill_(1)
    for i in range(1, PART):
        inverse[i, :i] = -(a[i, :i, None] * inverse[:i, :i]).sum(0)
    whole = torch.zeros_like(A)
    on_diagonal(whole).copy_(inverse.permute(2, 0, 1, 3))
    for r in range(PART, C, PART):
        rows = slice(r, r + PART)
        whole[:, rows, :r] = -(whole[:, rows, rows] @ (A[:, rows, :r] @ whole[:, :r, :r]))
    return whole
