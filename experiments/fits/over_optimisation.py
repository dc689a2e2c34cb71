"""The laws of over-optimisation: gold reward R against the distance d = sqrt(KL(policy || start)) (Gao, Schulman &
Hilton, arXiv 2210.10760, section 3.1).

    best of n:               R = d (alpha - beta d),      highest at d* = alpha / (2 beta)
    reinforcement learning:  R = d (alpha - beta log d),  highest at d* = exp(alpha / beta - 1)

Both are linear in alpha and beta.

Shape letters: C curves, one per proxy; K points of a curve; S resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student_t

from experiments.findings import QUANTILES, Estimate

Law = Literal["best_of_n", "rl"]
Curve = tuple[np.ndarray, np.ndarray]  # distances and gold rewards above the start's, [K] each


@dataclass(frozen=True)
class FittedLaw:
    """alpha, beta: of the law. peak: the distance d* at which R is highest (see `peak`)."""

    alpha: Estimate
    beta: Estimate
    peak: Estimate


def fit_law(law: Law, curves: Sequence[Curve], resamples: int = 1000, seed: int = 0) -> FittedLaw:
    """Returns the law of several curves with intervals over curves, which are drawn anew with replacement. Few curves
    drawn anew differ less than others would: the draws are spread as Student's t is wider than a normal distribution
    and a variance without bias larger than that of the draws.

    Args:
        law: which.
        curves: at least two.
        resamples: S. seed: of the draws.

    Raises:
        ValueError: for fewer curves, or too few points to tell alpha from beta.
    """
    if len(curves) < 2:
        raise ValueError(f"{len(curves)} curves are too few for an interval over curves: give at least 2")
    squares_C22, products_C2 = normal_equations(law, curves)
    drawn_SC = np.random.default_rng(seed).integers(len(curves), size=(resamples, len(curves)))
    draws_S2 = solve(squares_C22[drawn_SC].sum(1), products_C2[drawn_SC].sum(1))
    alpha, beta = coefficients(law, curves)
    freedom = len(curves) - 1
    wider = student_t.ppf(QUANTILES[1], freedom) / norm.ppf(QUANTILES[1]) * np.sqrt(len(curves) / freedom)
    draws_S2 = [alpha, beta] + wider * (draws_S2 - [alpha, beta])
    values, draws = (alpha, beta, peak(law, alpha, beta)), (*draws_S2.T, peak(law, *draws_S2.T))
    return FittedLaw(*(Estimate.of_draws(float(x), x_S) for x, x_S in zip(values, draws, strict=True)))


def coefficients(law: Law, curves: Sequence[Curve]) -> tuple[float, float]:
    """Returns alpha and beta: least squares of R on all points of all curves.

    Raises:
        ValueError: for too few points to tell them apart.
    """
    squares_C22, products_C2 = normal_equations(law, curves)
    alpha, beta = solve(squares_C22.sum(0), products_C2.sum(0))
    return float(alpha), float(beta)


def explained(law: Law, curve: Curve) -> float:
    """Returns the share of the variance of R that the curve's own law explains: 1 at best."""
    d_K, reward_K = curve
    rest_K = reward_K - reward_at(law, d_K, *coefficients(law, [curve]))
    return float(1 - (rest_K**2).sum() / ((reward_K - reward_K.mean()) ** 2).sum())


def reward_at(law: Law, d: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """Returns R at distances."""
    return terms(law, d) @ np.array([alpha, beta])


def peak(law: Law, alpha: np.ndarray | float, beta: np.ndarray | float) -> np.ndarray:
    """Returns the distance at which R is highest, infinite where it only rises (beta <= 0)."""
    alpha, beta = np.asarray(alpha, float), np.asarray(beta, float)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        at = np.maximum(alpha / (2 * beta), 0.0) if law == "best_of_n" else np.exp(alpha / beta - 1)
    return np.where(beta > 0, at, np.inf)


def terms(law: Law, d: np.ndarray) -> np.ndarray:
    """Returns what alpha and beta are multiplied by, [..., 2]."""
    d = np.asarray(d, float)
    return np.stack([d, -(d**2) if law == "best_of_n" else -d * np.log(np.where(d > 0, d, 1.0))], -1)


def normal_equations(law: Law, curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Returns X'X [C, 2, 2] and X'R [C, 2]."""
    designs = [terms(law, d_K) for d_K, _ in curves]
    products = [X_K2.T @ reward_K for X_K2, (_, reward_K) in zip(designs, curves, strict=True)]
    return np.stack([X_K2.T @ X_K2 for X_K2 in designs]), np.stack(products)


def solve(squares: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Returns alpha and beta [..., 2] of normal equations."""
    if np.any(np.linalg.cond(squares) > 1e12):
        raise ValueError("the points do not tell alpha from beta: give at least two distances above 0, not both 1")
    return np.linalg.solve(squares, products[..., None])[..., 0]
