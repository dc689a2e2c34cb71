"""Laws of the loss in size and data that can be fitted to runs: sums of terms, each a product of powers.

Legend: L loss, E its irreducible part, N parameters, D tokens seen, A and B coefficients, alpha and beta exponents.
Each form has its source and the symbols that it adds in its docstring. Coefficients are fitted by their logarithms.

Shape letters: S problems (starts or resampled data sets), R runs, P parameters, K terms.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

Logs = Mapping[str, np.ndarray]  # the logarithms of the runs' columns, each [R]
Term = Mapping[str, np.ndarray | float]  # ln of a term is the sum over its parameters of parameter x covariate

A, B, E = range(3)  # places of the parameters that every form begins with
EXPONENTS = (0.02, 3.0)  # outside of these an exponent is taken for a failed fit
INTERACTIONS = (-2.0, 2.0)
DECAYS = (np.log(0.01), np.log(1e4))  # ln R*: repeats are worth nothing, repeats are as good as new
NEGLIGIBLE = 1e-5  # a term that is nowhere a larger fraction of the loss than this is taken for absent
STARTS = tuple(product((0.1, 0.5, 0.8), (0.15, 0.4, 0.9), (0.15, 0.4, 0.9)))  # E over the lowest loss, alpha, beta


def summed(terms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the fraction of the sum that each of the exp(terms) makes up [K, ...], in the place of the terms, and ln
    of the sum [...]."""
    top = terms.max(0)
    np.exp(terms - top, out=terms)
    total = terms.sum(0)
    terms /= total
    return terms, top + np.log(total)


@dataclass(frozen=True)
class Surface:
    """L(N, D) = E + A / N^alpha + B / D^beta, which every form is when all but N and D are held."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

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


class Form(ABC):
    """A law whose parameters can be fitted.

    name: what `form=` calls it. formula: in the symbols of the legend. parameters: their names, A, B and E first, in
    the order of a vector of them [P]. columns: what a run must have beside its loss.
    """

    name: str
    formula: str
    parameters: tuple[str, ...] = ("A", "B", "E", "alpha", "beta")
    columns: tuple[str, ...] = ("params", "tokens")
    # (coefficient, exponent, column): the coefficient moves by the exponent times ln of the column's unit.
    units: tuple[tuple[str, str, str], ...] = (("A", "alpha", "params"), ("B", "beta", "tokens"))
    logged: frozenset[str] = frozenset({"A", "B", "E"})

    @abstractmethod
    def terms(self, logs: Logs) -> tuple[Term, Term, Term]:
        """Returns the terms of size, data and irreducible loss."""

    @abstractmethod
    def surface(self, constants: Mapping[str, float], logs: Logs) -> Surface:
        """Returns the law in N and D alone, all else as in the runs, or as the form says."""

    def __call__(self, theta: np.ndarray, logs: Logs) -> tuple[np.ndarray, np.ndarray]:
        """Returns ln L [S, R] and its derivatives [S, R, P] at parameters [S, P]."""
        return self._sum(theta, self.terms(logs), len(logs["params"]))

    def shares(self, theta: np.ndarray, logs: Logs) -> np.ndarray:
        """Returns the fractions of the loss that each term makes up [K, S, R]."""
        return self._shares(theta, self.terms(logs), len(logs["params"]))[0]

    def _shares(self, theta: np.ndarray, terms: tuple[Term, ...], runs: int) -> tuple[np.ndarray, np.ndarray]:
        column = {name: theta[:, i, None] for i, name in enumerate(self.parameters)}
        logs = np.zeros((len(terms), len(theta), runs))
        for log, term in zip(logs, terms, strict=True):
            for name, covariate in term.items():
                log += column[name] * covariate
        return summed(logs)

    def _sum(self, theta: np.ndarray, terms: tuple[Term, ...], runs: int) -> tuple[np.ndarray, np.ndarray]:
        shares, values = self._shares(theta, terms, runs)
        jacobian = np.zeros((*values.shape, len(self.parameters)))
        for share, term in zip(shares, terms, strict=True):
            for name, covariate in term.items():
                jacobian[..., self.parameters.index(name)] += share * covariate
        return values, jacobian

    def bounds(self, log_loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the lowest and highest parameters, each [P], with columns in units of their geometric means."""
        lowest, highest = log_loss.min(), log_loss.max()
        known = {
            "A": (lowest - 14, highest + 7),
            "B": (lowest - 14, highest + 7),
            "E": (lowest + np.log(NEGLIGIBLE), lowest),
            "alpha": EXPONENTS,
            "beta": EXPONENTS,
            "R_N": DECAYS,
            "R_D": DECAYS,
        }
        lower, upper = zip(*(known.get(name, INTERACTIONS) for name in self.parameters), strict=True)
        return np.array(lower), np.array(upper)

    def starts(self, log_loss: np.ndarray) -> np.ndarray:
        """Returns [27, P]: three floors, three exponents of each kind, the rest of the mean loss halved between size
        and data; nothing else at work, repeats worth ten times the data."""
        lowest, mean = np.exp(log_loss.min()), np.exp(log_loss.mean())
        starts = []
        for floor, alpha, beta in STARTS:
            half = np.log((mean - floor * lowest) / 2)
            start = {"A": half, "B": half, "E": np.log(floor * lowest), "alpha": alpha, "beta": beta}
            start |= {"R_N": np.log(10), "R_D": np.log(10)}
            starts.append([start.get(name, 0.0) for name in self.parameters])
        return np.unique(np.array(starts), axis=0)

    def constants(self, theta: np.ndarray, units: Mapping[str, float]) -> dict[str, np.ndarray]:
        """Returns the parameters [S, P] as constants of the formula, each [S]. units: ln of each column's unit."""
        moved = {name: theta[:, i].astype(float) for i, name in enumerate(self.parameters)}
        for coefficient, exponent, column in self.units:
            moved[coefficient] = moved[coefficient] + moved[exponent] * units[column]
        return {name: np.exp(value) if name in self.logged else value for name, value in moved.items()}


