"""Random problems for the gated delta rule."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

KEPT = frozenset({"g", "beta", "initial_state"})


def random_problem(
    T: int,
    *,
    batch: int,
    heads: int,
    head_dim: int,
    key_heads: int | None = None,
    value_dim: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return inputs of `gated_delta_rule` by name, in float64: normal keys and queries of norm one, gates from U(-1,
    0).

    Args:
        T: tokens.
        batch: sequences.
        heads: value heads.
        head_dim: dimension of keys, and of values where value_dim is None.
        key_heads: as many as value heads where None.
        value_dim: dimension of values.
        generator: PyTorch's own where None.
    """
    normal = partial(torch.randn, dtype=torch.float64, generator=generator)
    K, V = head_dim, value_dim or head_dim
    q, k = (F.normalize(normal(batch, T, key_heads or heads, K), dim=-1) for _ in range(2))
    rate = torch.rand(2, batch, T, heads, dtype=torch.float64, generator=generator)
    inputs = {"q": q, "k": k, "v": normal(batch, T, heads, V), "g": -rate[0], "beta": rate[1]}
    return inputs | {"initial_state": normal(batch, heads, K, V)}
