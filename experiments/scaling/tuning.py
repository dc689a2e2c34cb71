"""The learning rate that an arm's tuning runs chose, and what the error of that choice may cost.

Near its optimum the log of the loss is a parabola in the log of the rate, whose curvature curves of several budgets
share.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.findings import QUANTILES, Estimate, number
from experiments.scaling.results import Tuning, TuningCurve

WINDOW = math.log(3.2)  # half-width, in the log of the rate, of the part of a curve that is taken for a parabola
USUAL_SPREAD = 0.01  # of ln(bits per byte) of a run, where no fit says it


@dataclass(frozen=True)
class RateCurve:
    """Runs of one budget and size that differ by their rate, by rate. x: ln rate, loss: ln(bits per byte), the mean of
    `seeds` runs each."""

    budget: float
    params: int
    x: np.ndarray
    loss: np.ndarray
    seeds: np.ndarray

    @property
    def best(self) -> int:
        return int(np.argmin(self.loss))

    @property
    def at_edge(self) -> str | None:
        """ "lowest" or "highest" where the best rate is that of the rates tried."""
        return {0: "lowest", len(self.x) - 1: "highest"}.get(self.best)


@dataclass(frozen=True, eq=False)
class RateOptimum:
    """The vertices of the curves that have one [G] with their covariance [G, G], at the ln of their budgets [G], and
    their curvature with its standard error."""

    budgets: np.ndarray
    x: np.ndarray
    covariance: np.ndarray
    curvature: float
    curvature_error: float

    @property
    def chosen(self) -> float:
        """ln of the rate that serves all budgets: the mean of the vertices, each with its certainty for a weight."""
        weights = 1 / np.diag(self.covariance)
        return float(weights @ self.x / weights.sum())

    def excess(self, log_flops: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
        """Returns what runs of these budgets [R] lose in ln(bits per byte) by the error of the chosen rate [draws, R],
        never below zero. Between budgets that were tuned the optimum follows a line in ln C, beyond them it stays.

        The optima of the budgets are one, which the rule of transfer says, but for what they differ by beyond their own
        errors: a model of random effects, its variance by DerSimonian and Laird (1986)."""
        errors = np.diag(self.covariance)
        weights = 1 / errors
        apart = float(weights @ (self.x - self.chosen) ** 2) - (len(self.x) - 1)
        scale = weights.sum() - (weights**2).sum() / weights.sum()
        between = max(0.0, apart / scale) if len(self.x) > 1 else 0.0
        kept = between / (between + errors)  # of a budget's own vertex; the rest is the common one's
        common = rng.normal(self.chosen, math.sqrt(1 / (1 / (errors + between)).sum()), (draws, 1))
        own = rng.standard_normal((draws, len(self.x))) * np.sqrt(kept * errors)
        vertices = common + kept * (self.x - common) + own
        order = np.argsort(self.budgets)
        optimum = np.array([np.interp(log_flops, self.budgets[order], vertex[order]) for vertex in vertices])
        curvature = np.abs(rng.normal(self.curvature, self.curvature_error, (draws, 1)))
        return curvature * (optimum - self.chosen) ** 2


def rate_curves(rows: pd.DataFrame) -> list[RateCurve]:
    """The curves of an arm's tuning runs, from the smallest budget on; seeds of one rate are averaged. A rate that
    diverged is no point of the curve, but bounds it: it counts as worse than any that is finite."""
    curves = []
    for (budget, _), group in rows[rows.status.isin(["done", "diverged"])].groupby(["budget_flops", "width"]):
        if not (group.status == "done").any():
            continue
        worst = math.log(group.bits_per_byte.astype(float).max()) + 1.0
        loss = group.bits_per_byte.astype(float).map(math.log, na_action="ignore").where(group.status == "done", worst)
        by_rate = loss.groupby(group.learning_rate.astype(float))
        x, params = np.log(np.array(list(by_rate.groups))), group.params_total.dropna()
        mean, seeds = by_rate.mean().to_numpy(), by_rate.size().to_numpy()
        curves.append(RateCurve(float(budget), int(params.iloc[0]), x, mean, seeds))
    return curves


def find_optimum(curves: list[RateCurve], spread: float = USUAL_SPREAD) -> RateOptimum | None:
    """Parabolas of one curvature through the curves' points near their best, or None where no curve has its best rate
    inside of those tried. spread: standard deviation of a run's ln(bits per byte)."""
    inside = [curve for curve in curves if not curve.at_edge]
    if not inside:
        return None
    rows, targets, seeds = [], [], []
    for i, curve in enumerate(inside):
        near = np.abs(curve.x - curve.x[curve.best]) <= WINDOW
        near[curve.best - 1 : curve.best + 2] = True
        for x in curve.x[near] - curve.x[curve.best]:
            row = np.zeros(2 * len(inside) + 1)
            row[2 * i : 2 * i + 2], row[-1] = (1, x), x**2
            rows.append(row)
        targets.append(curve.loss[near])
        seeds.append(curve.seeds[near])
    weights = np.sqrt(np.concatenate(seeds))
    design = np.array(rows) * weights[:, None]
    constants = np.linalg.lstsq(design, np.concatenate(targets) * weights, rcond=None)[0]
    covariance, curvature = np.linalg.pinv(design.T @ design) * spread**2, float(constants[-1])
    if curvature <= 0:  # impossible with one curve; noise may do it with several
        return find_optimum(inside[-1:], spread) if len(inside) > 1 else None
    slopes = constants[1:-1:2]
    reach = [curve.x[[curve.best - 1, curve.best + 1]] - curve.x[curve.best] for curve in inside]
    vertices = np.clip(-slopes / (2 * curvature), [low for low, _ in reach], [high for _, high in reach])
    # The vertex is -slope / (2 curvature): its derivatives by the slopes and by the curvature.
    by_constant = np.zeros((len(inside), len(constants)))
    by_constant[np.arange(len(inside)), 1 + 2 * np.arange(len(inside))] = -1 / (2 * curvature)
    by_constant[:, -1] = slopes / (2 * curvature**2)
    return RateOptimum(
        budgets=np.log([curve.budget for curve in inside]),
        x=vertices + np.array([curve.x[curve.best] for curve in inside]),
        covariance=by_constant @ covariance @ by_constant.T,
        curvature=curvature,
        curvature_error=math.sqrt(covariance[-1, -1]),
    )


