"""The definition of the grouped product: each expert's rows through its own matrix.

Shape letters: N rows, D numbers of a row, E experts, F numbers of a row of the output.
"""

import torch
from torch import Tensor


def grouped_matmul_reference(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return y [N, F]; x [N, D], weight [E, D, F], counts [E]."""
    segments = x.split(counts.tolist())
    return torch.cat([rows @ matrix for rows, matrix in zip(segments, weight, strict=True)])
