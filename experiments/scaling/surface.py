"""One surface through the runs of all arms, with what the arms share chosen.

L_i = E + ((A_i / M^alpha)^(1 / gamma) + (B_i / D^beta)^(1 / gamma))^gamma

The form is that of Busbridge et al. 2025 (arXiv 2502.08606), whose exponents are alpha / gamma and beta / gamma. With
gamma = 1 it is that of Hoffmann et al. 2022 (arXiv 2203.15556, eq. 2), with E = 0 that of Kaplan et al. 2020 (arXiv
2001.08361, eq. 1.5). Written this way alpha and beta are the exponents that are seen where size or data alone limits
the loss, whatever gamma is. Gamma says how soon one takes over from the other: the smaller, the more steeply losses of
one budget rise to both sides of the optimum. Neither the optimum's exponents nor the frontier's depend on it. M is a
run's training FLOPs per token over six, so that C = 6 M D holds exactly for every architecture, and the frontier L*(C)
is one of counted FLOPs. Errors are those of ln L.

Shape letters: S problems (starts or draws), R runs, P parameters, K arms.
"""

from dataclasses import dataclass, replace

import numpy as np

from experiments.fits.forms import EXPONENTS, STARTS, summed
from experiments.fits.least_squares import Solutions, levenberg_marquardt

LEAST = 4  # runs of an arm
SAME_BUDGET = 0.3  # in ln C: runs of one budget lie no further apart
BENDS = (0.1, 1.5)  # gammas: nearly the larger of two power laws, and flatter than their sum
NO_FLOOR = 1e-3  # of the lowest loss: a floor down there is none
ROBUST = 1.345  # standard deviations from which a residual counts by its size and not its square (Huber, 1964)
CLIPPED = 2.0  # standard deviations to which a residual is cut where the spread is found
SHRINKAGE = 0.9205  # mean of the square of a normal variable that is cut so
KNOWN = 0.885  # efficiency of that estimate of the variance for normal errors
NEAR = 1e-8  # relative fall of the objective below which a draw is solved
ROUNDS = 4  # of the fit and its scale, each from the other


@dataclass(frozen=True, eq=False)
class Runs:
    """Finished runs as the surface sees them, all [R].

    arm: its number. size: ln of FLOPs per token over six. data: ln tokens. loss: ln of the loss. cell: runs of equal
    number share place, seed and order of the data across arms.
    """

    arm: np.ndarray
    size: np.ndarray
    data: np.ndarray
    loss: np.ndarray
    cell: np.ndarray

    def __len__(self) -> int:
        return len(self.arm)

    @property
    def log_flops(self) -> np.ndarray:
        """ln C [R]."""
        return self.size + self.data + np.log(6)

    @property
    def in_largest_budget(self) -> np.ndarray:
        """True for runs of the largest budget [R]."""
        return self.log_flops > self.log_flops.max() - SAME_BUDGET

    def where(self, keep: np.ndarray) -> "Runs":
        """Returns those that `keep` [R] selects."""
        return Runs(**{name: values[keep] for name, values in vars(self).items()})

    def joined(self, others: "Runs") -> "Runs":
        """Returns these and the others."""
        return Runs(**{name: np.concatenate([values, getattr(others, name)]) for name, values in vars(self).items()})


@dataclass(frozen=True)
class Form:
    """Constants that arms share: for each arm the number of its floor, its exponents and its gamma; without bends gamma
    is 1. tied: alpha = beta (Gadre et al., arXiv 2403.08540). floored: without, E = 0."""

    floors: tuple[int, ...]
    exponents: tuple[int, ...]
    bends: tuple[int, ...] = ()
    tied: bool = False
    floored: bool = True

    @property
    def parameters(self) -> int:
        """The number of those that are free."""
        exponents = 1 + max(self.exponents)
        shared = self.floored * (1 + max(self.floors)) + 1 + max(self.bends, default=-1)
        return shared + (1 if self.tied else 2) * exponents + 2 * len(self.floors)


