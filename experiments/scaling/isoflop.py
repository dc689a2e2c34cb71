"""IsoFLOP minima and the power laws through them (Hoffmann et al. 2022, arXiv 2203.15556, approach 2).

At every compute budget the loss is a parabola in the log of the model's size, near its minimum. The minima of several
budgets follow power laws. Intervals come from resampling runs and from leaving budgets out, whichever is wider.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from scipy.interpolate import Akima1DInterpolator
from scipy.optimize import minimize_scalar
from scipy.stats import t as student

from experiments.findings import QUANTILES, Estimate

WINDOW = np.log(4)  # half-width, in ln size, of the part of a curve that is taken for a parabola
ENOUGH = 5  # sizes within the window from which the curvature can be tested
SAME_SIZE = 0.01  # sizes nearer than this in ln size are replicates (seeds) of one size


@dataclass(frozen=True, eq=False)
class Parabola:
    """Least squares of a budget's loss on 1, u and u^2, with u = ln size - its mean over the sizes around the best."""

    x: np.ndarray  # ln size [sizes]
    loss: np.ndarray  # [sizes]
    coefficients: np.ndarray  # of 1, u, u^2

    @property
    def design(self) -> np.ndarray:
        """[sizes, 3]: 1, u, u^2."""
        return np.vander(self.x - self.x.mean(), 3, increasing=True)

    @property
    def fitted(self) -> np.ndarray:
        """The parabola's loss at the sizes [sizes]."""
        return self.design @ self.coefficients

    @property
    def curvature(self) -> float:
        """k of loss + k (ln size - x)^2."""
        return float(self.coefficients[2])


@dataclass(frozen=True)
class Located:
    """A budget whose minimum is known: the parabola's vertex, and as a cross-check that of an Akima spline.

    sizes: how many were tried. x, akima_x: ln size. flags: what to be wary of.
    """

    budget: float
    sizes: int
    flags: tuple[str, ...]
    parabola: Parabola
    x: float
    loss: float
    akima_x: float
    akima_loss: float


@dataclass(frozen=True)
class Flat:
    """A budget whose curve does not say where its minimum lies, and the reason; how low it is can still be read."""

    budget: float
    sizes: int
    flags: tuple[str, ...]
    parabola: Parabola
    refused: str

    @property
    def loss(self) -> float:
        """The lowest point of the parabola among the sizes."""
        return float(self.parabola.fitted.min())


@dataclass(frozen=True)
class NoMinimum:
    """A budget without a minimum among the sizes tried, and the reason. `parabola` is None where none was fitted."""

    budget: float
    sizes: int
    flags: tuple[str, ...]
    parabola: Parabola | None
    refused: str


Curve = Located | Flat | NoMinimum  # what the runs of one budget say


