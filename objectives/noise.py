"""When and where noise falls: schedules, ways of drawing times, and masks.

Shape letters: N sequences or blocks, T tokens of each.

Objectives reckon in the fraction of tokens that are noised, p = 1 - alpha. A schedule says how p grows with the time t
in [0, 1], and so how often training sees which p. What a bound integrates over is p, so no bound depends on the
schedule.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

TIMES = ("independent", "antithetic", "stratified", "rotated")


class Schedule(Protocol):
    def noised(self, t: Tensor) -> Tensor:
        """p(t), from 0 at t = 0 to 1 at t = 1."""

    def rate(self, t: Tensor) -> Tensor:
        """dp / dt."""


@dataclass(frozen=True)
class Polynomial:
    """p = t ** power; 1 is the linear schedule (MDLM's "log-linear", LLaDA)."""

    power: float = 1.0

    def noised(self, t: Tensor) -> Tensor:
        return t**self.power

    def rate(self, t: Tensor) -> Tensor:
        return self.power * t ** (self.power - 1)


@dataclass(frozen=True)
class Cosine:
    """p = cos(pi / 2 (1 - t)) (MaskGIT, Chang et al., arXiv 2202.04200; MD4, Shi et al., 2406.04329)."""

    def noised(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * (1 - t)).cos()

    def rate(self, t: Tensor) -> Tensor:
        return math.pi / 2 * (math.pi / 2 * (1 - t)).sin()


def check(schedule: Schedule, times: str) -> None:
    """
    Raises:
        ValueError: for a schedule that does not rise from no noise to nothing but noise, or an unknown way of drawing.
    """
    p = schedule.noised(torch.linspace(0, 1, 101, dtype=torch.float64))
    if not (abs(p[0]) < 1e-6 and abs(p[-1] - 1) < 1e-6 and (p.diff() > -1e-9).all()):
        raise ValueError(
            f"{schedule} noises a fraction {p[0]:.4g} of the tokens at t = 0 and {p[-1]:.4g} at t = 1: it must rise "
            "from 0 to 1, or the bound leaves out what lies beyond"
        )
    if times not in TIMES:
        raise ValueError(f"times={times!r} must be one of {', '.join(TIMES)}")


def uniform(shape, generator: Generator) -> Tensor:
    """Uniforms on [0, 1) in float64, on the generator's device: float32 has too coarse a grid near 0."""
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)


def draw_times(n: int, times: str, generator: Generator) -> Tensor:
    """n times in (0, 1], each of them uniform, [n] float64.

    "independent": of each other. "antithetic": in pairs t and 1 - t. "stratified": one in each interval of 1 / n, in
    random order (in a fixed one a row would only ever see its own interval). "rotated": a grid of step 1 / n with one
    random offset (Kingma et al., arXiv 2107.00630, appendix I.1).
    """
    match times:
        case "independent":
            u = uniform((n,), generator)
        case "antithetic":
            half = uniform((-(-n // 2),), generator)
            u = torch.stack([half, 1 - half], dim=1).flatten()[:n] % 1
        case "stratified":
            order = uniform((n,), generator).argsort()
            u = (order + uniform((n,), generator)) / n
        case "rotated":
            grid = torch.arange(n, device=generator.device, dtype=torch.float64) / n
            u = (uniform((1,), generator) + grid) % 1
        case _:
            raise ValueError(f"times={times!r} must be one of {', '.join(TIMES)}")
    return 1 - u


def mask_some(noisable_NT: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """In each row k of its n noisable tokens, k uniform on 1 .. n: what the integral over p becomes when p itself is
    integrated out (Nie et al., LLaDA, arXiv 2502.09992), so that no time is ever cut off.

    Args:
        noisable_NT: bool.

    Returns:
        masked_NT: bool.
        weight_N: n / k, of the nats summed over the masked tokens; 1 in a row with nothing to noise.
        p_N: the fraction noised, drawn from its distribution given k masked tokens, Beta(k, n - k + 1): what a timed
            model is told.
    """
    noisable_NT = noisable_NT.to(generator.device)
    n_N = noisable_NT.sum(1)
    k_N = ((1 - draw_times(len(n_N), "stratified", generator)) * n_N).long() + 1
    # The k smallest of n uniforms are any k of the tokens, and the k-th smallest itself follows that Beta distribution.
    u_NT = uniform(noisable_NT.shape, generator).masked_fill(~noisable_NT, 2.0)
    sorted_NT, order_NT = u_NT.sort(1)
    masked_NT = (order_NT.argsort(1) < k_N[:, None]) & noisable_NT
    p_N = sorted_NT.gather(1, (k_N - 1).clamp(max=n_N - 1).clamp(min=0)[:, None])[:, 0]
    return masked_NT, n_N.clamp(min=1).double() / k_N, p_N.clamp(max=1.0)
