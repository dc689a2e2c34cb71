"""Random problems for the grouped product."""

from functools import partial

import torch
from torch import Tensor


def random_problem(
    T: int, *, batch: int, experts: int, width: int, outputs: int, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Return inputs of `grouped_matmul` by name, float64 on the CPU: normal rows and matrices, and loads as uneven as
    chance makes them of experts that are not equally likely, the second of which gets no row where there are several.

    Args:
        T: rows of each sequence.
        batch: sequences, whose rows lie together.
        experts: number of experts.
        width: numbers of a row.
        outputs: numbers of a row of the output.
        generator: PyTorch's own where None.
    """
    normal = partial(torch.randn, dtype=torch.float64, generator=generator)
    likely = torch.rand(experts, dtype=torch.float64, generator=generator)
    likely[1:2] = 0.0
    chosen = torch.multinomial(likely, max(1, batch * T), replacement=True, generator=generator)[: batch * T]
    inputs = {"x": normal(batch * T, width), "weight": normal(experts, width, outputs) / width**0.5}
    return inputs | {"counts": chosen.bincount(minlength=experts)}
