"""Random problems for attention."""

from functools import partial

import torch
from torch import Tensor


def random_problem(
    T: int,
    *,
    batch: int,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    keys: int | None = None,
    value_dim: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return q, k and v of `attention`, normal, in float64.

    Args:
        T: queries.
        batch: sequences.
        heads, kv_heads: of queries, and of keys and values; as many of those where None.
        keys: tokens that have a key; T where None.
        head_dim, value_dim: dimensions of keys and of values; the same where None.
        generator: PyTorch's own where None.
    """
    normal = partial(torch.randn, dtype=torch.float64, generator=generator)
    S, G = T if keys is None else keys, kv_heads or heads
    q, k = normal(batch, T, heads, head_dim), normal(batch, S, G, head_dim)
    return {"q": q, "k": k, "v": normal(batch, S, G, value_dim or head_dim)}
