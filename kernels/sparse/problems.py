"""Random problems for sparse attention."""

from functools import partial

import torch
from torch import Tensor

KEPT = frozenset()


def random_problem(
    T: int,
    *,
    batch: int,
    heads: int,
    head_dim: int,
    kv_heads: int = 1,
    value_dim: int | None = None,
    picked: int = 16,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return inputs of `sparse_attention` by name, in float64: normal queries, keys and values, and as indices random
    tokens up to the query's own, each at most once, as many as there are; -1 stands among them.

    Args:
        T: queries, and keys.
        batch: sequences.
        heads, kv_heads: of queries, and of keys and values.
        head_dim: dimension of queries and keys, and of values where value_dim is None.
        value_dim: dimension of values.
        picked: indices of a query.
        generator: PyTorch's own where None.
    """
    normal = partial(torch.randn, dtype=torch.float64, generator=generator)
    inputs = {"q": normal(batch, T, heads, head_dim), "k": normal(batch, T, kv_heads, head_dim)}
    inputs["v"] = normal(batch, T, kv_heads, value_dim or head_dim)
    unseen = torch.arange(max(T, picked)) > torch.arange(T)[:, None]
    order = (torch.rand(batch, *unseen.shape, generator=generator) + unseen).argsort(-1)[..., :picked]
    indices = torch.where(order <= torch.arange(T)[:, None], order, -1)
    return inputs | {"indices": indices[..., torch.randperm(picked, generator=generator)].int()}


def random_latents(
    T: int, *, batch: int, heads: int, head_dim: int, value_dim: int, picked: int = 16,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Return q, the latents, the rest of the keys and indices of a problem whose values are the first value_dim
    numbers, the latents, of its keys; arguments as those of `random_problem`."""
    sizes = {"batch": batch, "heads": heads, "head_dim": head_dim, "picked": picked}
    inputs = random_problem(T, **sizes, generator=generator)
    latent, rest = inputs["k"].split([value_dim, head_dim - value_dim], dim=-1)
    return {"q": inputs["q"], "latent": latent, "rest": rest, "indices": inputs["indices"]}