class Chinchilla(Form):
    """L = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv 2203.15556, approach 3)."""

    name, formula = "chinchilla", "L = E + A / N^alpha + B / D^beta"

    def terms(self, logs: Logs) -> tuple[Term, Term, Term]:
        return {"A": 1.0, "alpha": -logs["params"]}, {"B": 1.0, "beta": -logs["tokens"]}, {"E": 1.0}

    def surface(self, constants: Mapping[str, float], logs: Logs) -> Surface:
        return Surface(*(constants[name] for name in ("E", "A", "B", "alpha", "beta")))


class Tied(Form):
    """L = E + A / N^alpha + B / D^alpha, in which size and data grow alike, N* and D* as C^0.5 (Gadre et al. 2024,
    arXiv 2403.08540, who write it in C and D / N, with eta = alpha / 2)."""

    name, formula = "tied", "L = E + A / N^alpha + B / D^alpha"
    parameters = ("A", "B", "E", "alpha")
    units = (("A", "alpha", "params"), ("B", "alpha", "tokens"))

    def terms(self, logs: Logs) -> tuple[Term, Term, Term]:
        return {"A": 1.0, "alpha": -logs["params"]}, {"B": 1.0, "alpha": -logs["tokens"]}, {"E": 1.0}

    def surface(self, constants: Mapping[str, float], logs: Logs) -> Surface:
        return Surface(*(constants[name] for name in ("E", "A", "B", "alpha", "alpha")))


class Experts(Form):
    """L = E + A X^delta / N^(alpha + gamma ln X) + B X^omega / D^(beta + zeta ln X), the joint law of Ludziejewski et
    al. 2025 (arXiv 2502.05172).

    N: active parameters. X: all parameters over active ones, in the place of the paper's transformed number of experts.
    gamma, delta, zeta, omega: what experts change. Its surface is that of the runs' median X.
    """

    name, formula = "experts", "L = E + A X^delta / N^(alpha + gamma ln X) + B X^omega / D^(beta + zeta ln X)"
    parameters = ("A", "B", "E", "alpha", "beta", "gamma", "delta", "zeta", "omega")
    columns = ("params", "tokens", "total_params")
    units = (
        *Form.units,
        ("delta", "gamma", "params"),
        ("omega", "zeta", "tokens"),
    )

    def terms(self, logs: Logs) -> tuple[Term, Term, Term]:
        n, d, x = logs["params"], logs["tokens"], logs["expansion"]
        size = {"A": 1.0, "alpha": -n, "gamma": -n * x, "delta": x}
        return size, {"B": 1.0, "beta": -d, "zeta": -d * x, "omega": x}, {"E": 1.0}

    def surface(self, constants: Mapping[str, float], logs: Logs) -> Surface:
        c, x = constants, float(np.median(logs["expansion"]))
        return Surface(
            E=c["E"],
            A=c["A"] * np.exp(c["delta"] * x),
            B=c["B"] * np.exp(c["omega"] * x),
            alpha=c["alpha"] + c["gamma"] * x,
            beta=c["beta"] + c["zeta"] * x,
        )


