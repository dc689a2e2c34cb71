"""L(N, D) = E + A / N^alpha + B / D^beta, fitted to runs in two ways.

`fit_huber` is approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556) as Besiroglu et al. (arXiv 2404.10102) replicate
it; `fit_projection` is variable projection (Czech et al., arXiv 2603.22339). N in parameters, D in tokens, loss in any
unit, everything in float64.
"""

import math
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import minimize, nnls
from scipy.special import logsumexp

from experiments.findings import QUANTILES, Estimate

DELTA = 1e-3  # Huber's threshold in ln loss
EXPONENTS = (0.02, 3.0)  # outside of these an exponent is taken for a failed fit
NEGLIGIBLE = 1e-5  # a term that is nowhere a larger fraction of the loss than this is taken for absent
BATCH = 500_000  # starts x runs whose objectives are computed together


class FitRefused(ValueError):
    """A fit that must not be used; `kind` is too_few_points, bound, start or not_converged."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Surface:
    """L(N, D). `objective` is what the fit minimised, at its minimum."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    objective: float = np.nan

    @property
    def a(self) -> float:
        """Exponent of the optimal N in compute, C = 6 N D; b = 1 - a is that of D."""
        return self.beta / (self.alpha + self.beta)

    def loss(self, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    def optimum(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens of the lowest loss at C = 6 N D (Hoffmann et al., eq. 4)."""
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return g * (flops / 6) ** self.a, (flops / 6) ** (1 - self.a) / g


@dataclass(frozen=True)
class SurfaceEstimates:
    """The constants of a surface, its exponent of the optimal N, and that exponent's standard error."""

    E: Estimate
    A: Estimate
    B: Estimate
    alpha: Estimate
    beta: Estimate
    a: Estimate
    sd_a: float


@dataclass(frozen=True)
class Bootstrap:
    """The number of draws, of those that the fit refused, and the estimates; None where too few draws are left."""

    draws: int
    draws_refused: int
    estimates: SurfaceEstimates | None


def _residuals(
    parameters: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray
) -> tuple[np.ndarray, ...]:
    """ln of the three terms [3, ..., runs], of the surface [..., runs], and its distance from ln L, at `parameters`
    [..., 5] of (a, b, e, alpha, beta)."""
    a, b, e, alpha, beta = np.moveaxis(parameters, -1, 0)[..., None]
    terms = np.stack(np.broadcast_arrays(a - alpha * log_n, b - beta * log_d, e))
    predicted = logsumexp(terms, axis=0)
    return terms, predicted, predicted - log_loss


def _huber(r: np.ndarray) -> np.ndarray:
    return np.where(np.abs(r) <= DELTA, r**2 / 2, DELTA * (np.abs(r) - DELTA / 2))


def huber_objective(
    parameters: np.ndarray,
    log_n: np.ndarray,
    log_d: np.ndarray,
    log_loss: np.ndarray,
    weights: np.ndarray | float = 1.0,
) -> tuple[float, np.ndarray]:
    """Sum of Huber(LSE(a - alpha ln N, b - beta ln D, e) - ln L) and its gradient in (a, b, e, alpha, beta)."""
    terms, predicted, r = _residuals(parameters, log_n, log_d, log_loss)
    value = np.sum(weights * _huber(r))
    pull = np.exp(terms - predicted) * (weights * np.clip(r, -DELTA, DELTA))
    gradient = [pull[0].sum(), pull[1].sum(), pull[2].sum(), -pull[0] @ log_n, -pull[1] @ log_d]
    return float(value), np.array(gradient)


def hoffmann_starts() -> np.ndarray:
    """[4500, 5]: a, b in {0, 5, ..., 25}, e in {-1, ..., 1}, alpha, beta in {0, ..., 2}."""
    scale, constant, exponent = range(0, 30, 5), np.arange(-1, 1.5, 0.5), np.arange(0, 2.5, 0.5)
    return np.array(list(product(scale, scale, constant, exponent, exponent)), float)


def choose_starts(log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray) -> np.ndarray:
    """[30, 5]: the best of Hoffmann's starts by their objective, no more than two for each pair of exponents."""
    grid = hoffmann_starts()
    batches = np.array_split(grid, math.ceil(len(grid) * len(log_n) / BATCH))
    objectives = [_huber(_residuals(batch, log_n, log_d, log_loss)[2]).sum(axis=-1) for batch in batches]
    chosen, taken = [], Counter()
    for start in grid[np.argsort(np.concatenate(objectives))]:
        exponents = tuple(start[3:])
        taken[exponents] += 1
        if taken[exponents] <= 2:
            chosen.append(start)
    return np.array(chosen[:30])


def _check(n: np.ndarray, d: np.ndarray) -> None:
    if len(n) < 8:
        raise FitRefused("too_few_points", f"{len(n)} runs for 5 parameters, at least 8 are needed")
    for name, values in (("sizes", n), ("token counts", d)):
        if len(np.unique(values)) < 3:
            raise FitRefused("too_few_points", f"{len(np.unique(values))} different {name}, at least 3 are needed")


def _check_bounds(s: Surface, n: np.ndarray, d: np.ndarray) -> Surface:
    low, high = EXPONENTS
    for name, exponent in (("alpha", s.alpha), ("beta", s.beta)):
        if not low * 1.001 < exponent < high * 0.999:
            raise FitRefused("bound", f"{name}={exponent:.3g} ran to a bound of [{low}, {high}]")
    terms = (("E", s.E, s.E), ("A", s.A, s.A * n.min() ** -s.alpha), ("B", s.B, s.B * d.min() ** -s.beta))
    total = sum(largest for _, _, largest in terms)
    for name, value, largest in terms:
        if not largest > NEGLIGIBLE * total:
            raise FitRefused("bound", f"{name}={value:.3g} ran to its bound, 0: its term contributes nothing")
    return s


def _minimise_huber(start: np.ndarray, data: tuple, weights: np.ndarray | float) -> tuple[float, np.ndarray]:
    # The sum is of order 1e-3 and its optimum is flat: at its natural scale scipy's tolerances stop on the way. The
    # columns are scaled so that a unit step in each changes ln L by about as much.
    log_n, log_d, log_loss = data
    centre = np.array([log_n.mean(), log_d.mean()])
    shifted = (log_n - centre[0], log_d - centre[1], log_loss)

    def scaled(p: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = huber_objective(p, *shifted, weights)
        return 1e6 * value, 1e6 * gradient

    p = start.copy()
    p[:2] -= p[3:] * centre
    for _ in range(2):
        p = minimize(scaled, p, jac=True, method="BFGS", options={"gtol": 1e-4, "maxiter": 2000}).x
    value = scaled(p)[0] / 1e6
    p[:2] += p[3:] * centre
    return value, p


def fit_huber(
    n: np.ndarray, d: np.ndarray, loss: np.ndarray, starts: np.ndarray | None = None, weights: np.ndarray | float = 1.0
) -> Surface:
    """The lowest sum of Huber losses over starts.

    `starts` [number, 5] of (a, b, e, alpha, beta); where None, the best 30 of Hoffmann's 4500 by their objective, no
    more than two for each pair of exponents.

    Raises:
        FitRefused: too few points, an exponent or constant at a bound, or parameters that never left their start.
    """
    _check(n, d)
    data = np.log(n), np.log(d), np.log(loss)
    if starts is None:
        starts = choose_starts(*data)
    results = [(*_minimise_huber(start, data, weights), start) for start in starts]
    value, p, start = min(results, key=lambda result: result[0])
    if not np.isfinite(value):
        raise FitRefused("not_converged", "no start led to a finite objective")
    if np.allclose(p, start, rtol=1e-9, atol=1e-9):
        raise FitRefused("start", f"the parameters equal a start, {start.tolist()}: nothing was fitted")
    a, b, e, alpha, beta = map(float, p)
    return _check_bounds(Surface(float(np.exp(e)), float(np.exp(a)), float(np.exp(b)), alpha, beta, value), n, d)


def fit_projection(
    n: np.ndarray,
    d: np.ndarray,
    loss: np.ndarray,
    start: tuple[float, float] | None = None,
    weights: np.ndarray | float = 1.0,
) -> Surface:
    """Least squares on the loss itself: (E, A, B) >= 0 solved for exactly, (alpha, beta) searched in two dimensions.

    `start` is a first (alpha, beta); where None, the best of a grid of 24 x 24.

    Raises:
        FitRefused: too few points, or a parameter at a bound.
    """
    _check(n, d)
    n0, d0, y0 = np.exp(np.log(n).mean()), np.exp(np.log(d).mean()), loss.mean()
    u, v, root = np.log(n / n0), np.log(d / d0), np.sqrt(weights * np.ones_like(loss))
    target, low, high = root * loss / y0, *np.log(EXPONENTS)

    def solve(log_exponents: np.ndarray) -> tuple[np.ndarray, float]:
        alpha, beta = np.exp(np.clip(log_exponents, low, high))
        design = np.stack([root, root * np.exp(-alpha * u), root * np.exp(-beta * v)], axis=1)
        coefficients, norm = nnls(design, target)
        return coefficients, norm**2

    if start is None:
        grid = np.linspace(low, high, 24)
        first = min(product(grid, grid), key=lambda pair: solve(np.array(pair))[1])
    else:
        first = np.log(start)
    options = {
        "xatol": 1e-8,
        "fatol": 1e-15,
        "maxiter": 600,
        "initial_simplex": first + np.array([[0, 0], [0.1, 0], [0, 0.1]]),
    }
    found = minimize(lambda p: solve(p)[1], first, method="Nelder-Mead", options=options).x
    alpha, beta = np.exp(np.clip(found, low, high))
    (e, a, b), rss = solve(found)
    surface = Surface(
        float(e * y0),
        float(a * y0 * n0**alpha),
        float(b * y0 * d0**beta),
        float(alpha),
        float(beta),
        float(rss * y0**2),
    )
    return _check_bounds(surface, n, d)


def bootstrap(surface: Surface, refit: Callable[[np.ndarray], Surface], runs: int, draws: int, seed: int) -> Bootstrap:
    """95 % percentile intervals of a fitted surface over resampled runs. `refit` takes each draw as weights [runs] that
    say how often a run was drawn. Draws that it refuses are counted and left out; at least half of all, and 20, must
    remain."""
    rng = np.random.default_rng(seed)
    fitted: list[Surface] = []
    for _ in range(draws):
        weights = np.bincount(rng.integers(runs, size=runs), minlength=runs).astype(float)
        with suppress(FitRefused):
            fitted.append(refit(weights))
    if len(fitted) < max(20, draws / 2):
        return Bootstrap(draws, draws - len(fitted), None)

    def estimate(value: float, drawn: list[float]) -> Estimate:
        return Estimate(value, *(float(end) for end in np.quantile(drawn, QUANTILES)))

    estimates = SurfaceEstimates(
        E=estimate(surface.E, [s.E for s in fitted]),
        A=estimate(surface.A, [s.A for s in fitted]),
        B=estimate(surface.B, [s.B for s in fitted]),
        alpha=estimate(surface.alpha, [s.alpha for s in fitted]),
        beta=estimate(surface.beta, [s.beta for s in fitted]),
        a=estimate(surface.a, [s.a for s in fitted]),
        sd_a=float(np.std([s.a for s in fitted], ddof=1)),
    )
    return Bootstrap(draws, draws - len(fitted), estimates)