@dataclass(frozen=True, eq=False)
class Surface:
    """The constants of S surfaces over K arms, each [S, K], with size and data measured from `origin` in ln.

    E is in the loss's unit, a and b are ln of A and B at the origin. alpha and beta are exponents of L - E where size
    or data alone limits it; in (A' / M^alpha' + B' / D^beta')^gamma they are gamma alpha' and gamma beta'.
    """

    origin: tuple[float, float]
    E: np.ndarray
    a: np.ndarray
    b: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray
    gamma: np.ndarray

    @property
    def constants(self) -> tuple[np.ndarray, ...]:
        """E, a, b, alpha, beta and gamma, each [S, K]."""
        return self.E, self.a, self.b, self.alpha, self.beta, self.gamma

    def loss(self, arm: int, size: np.ndarray, data: np.ndarray) -> np.ndarray:
        """L at ln size and ln data [...] of each surface, [S, ...]."""
        return self.at(arm, np.asarray(size)[None], np.asarray(data)[None])

    def at(self, arm: int, size: np.ndarray, data: np.ndarray) -> np.ndarray:
        """L of each surface at its own ln size and ln data, all [S, ...] or what can be made so."""
        size, data = size - self.origin[0], data - self.origin[1]
        shape = (-1, *(1,) * (size.ndim - 1))
        e, a, b, alpha, beta, gamma = (x[:, arm].reshape(shape) for x in self.constants)
        return e + np.exp(gamma * np.logaddexp((a - alpha * size) / gamma, (b - beta * data) / gamma))

    def optimum(self, arm: int, log_flops: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """ln size and ln data [S] of the lowest loss at C."""
        budget = log_flops - np.log(6) - sum(self.origin)
        _, a, b, alpha, beta, gamma = (x[:, arm] for x in self.constants)
        size = (gamma * np.log(alpha / beta) + a - b + beta * budget) / (alpha + beta)
        return size + self.origin[0], budget - size + self.origin[1]

    def frontier(self, arm: int, log_flops: float) -> np.ndarray:
        """The lowest loss at C [S]."""
        return self.at(arm, *self.optimum(arm, log_flops))

    def flops_for(self, arm: int, loss: np.ndarray) -> np.ndarray:
        """ln of the compute at which an arm's frontier comes down to a loss [S]; infinite at or below its floor."""
        e, a, b, alpha, beta, gamma = (x[:, arm] for x in self.constants)
        at_origin = (gamma * np.log(alpha / beta) + a - b) / (alpha + beta)
        above = gamma * np.logaddexp((a - alpha * at_origin) / gamma, (b + beta * at_origin) / gamma)
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = np.log(np.fmax(loss - e, 0.0))
        return (above - distance) * (alpha + beta) / (alpha * beta) + sum(self.origin) + np.log(6)

    def log_multiplier(self, arm: int, reference: int, log_flops: float) -> np.ndarray:
        """ln of the compute that the reference needs for the arm's loss at C, over C [S]."""
        return self.flops_for(reference, self.frontier(arm, log_flops)) - log_flops

    def trend(self, arm: int, reference: int, first: float, last: float) -> np.ndarray:
        """Slope of ln(multiplier) in ln C between two ln C [S]; nan where the frontiers do not meet at both."""
        with np.errstate(invalid="ignore"):
            rise = self.log_multiplier(arm, reference, last) - self.log_multiplier(arm, reference, first)
        return rise / (last - first)

    def size_exponent(self, arm: int) -> np.ndarray:
        """Exponent of the optimal FLOPs per token in compute [S]."""
        return self.beta[:, arm] / (self.alpha[:, arm] + self.beta[:, arm])

    def shifted(self, log_factor: np.ndarray) -> "Surface":
        """Returns the surfaces whose losses are multiplied by exp(log_factor) [S, K]."""
        return replace(self, E=self.E * np.exp(log_factor), a=self.a + log_factor, b=self.b + log_factor)


class Parametrisation:
    """A form as a model of runs: parameters [S, P] to ln L and its Jacobian.

    The parameters are ln E of each floor, alpha and beta of each group of exponents, ln of each gamma, a and b of each
    arm.
    """

    def __init__(self, form: Form, runs: Runs):
        self.form, self.runs = form, runs
        self.origin = float(runs.size.mean()), float(runs.data.mean())
        floors, groups, arms = 1 + max(form.floors), 1 + max(form.exponents), len(form.floors)
        self.e = np.array(form.floors)
        self.alpha = floors + np.array(form.exponents)
        self.beta = self.alpha if form.tied else self.alpha + groups
        bends = floors + (1 if form.tied else 2) * groups
        self.gamma = bends + np.array(form.bends or arms * (0,))
        first = 1 + self.gamma.max()
        self.a, self.b = first + np.arange(arms), first + arms + np.arange(arms)
        self.count = int(first + 2 * arms)
        lowest = np.exp(runs.loss.min())
        self.lower, self.upper = np.full(self.count, -30.0), np.full(self.count, 15.0)
        self.lower[:floors] = np.log(NO_FLOOR * lowest)
        self.upper[:floors] = np.log(0.999 * lowest) if form.floored else self.lower[:floors]
        self.lower[floors:bends], self.upper[floors:bends] = EXPONENTS
        self.lower[bends:first], self.upper[bends:first] = np.log(BENDS) if form.bends else (0.0, 0.0)

    def __call__(self, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        arm, runs = self.runs.arm, self.runs
        size, data = runs.size - self.origin[0], runs.data - self.origin[1]
        e, a, b = (parameters[:, index[arm]] for index in (self.e, self.a, self.b))
        gamma = np.exp(parameters[:, self.gamma[arm]])
        logs = np.stack([a - parameters[:, self.alpha[arm]] * size, b - parameters[:, self.beta[arm]] * data]) / gamma
        shares, total = summed(logs.copy())
        bend = gamma * (total - (shares * logs).sum(0))
        (_, reducible), values = summed(np.stack([e, gamma * total]))
        jacobian, row = np.zeros((*values.shape, self.count)), np.arange(len(arm))
        for index, derivative in (
            (self.e, 1 - reducible),
            (self.alpha, -reducible * shares[0] * size),
            (self.beta, -reducible * shares[1] * data),
            (self.gamma, reducible * bend),
            (self.a, reducible * shares[0]),
            (self.b, reducible * shares[1]),
        ):
            jacobian[:, row, index[arm]] += derivative
        return values, jacobian

    def starts(self) -> np.ndarray:
        """[S, P]: three floors, three exponents of each kind, two gammas where they are free; at the origin the rest of
        each arm's mean loss, for which size and data do as much."""
        runs, arms = self.runs, range(len(self.form.floors))
        lowest, means = np.exp(runs.loss.min()), [np.exp(runs.loss[runs.arm == arm].mean()) for arm in arms]
        places = [(*place, gamma) for place in STARTS for gamma in ((1.0, 0.4) if self.form.bends else (1.0,))]
        starts = np.zeros((len(places), self.count))
        for start, (fraction, alpha, beta, gamma) in zip(starts, places, strict=True):
            start[self.e], start[self.alpha], start[self.beta] = np.log(fraction * lowest), alpha, beta
            start[self.gamma] = np.log(gamma)
            start[self.a] = start[self.b] = np.log(np.array(means) - fraction * lowest) - gamma * np.log(2)
        return starts

    def surface(self, parameters: np.ndarray) -> Surface:
        """The constants of parameters [S, P]."""
        e, a, b, alpha, beta, gamma = (
            parameters[:, index] for index in (self.e, self.a, self.b, self.alpha, self.beta, self.gamma)
        )
        return Surface(self.origin, np.exp(e), a, b, alpha, beta, np.exp(gamma))


@dataclass(frozen=True, eq=False)
class Fit:
    """The surface of lowest error, and how far runs lie from it.

    parameters: [P]. residual: ln L - ln of the surface [R]. spread: standard deviation of each arm's runs about it [K],
    robust and for the parameters used. correlation: of residuals of one cell in different arms. misfit: of residuals of
    one size and length in an arm, which differ by their seed alone, so that more seeds do not make this part smaller.
    """

    model: Parametrisation
    parameters: np.ndarray
    residual: np.ndarray
    spread: np.ndarray
    correlation: float
    misfit: float

    @property
    def freedom(self) -> int:
        """Runs less parameters."""
        return len(self.model.runs) - self.model.form.parameters

    @property
    def no_floor(self) -> np.ndarray:
        """For each arm whether its floor ended at nothing [K]."""
        return self.parameters[self.model.e] <= self.model.lower[self.model.e] + 0.1

    @property
    def surface(self) -> Surface:
        """Returns it as one of S = 1."""
        return self.model.surface(self.parameters[None])

    def refit(self, loss: np.ndarray) -> Surface:
        """Surfaces of other losses of the same runs, ln L [S, R], each begun at this one."""
        return self.model.surface(_solve(self.model, self.parameters, loss, self.spread, NEAR).parameters)

    def draws(self, count: int, seed: int, shift: np.ndarray | float = 0.0) -> Surface:
        """Surfaces of `count` sets of runs that could have been: the surface's losses with normal errors of the spread
        found, correlated as found. The spread itself is drawn as nu / chi^2_nu, for what few runs do not know of it.
        shift [count, R] is added to ln L."""
        rng, runs = np.random.default_rng(seed), self.model.runs
        places = _places(runs)
        error = np.sqrt(max(0.0, 1 - self.correlation - self.misfit)) * rng.standard_normal((count, len(runs)))
        for part, group in ((self.correlation, runs.cell), (self.misfit, places)):
            numbers = np.unique(group, return_inverse=True)[1]
            error += np.sqrt(part) * rng.standard_normal((count, numbers.max() + 1))[:, numbers]
        freedom = max(2.0, KNOWN * (self.freedom - self.misfit * (len(runs) - len(np.unique(places)))))
        scale = np.sqrt(freedom / rng.chisquare(freedom, (count, 1)))
        fitted = runs.loss - self.residual
        return self.refit(fitted + scale * self.spread[runs.arm] * error + shift)


def fit(runs: Runs, form: Form) -> Fit:
    """Fit a form to runs: Huber's loss of the residuals of ln L, in units of each arm's own spread, which is found with
    it.

    Raises:
        ValueError: when there are not more runs than parameters, or an arm has fewer than four.
    """
    counts = np.bincount(runs.arm, minlength=len(form.floors))
    freedom = len(runs) - form.parameters
    if freedom < 2 or counts.min() < LEAST:
        raise ValueError(
            f"{len(runs)} runs ({', '.join(map(str, counts))} of each arm) for a surface of {form.parameters} "
            f"constants: at least two more, and {LEAST} of each arm, are needed"
        )
    model = Parametrisation(form, runs)
    parameters, spread = model.starts(), np.full(len(counts), np.inf)
    residual = runs.loss
    for _ in range(1 + ROUNDS):
        solutions = _solve(model, parameters, runs.loss, spread)
        parameters = solutions.parameters[solutions.best]
        residual = runs.loss - model(parameters[None])[0][0]
        spread = _spread(residual, runs.arm, len(counts), len(runs) / freedom)
    standardised = residual / spread[runs.arm]
    correlation = _correlation(standardised, runs)
    misfit = min(_misfit(standardised, runs), 1 - correlation)
    return Fit(model, parameters, residual, spread, correlation, misfit)


def _solve(
    model: Parametrisation, start: np.ndarray, loss: np.ndarray, spread: np.ndarray, tolerance: float = 1e-11
) -> Solutions:
    """Least squares where the spread is infinite, which is not known yet."""
    known = bool(np.isfinite(spread).all())
    weights = spread[model.runs.arm] ** -2.0 if known else 1.0
    delta = ROBUST * spread[model.runs.arm] if known else np.inf
    return levenberg_marquardt(
        model, start, loss, model.lower, model.upper, weights=weights, delta=delta, tolerance=tolerance
    )


def _spread(residual: np.ndarray, arm: np.ndarray, arms: int, per_freedom: float) -> np.ndarray:
    """Each arm's standard deviation [K]: its root mean square with what lies far out clipped (Huber's proposal 2), not
    below a hundredth of the largest arm's, and drawn to that of all arms as far as chance explains what they differ by:
    their ln variances are a model of random effects, with its variance by the method of moments."""
    logs, error = np.empty(arms), np.empty(arms)
    for k in range(arms):
        mine = residual[arm == k]
        scale = max(np.median(np.abs(mine)) / 0.6745, 1e-12)
        for _ in range(20):
            clipped = np.clip(mine, -CLIPPED * scale, CLIPPED * scale)
            scale = max(np.sqrt((clipped**2).mean() / SHRINKAGE), 1e-12)
        error[k] = 2 * per_freedom / (KNOWN * len(mine))
        logs[k] = np.log(scale**2 * per_freedom) + error[k] / 2  # the mean of the ln is below the ln of the mean
    logs = np.maximum(logs, max(2 * np.log(1e-9), logs.max() + 2 * np.log(0.01)))
    between = max(0.0, logs.var(ddof=min(1, arms - 1)) - error.mean())
    return np.exp((logs.mean() + between / (between + error) * (logs - logs.mean())) / 2)


def _places(runs: Runs) -> np.ndarray:
    """A number for each arm, size and length [R]."""
    columns = np.stack([runs.arm, runs.size.round(6), runs.data.round(6)], axis=1)
    return np.unique(columns, axis=0, return_inverse=True)[1].reshape(-1)


def _misfit(standardised: np.ndarray, runs: Runs) -> float:
    """Mean product of the standardised residuals of two runs of one place over their mean square, between 0 and 1; 0
    below four pairs."""
    clipped, places = np.clip(standardised, -3, 3), _places(runs)
    count, total, squares = (np.bincount(places, weights) for weights in (None, clipped, clipped**2))
    pairs = (count * (count - 1)).sum() / 2
    if pairs <= 3:
        return 0.0
    return float(np.clip((total**2 - squares).sum() / 2 / pairs / max((clipped**2).mean(), 1e-12), 0.0, 1.0))


def _correlation(standardised: np.ndarray, runs: Runs) -> float:
    """Mean product of two arms' standardised residuals over the cells that both have, over the mean square of all,
    between 0 and 0.9."""
    products, clipped = [], np.clip(standardised, -3, 3)
    for i in range(runs.arm.max() + 1):
        for j in range(i):
            mine, other = runs.arm == i, runs.arm == j
            _, a, b = np.intersect1d(runs.cell[mine], runs.cell[other], return_indices=True)
            products.append(clipped[mine][a] * clipped[other][b])
    values = np.concatenate(products) if products else np.zeros(0)
    square = max((clipped**2).mean(), 1e-12)
    return float(np.clip(np.mean(values) / square, 0.0, 0.9)) if len(values) > 3 else 0.0
