"""Position encodings. An attention mixer takes one of them, or none. Nothing here is a weight: a model that is trained
with one rotary setting can go on with another, which is how its context is extended.

Shape letters: B sequences, T queries, S keys, H heads, D dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """Positions divided by `factor` (Chen et al., arXiv 2306.15595)."""

    factor: float

    def __post_init__(self):
        _check_factor(self.factor)

    def __call__(self, frequency_D: Tensor, base: float) -> tuple[Tensor, float]:
        return frequency_D / self.factor, 1.0


@dataclass(frozen=True)
class NTK:
    """NTK-aware: the base times factor^(D / (D - 2)) for D rotated dimensions, so that the slowest is stretched by
    `factor` and the fastest not at all (bloc97, 2023, as in Peng et al., arXiv 2309.00071, section 3.1)."""

    factor: float

    def __post_init__(self):
        _check_factor(self.factor)

    def __call__(self, frequency_D: Tensor, base: float) -> tuple[Tensor, float]:
        half = len(frequency_D)
        if half < 2:
            raise ValueError(
                "NTK-aware rotary positions need at least 4 rotated dimensions: raise head_dim or fraction"
            )
        exponent_D = torch.arange(half, device=frequency_D.device, dtype=torch.float32) / (half - 1)
        return frequency_D * self.factor**-exponent_D, 1.0


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's scaling: wavelengths beyond original_length / low_factor are stretched by `factor`, those below
    original_length / high_factor are left, those between are blended (Llama Team, arXiv 2407.21783)."""

    factor: float
    original_length: int
    low_factor: float
    high_factor: float

    def __call__(self, frequency_D: Tensor, base: float) -> tuple[Tensor, float]:
        turns_D = self.original_length * frequency_D / (2 * math.pi)
        keep_D = ((turns_D - self.low_factor) / (self.high_factor - self.low_factor)).clamp(0, 1)
        return frequency_D * (keep_D + (1 - keep_D) / self.factor), 1.0


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al., arXiv 2309.00071): dimensions that rotate fewer than `beta_slow` times in `original_length`
    are stretched by `factor`, those above `beta_fast` turns are left, with a ramp over the dimensions between.

    magnitude: factor on the rotated vectors; None for the paper's 0.1 ln(factor) + 1.
    truncate: whether the ends of the ramp are rounded outwards to whole dimensions.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float | None = None
    truncate: bool = True

    def __post_init__(self):
        _check_factor(self.factor)
        if self.original_length < 1:
            raise ValueError(f"original_length={self.original_length} must be the tokens of training before, 1 or more")
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"beta_slow={self.beta_slow} and beta_fast={self.beta_fast} must be above 0, the slow below the fast"
            )

    def __call__(self, frequency_D: Tensor, base: float) -> tuple[Tensor, float]:
        half = len(frequency_D)

        def dimension(turns: float) -> float:
            return half * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(base)

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        ramp_D = torch.arange(half, device=frequency_D.device, dtype=torch.float32) - low
        stretch_D = (ramp_D / max(high - low, 1e-3)).clamp(0, 1)
        magnitude = 0.1 * math.log(self.factor) + 1 if self.magnitude is None else self.magnitude
        return frequency_D * (1 - stretch_D + stretch_D / self.factor), magnitude


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864, section 3.4).

    Args:
        base: theta, 10000 in the paper; a larger one reaches further (ABF: Xiong et al., arXiv 2309.16039).
        fraction: fraction of each head's dimensions that are rotated, the first ones, to the nearest pair and one pair
            at least, so that a sweep may choose heads of any even size.
        layout: which two dimensions are rotated together: "halves" (i and i + half, as in Llama and its descendants) or
            "interleaved" (2i and 2i + 1, as in the paper). A model trained with one is useless with the other.
        scaling: how the frequencies change for lengths beyond those of training (Linear, NTK, Llama3, Yarn), or None.

    Raises:
        ValueError: for a base, layout or fraction that does not exist; when called, for heads of an odd number
            of dimensions.
    """

    base: float = 10000.0
    fraction: float = 1.0
    layout: str = "halves"
    scaling: Linear | NTK | Llama3 | Yarn | None = None

    def __post_init__(self):
        if not self.base > 1:
            raise ValueError(f"rotary base {self.base} must be above 1")
        if self.layout not in ("halves", "interleaved"):
            raise ValueError(f"rotary layout {self.layout!r} must be 'halves' or 'interleaved'")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"rotary fraction {self.fraction} must lie above 0 and at most at 1")

    def __call__(self, x_BTHD: Tensor, position: Positions | Tensor) -> Tensor:
        """Rotate x by the positions of its tokens, those of a pass or [T] or [B, T]; same dtype, angles in float32."""
        D = x_BTHD.shape[-1]
        positions = position if isinstance(position, Positions) else Positions(position)
        cos, sin = positions.turns(self, D, x_BTHD.dtype)
        half = cos.shape[-1]
        rotated, rest = x_BTHD.split([2 * half, D - 2 * half], dim=-1)
        if self.layout == "halves":
            a, b = rotated.chunk(2, dim=-1)
            rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        else:
            a, b = rotated.unflatten(-1, (half, 2)).unbind(-1)
            rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        return torch.cat([rotated, rest], dim=-1) if 2 * half < D else rotated

    def turns(self, position: Tensor, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [(B,) T, 1, half] in `dtype` of the positions [T] or [B, T], for heads of D dimensions."""
        if D % 2:
            raise ValueError(f"heads of {D} dimensions cannot be rotated in pairs: take an even number of dimensions")
        half = max(1, round(self.fraction * D / 2))
        frequency_D = self.base ** (-torch.arange(half, device=position.device, dtype=torch.float32) / half)
        magnitude = 1.0
        if self.scaling is not None:
            frequency_D, magnitude = self.scaling(frequency_D, self.base)
        angle = position[..., None, None].float() * frequency_D
        cos, sin = ((f(angle) * magnitude).to(dtype) for f in (torch.cos, torch.sin))
        return cos, sin


class Positions:
    """Positions of the tokens of one pass, [T] or [B, T], with what rotary encodings make of them: the same for all
    layers, so computed once for each encoding, head size and dtype."""

    def __init__(self, position: Tensor):
        self.position = position
        self._turns: dict[tuple[Rotary, int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def turns(self, rotary: Rotary, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """As `Rotary.turns`."""
        key = rotary, D, dtype
        if key not in self._turns:
            self._turns[key] = rotary.turns(self.position, D, dtype)
        return self._turns[key]


@dataclass(frozen=True)
class Alibi:
    """Attention with linear biases (Press et al., arXiv 2108.12409): -slope |t - s| is added to the score of query t
    and key s. The slopes are 2^(-8 h / heads) for h = 1 .. heads, the paper's rule for powers of two, for any
    number."""

    def slopes(self, heads: int, device: torch.device) -> Tensor:
        """Slope of each head, float32 [heads]."""
        return 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=device) / heads)


def _check_factor(factor: float) -> None:
    if not factor >= 1:
        raise ValueError(f"factor={factor} must be at least 1: the length wanted over that of training before")
