"""Random problems for a step of a gated delta mixer."""

from functools import partial

import torch
from torch import Tensor

KEPT = frozenset({"memory", "A_log", "dt_bias"})


def random_problem(
    T: int, *, batch: int, heads: int, key_heads: int, head_dim: int, value_dim: int, taps: int = 4,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Return inputs of `gated_delta_step` by name, in float64: normal but for A_log, the logarithms of U(0, 16).

    Args:
        T: tokens, of which a step has one, whatever is asked for.
        batch: sequences.
        heads: value heads.
        key_heads: heads of q and k.
        head_dim, value_dim: dimensions of keys and of values.
        taps: of the convolution.
        generator: PyTorch's own where None.
    """
    normal = partial(torch.randn, dtype=torch.float64, generator=generator)
    channels = 2 * key_heads * head_dim + heads * value_dim
    return {
        "qkv": normal(batch, channels),
        "a": normal(batch, heads),
        "b": normal(batch, heads),
        "z": normal(batch, heads, value_dim),
        "conv": normal(batch, taps - 1, channels),
        "memory": normal(batch, heads, head_dim, value_dim),
        "conv_weight": normal(channels, taps) * taps**-0.5,
        "A_log": (16 * torch.rand(heads, dtype=torch.float64, generator=generator) + 1e-3).log(),
        "dt_bias": normal(heads),
        "norm_weight": 1 + 0.1 * normal(value_dim),
    }