def tuned_rate(rows: pd.DataFrame) -> float | None:
    """The learning rate for an arm's other runs, from its tuning runs: the common vertex of their curves to three
    digits, or the best one tried at the largest budget where no curve has a minimum; None without finished runs."""
    curves = rate_curves(rows)
    return _chosen(curves, find_optimum(curves)) if curves else None


def _chosen(curves: list[RateCurve], optimum: RateOptimum | None) -> float:
    last = curves[-1]
    return float(f"{math.exp(optimum.chosen if optimum else last.x[last.best]):.3g}")


def describe(rows: pd.DataFrame, budgets: tuple[float, ...], spread: float | None) -> tuple[Tuning | None, list[str]]:
    """An arm's tuning, and what is to be wary of. spread: that of its runs about the surface, where there is one."""
    curves = rate_curves(rows)
    if not curves:
        return None, []
    optimum = find_optimum(curves, spread or USUAL_SPREAD)
    done = rows[rows.status == "done"]
    described, warnings, vertices = [], [], 0
    for curve in curves:
        estimate = None
        if curve.at_edge:
            warnings.append(
                f"at {number(curve.budget)} FLOPs the best learning rate, {math.exp(curve.x[curve.best]):.3g}, is the "
                f"{curve.at_edge} tried: a better one may lie beyond, so this arm may be better than it is shown"
            )
        elif optimum is not None and vertices < len(optimum.x):
            middle, error = optimum.x[vertices], 1.96 * math.sqrt(optimum.covariance[vertices, vertices])
            estimate, vertices = Estimate(middle, middle - error, middle + error).map(math.exp), vertices + 1
        rates, losses = (tuple(map(float, np.exp(values))) for values in (curve.x, curve.loss))
        described.append(TuningCurve(curve.budget, curve.params, rates, losses, estimate))
    excess = None
    if optimum is not None:
        drawn = optimum.excess(np.log(budgets), np.random.default_rng(0), 2000)
        excess = float(np.quantile(drawn, QUANTILES[1], axis=0).max())
        if len(set(optimum.budgets)) < 2:
            warnings.append(
                "the learning rate was tuned at one budget: that it is right at the others is taken from the rule by "
                "which it is transferred, and the interval does not know of that rule's error"
            )
    curvature = None if optimum is None else optimum.curvature
    rate = _chosen(curves, find_optimum(curves))  # as the sweep did, before a fit said how runs scatter
    tuning = Tuning(rate, float(done.flops.sum()), len(done), tuple(described), curvature, excess)
    return tuning, warnings
