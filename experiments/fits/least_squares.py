"""Levenberg-Marquardt on many problems of one shape at once: thousands of refits of a law cost little more than one.

Shape letters: S problems (starts or resampled data sets), R runs, P parameters. J is the Jacobian of the values.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Model = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # parameters [S, P] -> values [S, R], Jacobian [S, R, P]

STUCK = 1e10  # a damping at which steps are nothing


@dataclass(frozen=True)
class Solutions:
    """parameters [S, P], objective [S]; converged [S]: whether the objective had stopped falling."""

    parameters: np.ndarray
    objective: np.ndarray
    converged: np.ndarray

    @property
    def best(self) -> int:
        """The number of the problem with the lowest objective, for starts of one problem."""
        return int(np.argmin(self.objective))


def huber(residual: np.ndarray, delta: np.ndarray | float) -> np.ndarray:
    """Huber's loss: r^2 / 2 up to |r| = delta, a straight line beyond (Huber, 1964)."""
    size = np.abs(residual)
    near = np.minimum(size, delta)
    return near * (size - near / 2)


def levenberg_marquardt(
    model: Model,
    start: np.ndarray,
    target: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
    *,
    weights: np.ndarray | float = 1.0,
    delta: np.ndarray | float = np.inf,
    iterations: int = 1000,
    tolerance: float = 1e-11,
) -> Solutions:
    """Minimise sum of weights * huber(target - values) of each problem within lower <= parameters <= upper.

    Steps are those of Marquardt (1963): Gauss-Newton with a damping on the diagonal, which falls where a step helps and
    rises where it does not. Huber's loss enters by reweighting; a parameter at a bound that pulls outwards rests there.

    Args:
        start: [S, P] or [P]. target, weights: [S, R] or [R]. lower, upper: [P].
        delta: Huber's threshold, of all runs or of each [R].
        tolerance: relative fall of the objective below which a problem is solved.
    """
    problems = max(np.atleast_2d(start).shape[0], np.atleast_2d(target).shape[0], np.atleast_2d(weights).shape[0])
    theta = np.clip(np.broadcast_to(start, (problems, np.shape(start)[-1])).astype(float), lower, upper)
    runs = np.shape(target)[-1]
    target = np.broadcast_to(np.asarray(target, float), (problems, runs))
    weights = np.broadcast_to(np.asarray(weights, float), (problems, runs))
    values, jacobian = model(theta)
    objective = (weights * huber(target - values, delta)).sum(-1)
    damping, converged = np.full(problems, 1e-3), np.zeros(problems, bool)
    solved, lowest = theta.copy(), objective.copy()
    # From here on all arrays hold the problems that are not solved yet, whose numbers are in `active`.
    active = np.arange(problems)
    for _ in range(iterations):
        r = target - values
        pull = weights * np.minimum(1.0, delta / np.maximum(np.abs(r), 1e-300))
        weighted = jacobian * pull[..., None]
        gradient = np.einsum("srp,sr->sp", weighted, r)
        normal = np.matmul(weighted.transpose(0, 2, 1), jacobian)
        resting = ((theta <= lower) & (gradient < 0)) | ((theta >= upper) & (gradient > 0))
        gradient[resting] = 0.0
        normal *= ~resting[:, :, None] & ~resting[:, None, :]
        ridge = damping[:, None] * np.maximum(np.einsum("spp->sp", normal), 1e-12) + 1e-300
        np.einsum("spp->sp", normal)[:] += np.where(resting, 1.0, ridge)
        moved = np.clip(theta + np.linalg.solve(normal, gradient[..., None])[..., 0], lower, upper)
        new_values, new_jacobian = model(moved)
        new_objective = (weights * huber(target - new_values, delta)).sum(-1)
        better = new_objective <= objective
        # A small fall at a large damping says that the step was short, not that the end is near.
        done = better & ((objective - new_objective) * (1 + damping) <= tolerance * objective)
        damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-12, None)
        done |= damping > STUCK
        theta = np.where(better[:, None], moved, theta)
        objective = np.where(better, new_objective, objective)
        solved[active], lowest[active] = theta, objective
        converged[active[done]] = True
        if better.all():
            values, jacobian = new_values, new_jacobian
        else:
            values[better], jacobian[better] = new_values[better], new_jacobian[better]
        if done.any():
            left = ~done
            active, theta, objective, damping = active[left], theta[left], objective[left], damping[left]
            target, weights, values, jacobian = target[left], weights[left], values[left], jacobian[left]
        if not len(active):
            break
    return Solutions(solved, lowest, converged)
