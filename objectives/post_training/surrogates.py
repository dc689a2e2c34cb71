"""What a policy gradient step makes of a ratio and an advantage: the published ways to keep a step small.

All have the same gradient while the policy is the one that wrote the samples, advantage times the gradient of log p;
they differ from the second step on one experience on.

Shape letters: any shape [...].
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Surrogate(ABC):
    @abstractmethod
    def __call__(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """Return what is to be increased [...], with gradients to log_ratio, the log-probability now less that when
        the sample was written."""


@dataclass(frozen=True)
class Clipped(Surrogate):
    """min(ratio A, clip(ratio, 1 - low, 1 + high) A) (PPO, Schulman et al., arXiv 1707.06347; a `high` above `low` is
    DAPO's, 2503.14476: 0.28 and 0.2). most: the largest ratio where A < 0, None for no limit (dual clip)."""

    low: float = 0.2
    high: float = 0.2
    most: float | None = None

    def __post_init__(self):
        if not (0 <= self.low <= 1 and self.high >= 0):
            raise ValueError(f"low={self.low} must be from 0 to 1 and high={self.high} at least 0")
        if self.most is not None and self.most <= 1:
            raise ValueError(f"most={self.most} must be above 1, or null for no limit")

    def __call__(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        ratio = log_ratio.exp()
        capped = ratio if self.most is None else torch.where(advantage < 0, ratio.clamp(max=self.most), ratio)
        return torch.minimum(capped * advantage, ratio.clamp(1 - self.low, 1 + self.high) * advantage)


@dataclass(frozen=True)
class ClippedWeight(Surrogate):
    """The ratio, cut at `most` and without gradients, times A log p (CISPO, MiniMax-M1, arXiv 2506.13585): no token
    loses its gradient."""

    most: float = 5.0

    def __call__(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        return log_ratio.exp().clamp(max=self.most).detach() * advantage * log_ratio


@dataclass(frozen=True)
class Soft(Surrogate):
    """4 / tau sigmoid(tau (ratio - 1)) A, with a tau of its own for negative advantages (SAPO, Gao et al., arXiv
    2511.20347)."""

    positive: float = 1.0
    negative: float = 1.05

    def __call__(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        positive, negative = (torch.full_like(advantage, tau) for tau in (self.positive, self.negative))
        tau = torch.where(advantage > 0, positive, negative)
        return 4 / tau * torch.sigmoid(tau * log_ratio.expm1()) * advantage
