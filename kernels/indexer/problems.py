"""Random problems for the lightning indexer and for its loss."""

from functools import partial

import torch
from torch import Tensor

KEPT = frozenset({"weights"})


def random_problem(
    T: int,
    *,
    batch: int,
    heads: int,
    head_dim: int,
    keys: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return q, k and weights of `lightning_indexer` by name, in float64: normal numbers, the weights so small that
    scores are about one.

    Args:
        T: queries.
        batch: sequences.
        heads, head_dim: of the indexer.
        keys: as many as queries where None.
        generator: PyTorch's own where None.
    """
    normal = partial(torch.randn, dtype=torch.float64, generator=generator)
    q, k = normal(batch, T, heads, head_dim), normal(batch, keys or T, head_dim)
    return {"q": q, "k": k, "weights": normal(batch, T, heads) * (heads * head_dim) ** -0.5}


def random_loss_problem(
    T: int,
    *,
    batch: int,
    heads: int,
    head_dim: int,
    attention_heads: int,
    key_heads: int,
    attention_dim: int,
    keys: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return inputs of `lightning_indexer_loss` by name, in float64: those of `random_problem`, and normal queries and
    keys of an attention of `attention_heads` on `key_heads`, of `attention_dim` dimensions."""
    normal = partial(torch.randn, dtype=torch.float64, generator=generator)
    inputs = random_problem(T, batch=batch, heads=heads, head_dim=head_dim, keys=keys, generator=generator)
    inputs["query"] = normal(batch, T, attention_heads, attention_dim)
    return inputs | {"key": normal(batch, keys or T, key_heads, attention_dim)}
