"""Random problems for the delta rule."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

KEPT = frozenset({"g", "initial_state"})


def random_problem(
    T: int,
    *,
    batch: int,
    heads: int,
    head_dim: int,
    key_heads: int | None = None,
    value_dim: int | None = None,
    writes: int | None = None,
    per_channel: bool = True,
    erases: bool = True,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return inputs of `delta_rule` by name, in float64: queries and keys of norm one, each value head with a read key
    of its own near its write key and shorter than it, and gates from U(-1, 0).

    Args:
        T: tokens.
        batch: sequences.
        heads: value heads.
        head_dim: dimension of keys, and of values where value_dim is None.
        key_heads: heads of queries and write keys; as many as value heads where None.
        value_dim: dimension of values.
        writes: of a token; one, without a dimension for them, where None.
        per_channel: whether gates are per key channel, or per head.
        erases: whether there are read keys `a`.
        generator: PyTorch's own where None.
    """
    normal = partial(torch.randn, dtype=torch.float64, generator=generator)
    uniform = partial(torch.rand, dtype=torch.float64, generator=generator)
    K, V, H = head_dim, value_dim or head_dim, key_heads or heads
    tokens = (batch, T) if writes is None else (batch, T, writes)
    k = F.normalize(normal(*tokens, H, K), dim=-1)
    near = k.repeat_interleave(heads // H, dim=-2) + 0.5 * K**-0.5 * normal(*tokens, heads, K)
    inputs = {
        "q": F.normalize(normal(batch, T, H, K), dim=-1),
        "k": k,
        "a": uniform(*tokens, heads, 1) * F.normalize(near, dim=-1),
        "u": normal(*tokens, heads, V),
        "g": -uniform(batch, T, heads, *([K] if per_channel else [])),
        "initial_state": normal(batch, heads, K, V),
    }
    return inputs if erases else {name: x for name, x in inputs.items() if name != "a"}
