"""IsoFLOP minima and the power laws through them (Hoffmann et al. 2022, arXiv 2203.15556, approach 2).

At every compute budget the loss is a parabola in the log of the model's size, near its minimum. The minima of several
budgets follow power laws. Intervals come from resampling runs and from leaving budgets out, whichever is wider.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from scipy.interpolate import Akima1DInterpolator
from scipy.optimize import minimize_scalar
from scipy.stats import t as student

WINDOW = np.log(4)  # half-width, in ln size, of the part of a curve that is taken for a parabola
ENOUGH = 5  # sizes within the window from which the curvature can be tested
SAME_SIZE = 0.01  # sizes nearer than this in ln size are replicates (seeds) of one size


@dataclass
class Minimum:
    """The lowest loss of one budget. `x` is the natural log of the size; a refused minimum has a reason, no value."""

    budget: float
    sizes: int
    x: float = np.nan
    loss: float = np.nan
    curvature: float = np.nan  # k of loss + k (ln size - x)^2
    akima_x: float = np.nan
    akima_loss: float = np.nan
    window_sizes: int = 0
    refused: str | None = None
    flags: list[str] = field(default_factory=list)
    window_x: np.ndarray | None = field(default=None, repr=False)
    window_loss: np.ndarray | None = field(default=None, repr=False)
    coefficients: np.ndarray | None = field(default=None, repr=False)  # of 1, x, x^2 about window_x.mean()


def merge_replicates(x: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of runs whose sizes agree within 1 %, in the order of size."""
    order = np.argsort(x, kind="stable")
    x, loss = np.asarray(x, float)[order], np.asarray(loss, float)[order]
    group = np.cumsum(np.diff(x, prepend=x[:1]) > SAME_SIZE)
    count = np.bincount(group)
    return np.bincount(group, x) / count, np.bincount(group, loss) / count


def find_minimum(budget: float, x: np.ndarray, loss: np.ndarray, window: float = WINDOW) -> Minimum:
    """Vertex of a parabola within +-`window` of the best size, with an Akima spline as a cross-check.

    Refused, with the reason: fewer than three sizes, a best size or a vertex at the edge of the sizes tried, a
    curvature that is not positive, or (from five sizes on) not above zero with 95 % confidence.
    """
    x, loss = merge_replicates(x, loss)
    result = Minimum(budget, len(x))
    if len(x) < 3:
        result.refused = f"too few points: {len(x)} sizes, at least 3 are needed"
        return result
    best = int(np.argmin(loss))
    if best in (0, len(x) - 1):
        end = "smallest" if best == 0 else "largest"
        result.refused = f"edge minimum: the best of {len(x)} sizes is the {end}"
        return result
    near = np.abs(x - x[best]) <= window + 1e-9  # a grid point that lies on it, in any unit
    near[best - 1 : best + 2] = True  # the neighbours belong to it however sparse the grid
    u, y = x[near], loss[near]
    result.window_sizes, result.window_x, result.window_loss = len(u), u, y
    design = np.vander(u - u.mean(), 3, increasing=True)
    c = result.coefficients = np.linalg.lstsq(design, y, rcond=None)[0]
    result.curvature = c[2]
    if c[2] <= 0:
        result.refused = f"curvature {c[2]:.3g} is not positive over the {len(u)} sizes around the best"
        return result
    if len(u) >= ENOUGH:
        free = len(u) - 3
        variance = np.sum((y - design @ c) ** 2) / free * np.linalg.inv(design.T @ design)[2, 2]
        if c[2] < student.ppf(0.975, free) * np.sqrt(variance):
            result.refused = f"curvature {c[2]:.3g} +- {np.sqrt(variance):.2g} is not distinguishable from zero"
            return result
    else:
        result.flags.append(f"few points: {len(u)} sizes within a factor {np.exp(window):.3g} of the best")
    vertex = u.mean() - c[1] / (2 * c[2])
    if not x[0] < vertex < x[-1]:
        result.refused = "edge minimum: the parabola's vertex lies outside the sizes tried"
        return result
    result.x, result.loss = float(vertex), float(c[0] - c[1] ** 2 / (4 * c[2]))
    fine = np.concatenate([np.linspace(a, b, 25, endpoint=False) for a, b in pairwise(x)])
    spline = Akima1DInterpolator(x, loss)(fine)
    result.akima_x, result.akima_loss = float(fine[spline.argmin()]), float(spline.min())
    return result


