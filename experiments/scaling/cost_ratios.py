"""The same question in other costs: seconds, training with tokens served, and bytes at equal loss.

Shape letters: S draws, G sizes on a grid.
"""

import math
from collections.abc import Callable

import numpy as np

from experiments.scaling.joint import Joint, estimated
from experiments.scaling.results import CostRatio
from experiments.scaling.surface import Surface

SERVED = 10  # tokens served for each that the reference's model of the centre is trained on
REACH = math.log(100)  # sizes looked through to either side of the optimum in FLOPs
STEPS = 121
DRAWS = 200  # an interval to two digits

Tokens = Callable[[np.ndarray, np.ndarray], np.ndarray]  # ln size [G] and ln cost [S, 1] to ln tokens [S, G]


def cost_ratios(joint: Joint, arm: int, reference: int, log_flops: float) -> tuple[CostRatio, ...]:
    """Returns what the reference pays over what the arm pays for the loss that the arm reaches at C, each at its own
    best size for that cost; the costs that the ledger has."""
    draws = _few(joint.draws)
    if not np.isfinite(joint.fit.surface.log_multiplier(arm, reference, log_flops)).all():
        return ()  # the reference does not come down to that loss at any cost
    surfaces, pair = (joint.fit.surface, draws), (arm, reference)
    served = math.log(SERVED) + float(joint.fit.surface.optimum(reference, log_flops)[1][0])

    def lifetime(size: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """ln of what is left for training when each served token costs a third of one that is trained on."""
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            return np.log(np.maximum(np.exp(cost - size - math.log(6)) - math.exp(served) / 3, 0.0))

    ratios = []
    mine, other = (joint.law(k, "train_seconds", per="tokens") for k in pair)
    if np.isfinite([mine, other]).all():
        by_time = [_tokens_at(mine), _tokens_at(other)]
        ratios.append(_ratio("wall seconds of training", surfaces, pair, by_time, log_flops, _seconds_at(mine)))
    name = f"FLOPs of training and of serving {SERVED} tokens for each one trained on"

    def with_served(size: float, data: float) -> float:
        return float(np.logaddexp(math.log(6) + size + data, math.log(2) + size + served))

    ratios.append(_ratio(name, surfaces, pair, [lifetime, lifetime], log_flops, with_served))
    for column, words in (("state_bytes", "bytes of decode state"), ("peak_memory_bytes", "bytes of peak memory")):
        mine, other = (joint.law(k, column) for k in pair)
        if np.isfinite([mine, other]).all():
            ratios.append(_bytes_ratio(words, surfaces, pair, (mine, other), log_flops))
    return tuple(ratio for ratio in ratios if ratio is not None)


def _few(surface: Surface) -> Surface:
    """Returns the first of many draws."""
    return Surface(surface.origin, *(constant[:DRAWS] for constant in surface.constants))


def _tokens_at(seconds_per_token: np.ndarray) -> Tokens:
    return lambda size, cost: cost - np.polyval(seconds_per_token, size)


def _seconds_at(seconds_per_token: np.ndarray) -> Callable[[float, float], float]:
    return lambda size, data: float(np.polyval(seconds_per_token, size) + data)


def _ratio(
    cost: str,
    surfaces: tuple[Surface, Surface],
    pair: tuple[int, int],
    tokens: list[Tokens],
    log_flops: float,
    cost_of: Callable[[float, float], float],
) -> CostRatio | None:
    """cost_of: ln of the arm's cost at (ln size, ln data)."""
    size, data = (float(x[0]) for x in surfaces[0].optimum(pair[0], log_flops))
    at = cost_of(size, data)
    logs = []
    for surface in surfaces:
        goal = _lowest(surface, pair[0], tokens[0], np.full(len(surface.E), at), size)
        low, high = np.full(len(goal), at - math.log(1e4)), np.full(len(goal), at + math.log(1e4))
        for _ in range(30):
            middle = (low + high) / 2
            enough = _lowest(surface, pair[1], tokens[1], middle, size) <= goal
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        logs.append((low + high) / 2 - at)
    if abs(float(logs[0][0])) > math.log(5e3):  # the reference does not come there
        return None
    return CostRatio(cost, math.exp(at), estimated(*logs).map(np.exp))


def _lowest(surface: Surface, arm: int, tokens: Tokens, cost: np.ndarray, centre: float) -> np.ndarray:
    """The lowest loss at ln cost [S] over a grid of sizes."""
    size = centre + np.linspace(-REACH, REACH, STEPS)
    data = tokens(size[None], cost[:, None])
    with np.errstate(over="ignore"):  # of models that so little pays for that their loss is infinite
        return surface.at(arm, size[None], data).min(1)


def _bytes_ratio(
    cost: str,
    surfaces: tuple[Surface, Surface],
    pair: tuple[int, int],
    laws: tuple[np.ndarray, np.ndarray],
    log_flops: float,
) -> CostRatio:
    """Bytes of the reference's model over those of the arm's, where both are optimal in FLOPs and equal in loss."""
    logs = []
    for surface in surfaces:
        compute = surface.flops_for(pair[1], surface.frontier(pair[0], log_flops))
        meets = np.isfinite(compute)
        mine, other = (
            surface.optimum(arm, np.where(meets, c, 0.0))[0] for arm, c in zip(pair, (log_flops, compute), strict=True)
        )
        logs.append(np.where(meets, np.polyval(laws[1], other) - np.polyval(laws[0], mine), np.inf))
    size = float(surfaces[0].optimum(pair[0], log_flops)[0][0])
    return CostRatio(cost, float(np.exp(np.polyval(laws[0], size))), estimated(*logs).map(np.exp))
