"""Learning-rate schedules: the factor on every rate as a function of the fraction of the run that is done.

All rise linearly from 0 over the fraction `warmup`; what comes then tells them apart.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Schedule = Callable[[float], float]  # of the fraction done, in (0, 1)


@dataclass(frozen=True)
class Linear:
    """A straight line to zero at the run's own end (Bergsma et al., arXiv 2502.15938)."""

    warmup: float

    def __post_init__(self):
        _check("warmup", self.warmup)

    def __call__(self, done: float) -> float:
        return done / self.warmup if done < self.warmup else (1 - done) / (1 - self.warmup)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine to the fraction `floor` of the rate (Loshchilov and Hutter, arXiv 1608.03983); 0.1 in
    Chinchilla."""

    warmup: float
    floor: float

    def __post_init__(self):
        _check("warmup", self.warmup)
        _check("floor", self.floor)

    def __call__(self, done: float) -> float:
        if done < self.warmup:
            return done / self.warmup
        down = (1 - math.cos(math.pi * (done - self.warmup) / (1 - self.warmup))) / 2
        return 1 - (1 - self.floor) * down


@dataclass(frozen=True)
class ConstantThenDecay:
    """Constant until the last fraction `decay` of the run, then a straight line to zero (warmup-stable-decay: Hu et
    al., MiniCPM, arXiv 2404.06395; Hägele et al., 2405.18392)."""

    warmup: float
    decay: float

    def __post_init__(self):
        _check("warmup", self.warmup)
        if not 0 < self.decay <= 1 - self.warmup:
            raise ValueError(f"schedule.decay={self.decay} must be above 0 and at most 1 - warmup={1 - self.warmup:g}")

    def __call__(self, done: float) -> float:
        return done / self.warmup if done < self.warmup else min(1.0, (1 - done) / self.decay)


def scheduled(optimizer: Optimizer, schedule: Schedule, steps: int) -> LambdaLR:
    """The schedule over a run of so many steps, each taken at its middle."""
    return LambdaLR(optimizer, lambda step: schedule((step + 0.5) / steps))


def _check(name: str, fraction: float) -> None:
    if not 0 <= fraction < 1:
        raise ValueError(f"schedule.{name}={fraction} must be a fraction of the run, at least 0 and below 1")