def resample_minima(minima: list[Minimum], draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Minima of resampled runs: (x, loss), each [draws, minima].

    The sizes of a budget are by design, so what is resampled is each run's distance from its parabola: relative
    residuals of all given budgets together, inflated by sqrt(n / (n - 3)), drawn with replacement. (Resampling whole
    runs of five or six sizes leaves three or four, and often no minimum.) With one seed, laws whose budgets have
    equally many sizes get the same places drawn, which pairs them. A draw whose vertex leaves the window is taken at
    the window's edge.
    """
    rng = np.random.default_rng(seed)
    residuals = []
    for m in minima:
        fitted = np.vander(m.window_x - m.window_x.mean(), 3, increasing=True) @ m.coefficients
        n = len(fitted)
        residuals.append((m.window_loss / fitted - 1) * (np.sqrt(n / (n - 3)) if n > 3 else 1.0))
    pool = np.concatenate([r for r in residuals if len(r) > 3] or residuals)
    x, loss = np.empty((draws, len(minima))), np.empty((draws, len(minima)))
    for i, m in enumerate(minima):
        u = m.window_x - m.window_x.mean()
        design = np.vander(u, 3, increasing=True)
        y = design @ m.coefficients * (1 + rng.choice(pool, (draws, len(u))))
        a, b, c = np.linalg.pinv(design) @ y.T
        with np.errstate(divide="ignore", invalid="ignore"):
            vertex = np.where(c > 0, np.clip(-b / (2 * c), u[0], u[-1]), np.where(b > 0, u[0], u[-1]))
        x[:, i] = vertex + m.window_x.mean()
        loss[:, i] = a + b * vertex + c * vertex**2
    return x, loss


@dataclass(frozen=True)
class Line:
    """ln y = intercept + slope (ln C - centre), with the draws that its intervals come from.

    draws: [n, 2] of (intercept, slope) from resampled runs. left_out: [budgets, 2], each without one budget.
    """

    centre: float
    intercept: float
    slope: float
    budgets: int
    draws: np.ndarray = field(repr=False)
    left_out: np.ndarray = field(repr=False)

    def at(self, log_flops: float) -> float:
        return self.intercept + self.slope * (log_flops - self.centre)

    def interval_at(self, log_flops: float, extra: np.ndarray | float = 0.0) -> tuple[float, float]:
        """95 % interval of ln y at a compute; `extra` [draws] is noise to be added, for a prediction."""
        basis = np.array([1.0, log_flops - self.centre])
        return interval(self.at(log_flops), self.draws @ basis + extra, self.left_out @ basis)

    def slope_interval(self) -> tuple[float, float]:
        return interval(self.slope, self.draws[:, 1], self.left_out[:, 1])


def interval(value: float, draws: np.ndarray, left_out: np.ndarray) -> tuple[float, float]:
    """95 % interval: percentiles of the draws, or value +- t(K-1) standard errors of a jackknife over K budgets,
    whichever is wider. Without three budgets there is no jackknife that means anything, and the draws stand alone."""
    low, high = np.percentile(draws, [2.5, 97.5])
    k = len(left_out)
    if k >= 3:
        error = np.sqrt((k - 1) / k * np.sum((left_out - left_out.mean()) ** 2))
        half = student.ppf(0.975, k - 1) * error
        if 2 * half > high - low:
            return float(value - half), float(value + half)
    # The draws are moved to the estimate's place only as far as needed for the interval to contain it.
    return float(min(low, value)), float(max(high, value))


def fit_line(flops: np.ndarray, log_y: np.ndarray, draws_log_y: np.ndarray, centre: float | None = None) -> Line:
    """Least squares of ln y [budgets] on ln C, for the estimate, for each draw [draws, budgets], and leaving each
    budget out in turn. `centre` is the ln C that the intercept is given at; the budgets' mean where None."""
    log_c = np.log(flops)
    centre = float(log_c.mean()) if centre is None else centre
    design = np.stack([np.ones_like(log_c), log_c - centre], axis=1)
    solve = np.linalg.pinv(design)
    estimate = solve @ log_y
    keep = [np.arange(len(log_c)) != i for i in range(len(log_c))] if len(log_c) >= 3 else []
    left_out = np.array([np.linalg.pinv(design[rows]) @ log_y[rows] for rows in keep]).reshape(-1, 2)
    return Line(centre, float(estimate[0]), float(estimate[1]), len(log_c), draws_log_y @ solve.T, left_out)


def fit_saturating(flops: np.ndarray, loss: np.ndarray, g_max: float = 2.0) -> tuple[float, float, float]:
    """(E, K, g) of loss = E + K (C / C0)^-g, C0 the budgets' geometric mean: E and K >= 0 solved for, g searched."""
    z = np.log(flops) - np.log(flops).mean()

    def solve(g: float) -> tuple[float, float, float]:
        design = np.stack([np.ones_like(z), np.exp(-g * z)], axis=1)
        (e, k), *_ = np.linalg.lstsq(design, loss, rcond=None)
        if e < 0:
            e, k = 0.0, float(design[:, 1] @ loss / (design[:, 1] @ design[:, 1]))
        return float(np.sum((loss - e - k * design[:, 1]) ** 2)), float(e), float(k)

    grid = np.geomspace(1e-3, g_max, 60)
    best = int(np.argmin([solve(g)[0] for g in grid]))
    bounds = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    g = float(minimize_scalar(lambda g: solve(g)[0], bounds=bounds, method="bounded", options={"xatol": 1e-10}).x)
    return (*solve(g)[1:], g)
