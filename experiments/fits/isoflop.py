"""IsoFLOP minima and the power laws through them (Hoffmann et al. 2022, arXiv 2203.15556, approach 2).

At every compute budget the loss is a parabola in the log of the model's size, near its minimum. The minima of several
budgets follow power laws. Intervals come from resampling runs and from leaving budgets out, whichever is wider.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from scipy.interpolate import Akima1DInterpolator
from scipy.optimize import brentq
from scipy.stats import t as student

from experiments.findings import QUANTILES, Estimate

WINDOW = np.log(4)  # half-width, in ln size, of the part of a curve that is taken for a parabola
ENOUGH = 5  # sizes within the window from which the curvature can be tested
GAP = 25  # points of a spline between two sizes
FLOORS = (0.0, 0.5, 0.75)  # fractions of the lowest loss that a prediction's interval allows to be irreducible
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

    def vertex_error(self, noise: float) -> float:
        """Standard error of the vertex, in ln size, under a relative noise of the losses, by the delta method; no more
        than that of a minimum that may lie anywhere among the sizes."""
        anywhere = float(np.ptp(self.x)) / np.sqrt(12)
        _, slope, k = self.coefficients
        if k <= 0:
            return anywhere
        gradient = np.array([0.0, -1 / (2 * k), slope / (2 * k**2)])
        variance = gradient @ np.linalg.inv(self.design.T @ self.design) @ gradient
        return float(min(noise * self.loss.mean() * np.sqrt(variance), anywhere))


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
    """A budget whose curve hardly says where its minimum lies, and the reason; how low it is can still be read.

    x: ln size of the lowest point of the parabola among the sizes around the best, which has a large standard error.
    akima_x, akima_loss: of the spline, as in Located.
    """

    budget: float
    sizes: int
    flags: tuple[str, ...]
    parabola: Parabola
    refused: str
    x: float
    akima_x: float
    akima_loss: float

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
    akima_x, akima_loss = (float(value[0]) for value in _spline_minimum(x, loss[None]))
    flat = None
    if c[2] <= 0:
        flat = f"curvature {c[2]:.3g} is not positive over the {len(u)} sizes around the best"
    elif len(u) >= ENOUGH:
        free = len(u) - 3
        variance = np.sum((y - design @ c) ** 2) / free * np.linalg.inv(design.T @ design)[2, 2]
        if c[2] < student.ppf(QUANTILES[1], free) * np.sqrt(variance):
            flat = f"curvature {c[2]:.3g} +- {np.sqrt(variance):.2g} is not distinguishable from zero"
    else:
        flags = (f"few points: {len(u)} sizes within a factor {np.exp(window):.3g} of the best",)
    if flat:
        lowest = float(_vertices(c[:, None], u - u.mean())[0] + u.mean())
        return Flat(budget, sizes, flags, parabola, flat, lowest, akima_x, akima_loss)
    vertex = u.mean() - c[1] / (2 * c[2])
    if not x[0] < vertex < x[-1]:
        refused = "edge minimum: the parabola's vertex lies outside the sizes tried"
        return NoMinimum(budget, sizes, flags, parabola, refused)
    lowest = float(c[0] - c[1] ** 2 / (4 * c[2]))
    return Located(budget, sizes, flags, parabola, float(vertex), lowest, akima_x, akima_loss)


def _vertices(coefficients: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Lowest points of parabolas [3, draws] among the sizes u."""
    _, b, c = coefficients
    with np.errstate(divide="ignore", invalid="ignore"):
        # Where a parabola opens downwards its lower end is the lowest point.
        ends = np.where(b * (u[-1] - u[0]) + c * (u[-1] ** 2 - u[0] ** 2) > 0, u[0], u[-1])
        return np.where(c > 0, np.clip(-b / (2 * c), u[0], u[-1]), ends)


