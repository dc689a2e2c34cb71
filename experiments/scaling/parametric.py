"""L(N, D) = E + A / N^alpha + B / D^beta, fitted to runs in two ways.

`fit_huber` is approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556) as Besiroglu et al. (arXiv 2404.10102) replicate
it; `fit_projection` is variable projection (Czech et al., arXiv 2603.22339). N in parameters, D in tokens, loss in any
unit, everything in float64.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
from scipy.optimize import minimize, nnls
from scipy.special import logsumexp

DELTA = 1e-3  # Huber's threshold in ln loss
EXPONENTS = (0.02, 3.0)  # outside of these an exponent is taken for a failed fit
NEGLIGIBLE = 1e-5  # a term that is nowhere a larger share of the loss than this is taken for absent


class FitRefused(ValueError):
    """A fit that must not be used; `kind` is too_few_points, bound, start or not_converged."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Surface:
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

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "a": self.a, "b": 1 - self.a}


def huber_objective(
    parameters: np.ndarray,
    log_n: np.ndarray,
    log_d: np.ndarray,
    log_loss: np.ndarray,
    weights: np.ndarray | float = 1.0,
) -> tuple[float, np.ndarray]:
    """Sum of Huber(LSE(a - alpha ln N, b - beta ln D, e) - ln L) and its gradient in (a, b, e, alpha, beta)."""
    a, b, e, alpha, beta = parameters
    terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
    predicted = logsumexp(terms, axis=0)
    r = predicted - log_loss
    small = np.abs(r) <= DELTA
    value = np.sum(weights * np.where(small, r**2 / 2, DELTA * (np.abs(r) - DELTA / 2)))
    share = np.exp(terms - predicted) * (weights * np.clip(r, -DELTA, DELTA))
    gradient = [share[0].sum(), share[1].sum(), share[2].sum(), -share[0] @ log_n, -share[1] @ log_d]
    return float(value), np.array(gradient)


def hoffmann_starts() -> np.ndarray:
    """[4500, 5]: a, b in {0, 5, ..., 25}, e in {-1, ..., 1}, alpha, beta in {0, ..., 2}."""
    scale, constant, exponent = range(0, 30, 5), np.arange(-1, 1.5, 0.5), np.arange(0, 2.5, 0.5)
    return np.array(list(product(scale, scale, constant, exponent, exponent)), float)


def _check(n: np.ndarray, d: np.ndarray) -> None:
    if len(n) < 8:
        raise FitRefused("too_few_points", f"{len(n)} runs for 5 parameters, at least 8 are needed")
    for name, values in (("sizes", n), ("token counts", d)):
        if len(np.unique(values)) < 3:
            raise FitRefused("too_few_points", f"{len(np.unique(values))} different {name}, at least 3 are needed")


def _check_bounds(s: Surface, n: np.ndarray, d: np.ndarray) -> Surface:
    low, high = EXPONENTS
    for name in ("alpha", "beta"):
        if not low * 1.001 < getattr(s, name) < high * 0.999:
            raise FitRefused("bound", f"{name}={getattr(s, name):.3g} ran to a bound of [{low}, {high}]")
    terms = {"E": s.E, "A": s.A * n.min() ** -s.alpha, "B": s.B * d.min() ** -s.beta}
    for name, largest in terms.items():
        if not largest > NEGLIGIBLE * sum(terms.values()):
            raise FitRefused(
                "bound", f"{name}={getattr(s, name):.3g} ran to its bound, 0: its term contributes nothing"
            )
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
        grid = hoffmann_starts()
        first = np.array([huber_objective(p, *data)[0] for p in grid])
        chosen, taken = [], {}
        for i in np.argsort(first):
            pair = tuple(grid[i, 3:])
            taken[pair] = taken.get(pair, 0) + 1
            if taken[pair] <= 2:
                chosen.append(i)
        starts = grid[chosen[:30]]
    results = [(*_minimise_huber(start, data, weights), start) for start in starts]
    value, p, start = min(results, key=lambda result: result[0])
    if not np.isfinite(value):
        raise FitRefused("not_converged", "no start led to a finite objective")
    if np.allclose(p, start, rtol=1e-9, atol=1e-9):
        raise FitRefused("start", f"the parameters equal a start, {start.tolist()}: nothing was fitted")
    a, b, e, alpha, beta = map(float, p)
    return _check_bounds(Surface(*(float(np.exp(x)) for x in (e, a, b)), alpha, beta, value), n, d)


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


def bootstrap(refit: Callable[[np.ndarray], Surface], runs: int, draws: int, seed: int) -> dict:
    """95 % percentile intervals of a fit over resampled runs, each draw as weights [runs] that say how often a run was
    drawn. Draws that the fit refuses are counted and left out."""
    rng = np.random.default_rng(seed)
    fitted, refused = [], 0
    for _ in range(draws):
        weights = np.bincount(rng.integers(runs, size=runs), minlength=runs).astype(float)
        try:
            fitted.append(refit(weights).as_dict())
        except FitRefused:
            refused += 1
    report: dict = {"draws": draws, "draws_refused": refused}
    if len(fitted) >= max(20, draws / 2):
        for name in ("E", "A", "B", "alpha", "beta", "a", "b"):
            values = [one[name] for one in fitted]
            report[name] = [float(x) for x in np.percentile(values, [2.5, 97.5])]
        report["sd_a"] = float(np.std([one["a"] for one in fitted], ddof=1))
    return report
