"""A form of `forms.py` fitted to runs in two ways, with intervals, everything in float64.

By Huber's loss of ln L (approach 3 of Hoffmann et al. 2022, arXiv 2203.15556, as Besiroglu et al., arXiv 2404.10102,
replicate it), and by least squares in L, which for Hoffmann's form begin where variable projection ends (Czech et al.,
arXiv 2603.22339). N in parameters, D in tokens, loss in any unit.

Shape letters: S problems (starts or resampled data sets), R runs, P parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Literal

import numpy as np
import pandas as pd
from scipy.optimize import minimize, nnls

from experiments.findings import Estimate
from experiments.fits.forms import EXPONENTS, NEGLIGIBLE, A, B, Chinchilla, E, Form, Logs, Surface
from experiments.fits.least_squares import Solutions, levenberg_marquardt

DELTA = 1e-3  # Huber's threshold in ln loss
THINNED = 2000  # runs of a larger table, evenly picked, that starts are compared on
BLOCK = 50_000  # problems x runs that are solved together: their Jacobians stay in the cache
COARSE = 1e-8  # relative fall of the objective at which a draw is solved; its error is then 1 % of a standard error
ON_A_LINE = 0.05  # standard deviation of ln tokens about a line in ln size up to which runs lie on it
FREE_TO_REST = {"E", "R_N", "R_D"}  # parameters whose bound means something: no floor, repeats worth all or nothing
Method = Literal["huber", "squares"]


class FitRefused(ValueError):
    """A fit that must not be used; `kind` is too_few_points, bound or not_converged."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True, eq=False)
