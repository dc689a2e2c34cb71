"""Position encodings. An attention mixer takes one of them, or none."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """Positions divided by `factor` (Chen et al., arXiv 2306.15595)."""

    factor: float

    def __call__(self, frequency_D: Tensor, base: float) -> tuple[Tensor, float]:
        return frequency_D / self.factor, 1.0


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
    """YaRN (Peng et al., arXiv 2309.00071): dimensions that turn fewer than `beta_slow` times in `original_length` are
    stretched by `factor`, those above `beta_fast` turns are left, with a ramp over the dimensions between.

    magnitude: factor on the rotated vectors; None for the paper's 0.1 ln(factor) + 1.
    truncate: whether the ends of the ramp are rounded outwards to whole dimensions.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float | None = None
    truncate: bool = True

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
        base: theta, 10000 in the paper.
        share: share of each head's dimensions that turn, the first ones.
        layout: which two dimensions turn together: "halves" (i and i + half, as in Llama and its descendants) or
            "interleaved" (2i and 2i + 1, as in the paper). A model trained with one is useless with the other.
        scaling: how the frequencies change for lengths beyond those of training (Linear, Llama3, Yarn), or None.

    Raises:
        ValueError: for a layout or share that does not exist; when called, for an odd number of turning dimensions.
    """

    base: float = 10000.0
    share: float = 1.0
    layout: str = "halves"
    scaling: Linear | Llama3 | Yarn | None = None

    def __post_init__(self):
        if self.layout not in ("halves", "interleaved"):
            raise ValueError(f"rotary layout {self.layout!r} must be 'halves' or 'interleaved'")
        if not 0 < self.share <= 1:
            raise ValueError(f"rotary share {self.share} must lie above 0 and at most at 1")

    def __call__(self, x_BTHD: Tensor, offset: int, copies: int = 1) -> Tensor:
        """Turn x [B, T, H, D], whose first token has position `offset`; same dtype, angles in float32. T tokens may be
        several copies of a sequence side by side, each of which starts there."""
        if copies > 1:
            x_BTHD = x_BTHD.unflatten(1, (copies, -1)).flatten(0, 1)
            return self(x_BTHD, offset).unflatten(0, (-1, copies)).flatten(1, 2)
        T, D = x_BTHD.shape[1], x_BTHD.shape[-1]
        turning = round(self.share * D)
        if turning % 2 or turning == 0:
            raise ValueError(f"rotary share {self.share} of {D} dimensions is {turning}: it must be even and above 0")
        half = turning // 2
        frequency_D = self.base ** (-torch.arange(half, device=x_BTHD.device, dtype=torch.float32) / half)
        magnitude = 1.0
        if self.scaling is not None:
            frequency_D, magnitude = self.scaling(frequency_D, self.base)
        position_T = torch.arange(offset, offset + T, device=x_BTHD.device, dtype=torch.float32)
        angle_TD = torch.outer(position_T, frequency_D)
        cos_TD = (angle_TD.cos() * magnitude)[:, None].to(x_BTHD.dtype)
        sin_TD = (angle_TD.sin() * magnitude)[:, None].to(x_BTHD.dtype)
        turned, rest = x_BTHD.split([turning, D - turning], dim=-1)
        if self.layout == "halves":
            a, b = turned.chunk(2, dim=-1)
            turned = torch.cat([a * cos_TD - b * sin_TD, b * cos_TD + a * sin_TD], dim=-1)
        else:
            a, b = turned.unflatten(-1, (half, 2)).unbind(-1)
            turned = torch.stack([a * cos_TD - b * sin_TD, b * cos_TD + a * sin_TD], dim=-1).flatten(-2)
        return torch.cat([turned, rest], dim=-1) if turning < D else turned


@dataclass(frozen=True)
class Alibi:
    """Attention with linear biases (Press et al., arXiv 2108.12409): -slope |t - s| is added to the score of query t
    and key s. The slopes are 2^(-8 h / heads) for h = 1 .. heads, the paper's rule for powers of two, for any number."""

    def bias(self, distance_TS: Tensor, heads: int) -> Tensor:
        """Distances t - s [T, S] -> biases [heads, T, S] in float32."""
        slopes_H = 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=distance_TS.device) / heads)
        return -slopes_H[:, None, None] * distance_TS.abs()