def merge_replicates(x: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of runs whose sizes agree within 1 %, in the order of size."""
    order = np.argsort(x, kind="stable")
    x, loss = np.asarray(x, float)[order], np.asarray(loss, float)[order]
    group = np.cumsum(np.diff(x, prepend=x[:1]) > SAME_SIZE)
    count = np.bincount(group)
    return np.bincount(group, x) / count, np.bincount(group, loss) / count


def find_minimum(budget: float, x: np.ndarray, loss: np.ndarray, window: float = WINDOW) -> Curve:
    """Vertex of a parabola within +-`window` of the best size, with an Akima spline as a cross-check. x: ln size.

    There is none with fewer than three sizes and none with a best size or a vertex at the edge of the sizes tried. The
    curve is flat where its curvature is not positive or (from five sizes on) not above zero with 95 % confidence.
    """
    x, loss = merge_replicates(x, loss)
    sizes, flags = len(x), ()
    if sizes < 3:
        return NoMinimum(budget, sizes, flags, None, f"too few points: {sizes} sizes, at least 3 are needed")
    best = int(np.argmin(loss))
    if best in (0, sizes - 1):
        end = "smallest" if best == 0 else "largest"
        return NoMinimum(budget, sizes, flags, None, f"edge minimum: the best of {sizes} sizes is the {end}")
    near = np.abs(x - x[best]) <= window + 1e-9  # a grid point that lies on it, in any unit
    near[best - 1 : best + 2] = True  # the neighbours belong to it however sparse the grid
    u, y = x[near], loss[near]
    design = np.vander(u - u.mean(), 3, increasing=True)
    c = np.linalg.lstsq(design, y, rcond=None)[0]
    parabola = Parabola(u, y, c)
    if c[2] <= 0:
        refused = f"curvature {c[2]:.3g} is not positive over the {len(u)} sizes around the best"
        return Flat(budget, sizes, flags, parabola, refused)
    if len(u) >= ENOUGH:
        free = len(u) - 3
        variance = np.sum((y - design @ c) ** 2) / free * np.linalg.inv(design.T @ design)[2, 2]
        if c[2] < student.ppf(QUANTILES[1], free) * np.sqrt(variance):
            refused = f"curvature {c[2]:.3g} +- {np.sqrt(variance):.2g} is not distinguishable from zero"
            return Flat(budget, sizes, flags, parabola, refused)
    else:
        flags = (f"few points: {len(u)} sizes within a factor {np.exp(window):.3g} of the best",)
    vertex = u.mean() - c[1] / (2 * c[2])
    if not x[0] < vertex < x[-1]:
        refused = "edge minimum: the parabola's vertex lies outside the sizes tried"
        return NoMinimum(budget, sizes, flags, parabola, refused)
    fine = np.concatenate([np.linspace(a, b, 25, endpoint=False) for a, b in pairwise(x)])
    spline = Akima1DInterpolator(x, loss)(fine)
    return Located(
        budget, sizes, flags, parabola,
        x=float(vertex), loss=float(c[0] - c[1] ** 2 / (4 * c[2])),
        akima_x=float(fine[spline.argmin()]), akima_loss=float(spline.min()),
    )  # fmt: skip


def resample_minima(minima: Sequence[Located | Flat], draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
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
        fitted = m.parabola.fitted
        n = len(fitted)
        residuals.append((m.parabola.loss / fitted - 1) * (np.sqrt(n / (n - 3)) if n > 3 else 1.0))
    pool = np.concatenate([r for r in residuals if len(r) > 3] or residuals)
    x, loss = np.empty((draws, len(minima))), np.empty((draws, len(minima)))
    for i, m in enumerate(minima):
        middle, design = m.parabola.x.mean(), m.parabola.design
        u = m.parabola.x - middle
        y = m.parabola.fitted * (1 + rng.choice(pool, (draws, len(u))))
        a, b, c = np.linalg.pinv(design) @ y.T
        with np.errstate(divide="ignore", invalid="ignore"):
            vertex = np.where(c > 0, np.clip(-b / (2 * c), u[0], u[-1]), np.where(b > 0, u[0], u[-1]))
        x[:, i] = vertex + middle
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

    def estimate_at(self, log_flops: float, noise: np.ndarray | float = 0.0) -> Estimate:
        """ln y at some compute; `noise` [n] is added to the draws, for a prediction."""
        basis = np.array([1.0, log_flops - self.centre])
        return estimate(self.at(log_flops), self.draws @ basis + noise, self.left_out @ basis)

    def estimate_slope(self) -> Estimate:
        """The slope with its interval."""
        return estimate(self.slope, self.draws[:, 1], self.left_out[:, 1])


def estimate(value: float, draws: np.ndarray, left_out: np.ndarray) -> Estimate:
    """`value` with percentiles of the draws, or +- t(K-1) standard errors of a jackknife over K budgets, whichever is
    wider. Without three budgets there is no jackknife that means anything, and the draws stand alone."""
    low, high = np.quantile(draws, QUANTILES)
    k = len(left_out)
    if k >= 3:
        error = np.sqrt((k - 1) / k * np.sum((left_out - left_out.mean()) ** 2))
        half = student.ppf(QUANTILES[1], k - 1) * error
        if 2 * half > high - low:
            return Estimate(value, float(value - half), float(value + half))
    # The draws are moved to the estimate's place only as far as needed for the interval to contain it.
    return Estimate(value, float(min(low, value)), float(max(high, value)))


def fit_line(flops: np.ndarray, log_y: np.ndarray, draws_log_y: np.ndarray, centre: float | None = None) -> Line:
    """Least squares of ln y [budgets] on ln C, for the estimate, for each draw [draws, budgets], and leaving each
    budget out in turn. `centre` is the ln C that the intercept is given at; the budgets' mean where None."""
    log_c = np.log(flops)
    centre = float(log_c.mean()) if centre is None else centre
    design = np.stack([np.ones_like(log_c), log_c - centre], axis=1)
    solve = np.linalg.pinv(design)
    intercept, slope = solve @ log_y
    keep = [np.arange(len(log_c)) != i for i in range(len(log_c))] if len(log_c) >= 3 else []
    left_out = np.array([np.linalg.pinv(design[rows]) @ log_y[rows] for rows in keep]).reshape(-1, 2)
    return Line(centre, float(intercept), float(slope), len(log_c), draws_log_y @ solve.T, left_out)


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