class Repeated(Chinchilla):
    """L = E + A / N'^alpha + B / D'^beta, in which repeated data and excess parameters decay (Muennighoff et al. 2023,
    arXiv 2305.16264).

    D' = U + U R_D (1 - exp(-(D / U - 1) / R_D)), with U the unique tokens and R_D the decay constant R*_D of repeats.
    N' likewise with R_N and U_N, the size that is optimal for U tokens, alpha A / U_N^alpha = beta B / U^beta, or N
    where that is less. The paper fits R_N and R_D after the rest; here all are fitted at once. Its surface is that of
    data seen once, by sizes up to the optimal one.
    """

    name, formula = "repeated", "L = E + A / N'^alpha + B / D'^beta"
    parameters = ("A", "B", "E", "alpha", "beta", "R_N", "R_D")
    columns = ("params", "tokens", "unique_tokens")
    logged = frozenset({"A", "B", "E", "R_N", "R_D"})

    def shares(self, theta: np.ndarray, logs: Logs) -> np.ndarray:
        n, d = self._effective_logs(theta, logs)[:2]
        return self._shares(theta, self.terms({"params": n[0], "tokens": d[0]}), n[0].shape[-1])[0]

    def _effective_logs(self, theta: np.ndarray, logs: Logs) -> tuple:
        a, b, _, alpha, beta, r_n, r_d = (theta[:, i, None] for i in range(7))
        unique = np.minimum(logs["unique_tokens"], logs["tokens"])
        optimal = (np.log(alpha / beta) + a - b + beta * unique) / alpha
        n = _effective(logs["params"], np.minimum(optimal, logs["params"]), r_n)
        return n, _effective(logs["tokens"], unique, r_d), optimal, unique

    def __call__(self, theta: np.ndarray, logs: Logs) -> tuple[np.ndarray, np.ndarray]:
        (n, by_optimal, by_r_n), (d, _, by_r_d), optimal, unique = self._effective_logs(theta, logs)
        alpha, beta = theta[:, 3, None], theta[:, 4, None]
        values, jacobian = self._sum(theta, self.terms({"params": n, "tokens": d}), n.shape[-1])
        # The chain through N' and D', of which ln L falls by the shares of their terms times their exponents.
        through_n, through_d = -alpha * jacobian[..., A], -beta * jacobian[..., B]
        through_optimal = np.where(optimal < logs["params"], through_n * by_optimal, 0.0)
        jacobian[..., A] += through_optimal / alpha
        jacobian[..., B] -= through_optimal / alpha
        jacobian[..., 3] += through_optimal * (1 / alpha - optimal) / alpha
        jacobian[..., 4] += through_optimal * (unique - 1 / beta) / alpha
        jacobian[..., 5] = through_n * by_r_n
        jacobian[..., 6] = through_d * by_r_d
        return values, jacobian


def _effective(log_used: np.ndarray, log_unique: np.ndarray, log_decay: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns ln(U + U R (1 - exp(-(X / U - 1) / R))) [S, R] and its derivatives by ln U and ln R."""
    decay, repeats = np.exp(log_decay), np.exp(log_used - log_unique) - 1
    gone = np.exp(-repeats / decay)
    factor = 1 + decay * (1 - gone)
    by_unique = 1 - gone * (repeats + 1) / factor
    by_decay = (decay * (1 - gone) - repeats * gone) / factor
    return log_unique + np.log(factor), by_unique, by_decay


FORMS = {form.name: form for form in (Chinchilla(), Tied(), Repeated(), Experts())}
