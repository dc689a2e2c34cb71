"""Power: which multipliers a design tells from 1, and what it would take to tell smaller ones.

The standard error of ln(multiplier) follows from the surface by the delta method: for runs with weights W and errors of
covariance V, the parameters' covariance is the sandwich (J'WJ)^-1 J'WVWJ (J'WJ)^-1. A parameter at a bound is left out.

Shape letters: R runs, P free parameters, G groups of runs whose errors are correlated.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.stats import norm

from experiments.scaling.design import Cell
from experiments.scaling.joint import runs_of, sharing
from experiments.scaling.results import Power, Remedy
from experiments.scaling.surface import Fit, Parametrisation, Runs

TARGETS = (1.05, 1.10)  # multipliers that remedies are named for, beside what is told apart
LARGER = 4.0  # a further budget, over the largest
DETECTED = 1.96  # standard errors from 0 beyond which ln(multiplier) is told from it
REQUIRED = DETECTED + 0.84  # and those with which that happens in 80 % of repetitions
EFFICIENCY = 0.95  # of Huber's loss at `surface.ROBUST` for normal errors (Huber, 1964)
EXPONENT, BEND, FLOOR = 0.4, 0.5, 0.5  # assumed before any run: alpha = beta, gamma, and E over the loss at the centre
STEP = 1e-4  # of central differences, in the parameters' own units
RIDGE = 1e-9  # of the largest entry: directions that no run knows anything of get a large error and no division by zero


def gradient(fit: Fit, arm: int, reference: int, log_flops: float) -> np.ndarray:
    """Derivatives of ln(multiplier) at C by the free parameters [P]; NaN where the arms' frontiers do not meet."""
    steps = STEP * np.eye(len(fit.parameters))[free(fit)]
    up, down = (fit.model.surface(fit.parameters + sign * steps) for sign in (1, -1))
    rise = up.log_multiplier(arm, reference, log_flops) - down.log_multiplier(arm, reference, log_flops)
    return np.where(np.isfinite(rise), rise, np.nan) / (2 * STEP)


def free(fit: Fit) -> np.ndarray:
    """Returns which parameters lie off their bounds."""
    low, high = fit.model.lower, fit.model.upper
    return (fit.parameters > low + 1e-6) & (fit.parameters < high - 1e-6)


