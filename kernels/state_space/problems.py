"""Random problems for the state space dual form."""

from functools import partial

import torch
from torch import Tensor

KEPT = frozenset({"dt", "A", "initial_states"})


def random_problem(
    T: int,
    *,
    batch: int,
    heads: int,
    head_dim: int,
    groups: int,
    state_size: int,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return inputs of `ssd` by name, in float64: normal but for time steps from U(0, 1) and A from U(-1, 0).

    Args:
        T: tokens.
        batch: sequences.
        heads: heads of x.
        head_dim: channels of a head.
        groups: groups of heads that share B and C.
        state_size: numbers that a state has per channel.
        generator: PyTorch's own where None.
    """
    normal = partial(torch.randn, dtype=torch.float64, generator=generator)
    uniform = partial(torch.rand, dtype=torch.float64, generator=generator)
    return {
        "x": normal(batch, T, heads, head_dim),
        "dt": uniform(batch, T, heads),
        "A": -uniform(heads),
        "B": normal(batch, T, groups, state_size) * state_size**-0.5,
        "C": normal(batch, T, groups, state_size),
        "D": normal(heads),
        "initial_states": normal(batch, heads, head_dim, state_size),
    }
