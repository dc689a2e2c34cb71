"""Random problems for the short convolution."""

import torch
from torch import Tensor

KEPT = frozenset({"initial_state"})


def random_problem(
    T: int, *, batch: int, channels: int, taps: int = 4, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Return inputs of `causal_conv1d` by name, in float64."""
    shapes = {"x": (batch, T, channels), "weight": (channels, taps), "bias": (channels,)}
    shapes["initial_state"] = (batch, taps - 1, channels)
    return {name: torch.randn(size, dtype=torch.float64, generator=generator) for name, size in shapes.items()}
