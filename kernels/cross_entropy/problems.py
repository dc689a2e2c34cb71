"""Random problems for the cross entropy of a linear head."""

from functools import partial

import torch
from torch import Tensor

KEPT = frozenset({"token_weights"})


def random_problem(
    T: int, *, batch: int, width: int, vocabulary: int, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Return inputs of `linear_cross_entropy` by name, in float64 on the CPU: normal hidden vectors and logits of
    standard deviation 2; about a third of the tokens do not count.

    Args:
        T: tokens of each sequence.
        batch: sequences.
        width: numbers of a hidden vector.
        vocabulary: token ids.
        generator: PyTorch's own where None.
    """
    normal, N = partial(torch.randn, dtype=torch.float64, generator=generator), batch * T
    weights = torch.rand(N, dtype=torch.float64, generator=generator)
    return {
        "hidden": normal(N, width),
        "weight": normal(vocabulary, width) * 2 / width**0.5,
        "targets": torch.randint(vocabulary, (N,), generator=generator),
        "token_weights": weights.where(weights > 0.3, 0.0),
    }