def information(fit: Fit, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """J'WJ and J'WVWJ of each cell of a design [G, P, P], cells in the order of their numbers. Both add up over cells,
    and over seeds of a cell, since only runs of one cell have correlated errors."""
    jacobian = _moved(fit.model, runs)(fit.parameters[None])[1][0][:, free(fit)] / fit.spread[runs.arm, None]
    cells, number = np.unique(runs.cell, return_inverse=True)
    normal = np.zeros((len(cells), jacobian.shape[1], jacobian.shape[1]))
    np.add.at(normal, number, jacobian[:, :, None] * jacobian[:, None, :])
    sums = np.zeros((len(cells), jacobian.shape[1]))
    np.add.at(sums, number, jacobian)
    shared = fit.correlation * sums[:, :, None] * sums[:, None, :]
    return normal, (1 - fit.correlation) * normal + shared


def deviation(slope: np.ndarray, normal: np.ndarray, errors: np.ndarray) -> float:
    """Standard error of a quantity of this gradient [P], from the sums of `information` over a design [P, P]; infinite
    where the gradient is not known."""
    if not np.isfinite(slope).all():
        return math.inf
    weights = np.linalg.solve(normal + RIDGE * np.diag(normal.diagonal() + normal.diagonal().max()), slope)
    return math.sqrt(weights @ errors @ weights / EFFICIENCY)


def deviation_of(fit: Fit, runs: Runs, arm: int, reference: int, log_flops: float) -> float:
    """Standard error of ln(multiplier) at C when these runs are made and the surface is the fitted one."""
    normal, errors = information(fit, runs)
    return deviation(gradient(fit, arm, reference, log_flops), normal.sum(0), errors.sum(0))


def power_of(fit: Fit, arm: int, reference: int, log_flops: float, systematic: float, seeds: int) -> Power:
    """Returns what the runs of a fit tell apart at C.

    systematic: standard error of ln(multiplier) that no further run makes smaller. seeds: of each cell so far.
    """
    runs = fit.model.runs
    larger = larger_budget(fit, (arm, reference))
    designs = runs, runs.joined(larger)
    by_runs, with_larger = (deviation_of(fit, design, arm, reference, log_flops) for design in designs)
    told_apart = math.exp(min(REQUIRED * math.hypot(by_runs, systematic), 700.0))

    def remedy(target: float) -> Remedy:
        left = (math.log(target) / REQUIRED) ** 2 - systematic**2
        wanted = math.ceil(seeds * by_runs**2 / left) if left > 0 and math.isfinite(by_runs) else None
        power = float(norm.cdf(math.log(target) / math.hypot(with_larger, systematic) - DETECTED))
        return Remedy(target, wanted, power, float(np.exp(larger.log_flops).sum()))

    return Power(told_apart, tuple(remedy(target) for target in TARGETS if target < told_apart))


def larger_budget(fit: Fit, arms: Iterable[int], factor: float = LARGER) -> Runs:
    """The runs of the largest budget at `factor` times its FLOPs, each as far from its arm's optimum as it was."""
    runs = fit.model.runs
    largest = runs.where(runs.in_largest_budget & np.isin(runs.arm, list(arms)))
    size, highest = largest.size.copy(), runs.log_flops.max()
    for arm in arms:
        mine = largest.arm == arm
        before, after = (float(fit.surface.optimum(arm, highest + x)[0][0]) for x in (0, math.log(factor)))
        size[mine] += after - before
    data = largest.size + largest.data + math.log(factor) - size
    return Runs(largest.arm, size, data, largest.loss, largest.cell + 1 + runs.cell.max())


def planned_power(
    cells: Sequence[Cell], arms: Sequence[str], bounds: Sequence[bool], noise: float, known: Fit | None = None
) -> list[Power]:
    """Returns what a design tells apart at the mean of its ln budgets before it is run: for each arm but the first,
    against that. What all runs share, such as a mistuned learning rate, is not counted: it is known only afterwards.

    cells: the fitted ones. bounds: of each arm, see `joint.sharing`. noise: standard deviation of ln(loss) of a run.
    known: the surface of all arms, where runs said it; else one is assumed, with `noise`.
    """
    runs = planned_runs(cells, arms)
    fit = assumed(runs, bounds, noise) if known is None else replace(known, model=_moved(known.model, runs))
    centre = float(np.log(sorted({cell.budget for cell in cells})).mean())
    seeds = int(np.median(list(Counter((cell.arm, cell.budget, cell.width) for cell in cells).values())))
    return [power_of(fit, arm, 0, centre, 0.0, seeds) for arm in range(1, len(arms))]


def planned_runs(cells: Sequence[Cell], arms: Sequence[str]) -> Runs:
    """Returns cells as runs of a surface, as if each had a loss of 1."""
    table = pd.DataFrame([vars(cell) for cell in cells])
    return runs_of(table.assign(budget_flops=table.budget, params_total=table.params, bits_per_byte=1.0), arms)


def assumed(runs: Runs, bounds: Sequence[bool], noise: float) -> Fit:
    """A surface that nothing is known of yet, as if it were fitted: the optimum of every arm in the middle of its sizes
    with a loss of 1 there, alpha = beta = EXPONENT, gamma = BEND, E = FLOOR, and independent runs."""
    model = Parametrisation(sharing(bounds), runs)
    parameters = np.full(model.count, EXPONENT)
    parameters[model.e], parameters[model.gamma] = math.log(FLOOR), math.log(BEND)
    for arm, (a, b) in enumerate(zip(model.a, model.b, strict=True)):
        mine, middle = runs.where(runs.arm == arm), math.log(1 - FLOOR) - BEND * math.log(2)
        parameters[a] = middle + EXPONENT * (mine.size.mean() - model.origin[0])
        parameters[b] = middle + EXPONENT * (mine.data.mean() - model.origin[1])
    return Fit(model, parameters, np.zeros(len(runs)), np.full(len(bounds), noise), 0.0, 0.0)


def _moved(model: Parametrisation, runs: Runs) -> Parametrisation:
    """The same constants at other runs."""
    moved = copy(model)
    moved.runs = runs
    return moved