def _spline_minimum(x: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place and height, each [draws], of the lowest points of Akima splines through losses [draws, sizes]."""
    fine = np.concatenate([np.linspace(a, b, GAP, endpoint=False) for a, b in pairwise(x)])
    spline = Akima1DInterpolator(x, loss.T)(fine)
    return fine[spline.argmin(0)], spline.min(0)


def vertex_errors(minima: Sequence[Located | Flat]) -> np.ndarray:
    """Standard errors of the minima in ln size [minima], from the noise that all their budgets show together."""
    squares = sum(((m.parabola.loss / m.parabola.fitted - 1) ** 2).sum() for m in minima)
    free = sum(len(m.parabola.x) - 3 for m in minima)
    noise = float(np.sqrt(squares / free)) if free else 0.0
    return np.array([m.parabola.vertex_error(noise) for m in minima])


def resample_minima(minima: Sequence[Located | Flat], draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Minima of resampled runs: (x, loss), each [draws, minima].

    The sizes of a budget are by design, so what is resampled is each run's distance from its parabola: relative
    residuals of all given budgets together, inflated by sqrt(n / (n - 3)), drawn with replacement. (Resampling whole
    runs of five or six sizes leaves three or four, and often no minimum.) With one seed, laws whose budgets have
    equally many sizes get the same places drawn, which pairs them. A draw whose vertex leaves the window is taken at
    the window's edge.
    """
    x, loss = np.empty((draws, len(minima))), np.empty((draws, len(minima)))
    for i, (m, y) in enumerate(zip(minima, _resampled(minima, draws, seed), strict=True)):
        middle = m.parabola.x.mean()
        u = m.parabola.x - middle
        a, b, c = coefficients = np.linalg.pinv(m.parabola.design) @ y.T
        vertex = _vertices(coefficients, u)
        x[:, i] = vertex + middle
        loss[:, i] = a + b * vertex + c * vertex**2
    return x, loss


def resample_splines(minima: Sequence[Located | Flat], draws: int, seed: int) -> np.ndarray:
    """ln sizes of the splines' minima [draws, minima] for the same resampled runs as those of `resample_minima`."""
    x = np.empty((draws, len(minima)))
    for i, (m, y) in enumerate(zip(minima, _resampled(minima, draws, seed), strict=True)):
        drawn, _ = _spline_minimum(m.parabola.x, np.vstack([m.parabola.fitted, y]))
        x[:, i] = m.akima_x + drawn[1:] - drawn[0]
    return x


def _resampled(minima: Sequence[Located | Flat], draws: int, seed: int) -> Iterator[np.ndarray]:
    """Losses [draws, sizes] of each minimum in turn."""
    rng = np.random.default_rng(seed)
    residuals = []
    for m in minima:
        fitted = m.parabola.fitted
        n = len(fitted)
        residuals.append((m.parabola.loss / fitted - 1) * (np.sqrt(n / (n - 3)) if n > 3 else 1.0))
    pool = np.concatenate([r for r in residuals if len(r) > 3] or residuals)
    for m in minima:
        yield m.parabola.fitted * (1 + rng.choice(pool, (draws, len(m.parabola.x))))


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
    wider. Without three budgets there is no jackknife that means anything, and the draws stand alone. Without draws
    there is no interval: its ends are nan."""
    if not len(draws):
        return Estimate(value, np.nan, np.nan)
    drawn, k = Estimate.of_draws(value, draws), len(left_out)
    if k >= 3:
        error = np.sqrt((k - 1) / k * np.sum((left_out - left_out.mean()) ** 2))
        half = student.ppf(QUANTILES[1], k - 1) * error
        if 2 * half > drawn.high - drawn.low:
            return Estimate(value, float(value - half), float(value + half))
    return drawn


def line_weights(flops: np.ndarray, log_y: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """1 / (error^2 + scatter^2) [budgets] for a line through ln y with standard errors [budgets]: the scatter is what
    the distances from the line show beyond the errors, such that the weighted squares sum to the degrees of freedom
    (Paule and Mandel 1982)."""
    centred = np.log(flops) - np.log(flops).mean()
    design, free = np.stack([np.ones_like(centred), centred], axis=1), len(flops) - 2

    def excess(scatter: float) -> float:
        root = 1 / np.sqrt(errors**2 + scatter)
        line, *_ = np.linalg.lstsq(design * root[:, None], log_y * root, rcond=None)
        return float((((log_y - design @ line) * root) ** 2).sum()) - free

    least = 1e-6 * max(float(errors.max()), 1e-6) ** 2  # of errors that are all zero, none is to weigh infinitely
    most = float(np.var(log_y)) * len(log_y) + least
    if free < 1 or excess(least) <= 0:
        return 1 / (errors**2 + least)
    return 1 / (errors**2 + brentq(excess, least, most))


def fit_line(
    flops: np.ndarray,
    log_y: np.ndarray,
    draws_log_y: np.ndarray,
    centre: float | None = None,
    weights: np.ndarray | float = 1.0,
) -> Line:
    """Least squares of ln y [budgets] on ln C, for the estimate, for each draw [draws, budgets], and leaving each
    budget out in turn. `centre` is the ln C that the intercept is given at; the budgets' mean where None."""
    log_c = np.log(flops)
    centre = float(log_c.mean()) if centre is None else centre
    root = np.sqrt(weights * np.ones_like(log_c))
    design = np.stack([np.ones_like(log_c), log_c - centre], axis=1) * root[:, None]
    solve = np.linalg.pinv(design) * root
    intercept, slope = solve @ log_y
    keep = [np.arange(len(log_c)) != i for i in range(len(log_c))] if len(log_c) >= 3 else []
    left_out = np.array([np.linalg.pinv(design[rows]) @ (root * log_y)[rows] for rows in keep]).reshape(-1, 2)
    return Line(centre, float(intercept), float(slope), len(log_c), draws_log_y @ solve.T, left_out)


def extrapolate(flops: np.ndarray, loss: np.ndarray, draws_loss: np.ndarray, log_flops: float) -> Estimate:
    """The lowest loss at some compute by the power law through at least three minima [budgets] and their draws [draws,
    budgets], with a 95 % prediction interval: the hull of laws with several irreducible losses, each with the scatter
    of the minima about it.

    Few budgets cannot tell these laws apart, and a pure power law alone promises too much: on the curves of Porian et
    al. (arXiv 2406.19146) four budgets over a factor 8 hold the loss at 4 times the largest in 89 % of cases by the
    power law's own interval, and in all 64 by this one."""
    laws = []
    for floor in (fraction * loss.min() for fraction in FLOORS):
        law = fit_line(flops, np.log(loss - floor), np.log(np.maximum(draws_loss - floor, 1e-3 * loss.min())))
        residual = np.log(loss - floor) - [law.at(log_c) for log_c in np.log(flops)]
        scatter = np.sqrt((residual**2).sum() / (len(loss) - 2))
        noise = np.random.default_rng(0).normal(0, scatter, len(law.draws))
        above = law.estimate_at(log_flops, noise).map(np.exp)
        laws.append(Estimate(floor + above.value, floor + above.low, floor + above.high))
    return Estimate(laws[0].value, min(law.low for law in laws), max(law.high for law in laws))


def fit_saturating(flops: np.ndarray, loss: np.ndarray, g_max: float = 2.0) -> tuple[np.ndarray, ...]:
    """(E, K, g), each [...], of loss [..., budgets] = E + K (C / C0)^-g, C0 the budgets' geometric mean: E and K >= 0
    solved for, g searched on a grid that is made ever finer."""
    z = np.log(flops) - np.log(flops).mean()

    def solve(g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Squares, E and K for g [..., tried]."""
        basis, y = np.exp(-g[..., None] * z), loss[..., None, :]
        centred, mean = basis - basis.mean(-1, keepdims=True), y.mean(-1)
        k = (centred * y).sum(-1) / (centred**2).sum(-1)
        e = mean - k * basis.mean(-1)
        none = e < 0
        e, k = np.where(none, 0.0, e), np.where(none, (basis * y).sum(-1) / (basis**2).sum(-1), k)
        return ((y - e[..., None] - k[..., None] * basis) ** 2).sum(-1), e, k

    low, high = np.full(loss.shape[:-1], np.log(1e-3)), np.full(loss.shape[:-1], np.log(g_max))
    steps, tried = np.linspace(0, 1, 41), np.zeros(())
    best = np.zeros(loss.shape[:-1], int)
    for _ in range(6):
        tried = low[..., None] + (high - low)[..., None] * steps
        best = solve(np.exp(tried))[0].argmin(-1)
        around = [np.take_along_axis(tried, np.clip(best + i, 0, 40)[..., None], -1)[..., 0] for i in (-1, 1)]
        low, high = around
    g = np.exp(np.take_along_axis(tried, best[..., None], -1))
    _, e, k = solve(g)
    return e[..., 0], k[..., 0], g[..., 0]