class Problem:
    """A form to be fitted to runs in one way. runs: its columns and loss, [R] each."""

    form: Form
    runs: pd.DataFrame
    method: Method

    @cached_property
    def units(self) -> dict[str, float]:
        """ln of the unit that each column is measured in while it is fitted: sizes share one, token counts another."""
        size, tokens = (float(np.log(self.runs[name]).mean()) for name in ("params", "tokens"))
        return {"params": size, "total_params": size, "tokens": tokens, "unique_tokens": tokens}

    @cached_property
    def logs(self) -> Logs:
        """The columns [R] in their units, and ln of all parameters over active ones where there is a column of them."""
        logs = {name: np.log(self.runs[name].to_numpy()) - self.units[name] for name in self.form.columns}
        if "total_params" in logs:
            logs["expansion"] = logs["total_params"] - logs["params"]
        return logs

    @cached_property
    def loss(self) -> np.ndarray:
        return self.runs.loss.to_numpy()

    @cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return self.form.bounds(np.log(self.loss))

    def thinned(self) -> "Problem":
        """Returns the problem of at most THINNED of the runs."""
        if len(self.runs) <= THINNED:
            return self
        return replace(self, runs=self.runs.iloc[np.linspace(0, len(self.runs) - 1, THINNED).astype(int)])

    def solve(self, start: np.ndarray, weights: np.ndarray | float = 1.0, tolerance: float = 1e-11) -> Solutions:
        """Parameters of the lowest objective from starts [S, P] or under weights [S, R]."""

        def log_loss(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return self.form(theta, self.logs)

        def loss(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            values, jacobian = self.form(theta, self.logs)
            return np.exp(values), jacobian * np.exp(values)[..., None]

        if self.method == "huber":
            model, target, delta = log_loss, np.log(self.loss), DELTA
        else:
            model, target, delta = loss, self.loss, np.inf
        return levenberg_marquardt(
            model, start, target, *self.bounds, weights=weights, delta=delta, tolerance=tolerance
        )

    def resting(self, theta: np.ndarray) -> np.ndarray:
        """Returns whether parameters [S, P] are at a bound, [S, P]; a coefficient also where its term adds nothing."""
        lower, upper = self.bounds
        margin = 1e-3 * (upper - lower)
        at = (theta <= lower + margin) | (theta >= upper - margin)
        at[:, E] = theta[:, E] <= lower[E] + 1e-6
        size, data, _ = self.form.shares(theta, self.logs).max(-1)
        at[:, A] |= size < NEGLIGIBLE
        at[:, B] |= data < NEGLIGIBLE
        return at


@dataclass(frozen=True, eq=False)
class Fitted:
    """A law through runs. parameters: [P], in the problem's units. objective: what the fit minimised, at its minimum.

    at_bound: the names of parameters that ended at a bound that means something: E at 0, a decay constant at an end.
    """

    problem: Problem
    parameters: np.ndarray
    objective: float
    at_bound: tuple[str, ...]

    @property
    def constants(self) -> dict[str, float]:
        """The constants of the form's formula by name."""
        return {name: float(value[0]) for name, value in _constants(self.problem, self.parameters[None]).items()}

    @property
    def surface(self) -> Surface:
        """The law in N and D alone."""
        return self.problem.form.surface(self.constants, self.problem.logs)


@dataclass(frozen=True)
class Bootstrap:
    """The number of draws, of those that ended at a bound and are left out, and the estimates of the constants and of
    the exponent a of the optimal N, whose standard error is sd_a; None where too few draws are left."""

    draws: int
    draws_refused: int
    estimates: dict[str, Estimate] | None
    sd_a: float | None


def _constants(problem: Problem, parameters: np.ndarray) -> dict[str, np.ndarray]:
    """Constants [S] of parameters [S, P]; E is 0 where it rests at its bound."""
    constants = problem.form.constants(parameters, problem.units)
    constants["E"] = np.where(parameters[:, E] <= problem.bounds[0][E] + 1e-6, 0.0, constants["E"])
    return constants


def _check(problem: Problem) -> None:
    runs, form = problem.runs, problem.form
    needed = len(form.parameters) + 3
    if len(runs) < needed:
        reason = f"{len(runs)} runs for {len(form.parameters)} parameters, at least {needed} are needed"
        raise FitRefused("too_few_points", reason)
    for name, words in (("params", "sizes"), ("tokens", "token counts")):
        if (count := runs[name].nunique()) < 3:
            raise FitRefused("too_few_points", f"{count} different {words}, at least 3 are needed")
    n, d = problem.logs["params"], problem.logs["tokens"]
    if np.std(d - np.polyval(np.polyfit(n, d, 1), n)) < ON_A_LINE:
        reason = "runs lie on one line in ln size and ln tokens (one budget, or one number of tokens per parameter)"
        raise FitRefused("too_few_points", f"all {reason}, on which the terms of size and data cannot be told apart")
    if "expansion" in problem.logs and np.ptp(problem.logs["expansion"]) < 0.1:
        raise FitRefused("too_few_points", "all runs have one ratio of all to active parameters: take form=chinchilla")
    if "unique_tokens" in runs and not (runs.tokens > 1.01 * runs.unique_tokens).any():
        raise FitRefused("too_few_points", "no run sees a token twice: take form=chinchilla")


def project(problem: Problem) -> np.ndarray:
    """Parameters [5] of Hoffmann's form by variable projection: (E, A, B) >= 0 of least squares in L solved for
    exactly, (alpha, beta) searched in two dimensions from the best of a grid of 24 x 24."""
    u, v, target = problem.logs["params"], problem.logs["tokens"], problem.loss
    low, high = np.log(EXPONENTS)

    def solve(log_exponents: np.ndarray) -> tuple[np.ndarray, float]:
        alpha, beta = np.exp(np.clip(log_exponents, low, high))
        return nnls(np.stack([np.exp(-alpha * u), np.exp(-beta * v), np.ones_like(u)], axis=1), target)

    grid = np.linspace(low, high, 24)
    first = min(product(grid, grid), key=lambda pair: solve(np.array(pair))[1])
    simplex = first + np.array([[0, 0], [0.1, 0], [0, 0.1]])
    options = {"xatol": 1e-8, "fatol": 1e-12, "maxiter": 600, "initial_simplex": simplex}
    found = minimize(lambda p: solve(p)[1], first, method="Nelder-Mead", options=options).x
    coefficients = np.log(np.maximum(solve(found)[0], 1e-300))
    return np.array([*coefficients, *np.exp(np.clip(found, low, high))])


def fit_law(problem: Problem) -> Fitted:
    """The law of the lowest objective over the form's starts. An optimum that is reached from itself is one.

    Raises:
        FitRefused: too few points, a coefficient or an exponent at a bound, or no convergence.
    """
    _check(problem)
    few, form = problem.thinned(), problem.form
    if problem.method == "squares" and type(form) is Chinchilla:
        start = project(few)
    else:
        solutions = few.solve(form.starts(np.log(few.loss)), tolerance=1e-9)
        start = solutions.parameters[solutions.best]
    # The thinned table has other units than the whole.
    moved = dict(zip(form.parameters, start, strict=True))
    for coefficient, exponent, column in form.units:
        moved[coefficient] += moved[exponent] * (few.units[column] - problem.units[column])
    solutions = problem.solve(np.array([[moved[name] for name in form.parameters]]))
    parameters, objective = solutions.parameters[0], float(solutions.objective[0])
    if not np.isfinite(objective) or not solutions.converged[0]:
        raise FitRefused("not_converged", "no start led to an optimum")
    fitted = Fitted(problem, parameters, objective, ())
    resting = [name for name, at in zip(form.parameters, problem.resting(parameters[None])[0], strict=True) if at]
    for name in resting:
        if name not in FREE_TO_REST:
            value = fitted.constants[name]
            raise FitRefused("bound", f"{name}={value:.3g} ran to a bound: the runs do not determine its term")
    return replace(fitted, at_bound=tuple(resting))


def bootstrap(
    fitted: Fitted, draws: int, seed: int, report: Callable[[int, int], None] = lambda before, now: None
) -> Bootstrap:
    """95 % intervals from refits to resampled runs, each begun at the fit. `report` is told how many draws were done
    before and are now.

    Each draw's distance from the fit is stretched by sqrt(R / chi^2), chi^2 drawn with R - P degrees of freedom:
    resampled runs scatter less about their fit than the noise by sqrt((R - P) / R), and the noise is known from R - P
    runs' worth of residuals alone. At least half of the draws, and 20, must be left.
    """
    problem, runs, free = fitted.problem, len(fitted.problem.runs), len(fitted.problem.runs) - len(fitted.parameters)
    rng = np.random.default_rng(seed)
    stretch = np.sqrt(runs / rng.chisquare(free, (draws, 1)))
    block, drawn, bad = max(1, BLOCK // runs), [], []
    for first in range(0, draws, block):
        weights = rng.multinomial(runs, np.full(runs, 1 / runs), min(block, draws - first)).astype(float)
        solutions = problem.solve(fitted.parameters, weights, COARSE)
        resting = problem.resting(solutions.parameters)
        refusing = [i for i, name in enumerate(problem.form.parameters) if name not in FREE_TO_REST]
        bad.append(~solutions.converged | resting[:, refusing].any(1))
        drawn.append(solutions.parameters)
        report(first, first + len(weights))
    kept = ~np.concatenate(bad)
    refused = int(draws - kept.sum())
    if kept.sum() < max(20, draws / 2):
        return Bootstrap(draws, refused, None, None)
    parameters = fitted.parameters + stretch[kept] * (np.concatenate(drawn)[kept] - fitted.parameters)
    sets = _constants(problem, np.clip(parameters, *problem.bounds))
    each = (dict(zip(sets, values, strict=True)) for values in zip(*sets.values(), strict=True))
    a = np.array([problem.form.surface(constants, problem.logs).a for constants in each])

    estimates = {name: Estimate.of_draws(value, sets[name]) for name, value in fitted.constants.items()}
    estimates["a"] = Estimate.of_draws(fitted.surface.a, a)
    return Bootstrap(draws, refused, estimates, float(a.std(ddof=1)))
