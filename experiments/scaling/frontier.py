"""The frontier of one arm: the isoFLOP minima of its budgets, and the power laws through them."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from experiments.fits.isoflop import (
    Curve,
    Flat,
    Line,
    Located,
    NoMinimum,
    find_minimum,
    fit_line,
    resample_minima,
)

DRAWS = 2000
MIN_BUDGETS = 3


def finished(rows: pd.DataFrame, kind: str, arm: str) -> pd.DataFrame:
    """The rows of an arm's finished runs of one kind: tune, fit or holdout."""
    return rows[(rows.status == "done") & (rows.kind == kind) & (rows.arm == arm)]


def budget_curves(rows: pd.DataFrame, budgets: Iterable[float]) -> list[Curve]:
    """The isoFLOP curve of each budget, over ln(parameters), from one arm's finished runs."""
    spent, params, loss = (rows[name].to_numpy(float) for name in ("budget_flops", "params_total", "bits_per_byte"))
    curves: list[Curve] = []
    for budget in budgets:
        mine = np.isclose(spent, budget)
        if mine.any():
            curves.append(find_minimum(budget, np.log(params[mine]), loss[mine]))
        else:
            curves.append(NoMinimum(budget, 0, (), None, "no finished runs"))
    return curves


def with_loss(curves: Iterable[Curve]) -> list[Located | Flat]:
    """The curves that say how low a budget gets, even where they are too flat or too noisy to say at which size."""
    return [curve for curve in curves if not isinstance(curve, NoMinimum)]


def loss_law(minima: Sequence[Located | Flat], centre: float, floor: float = 0.0) -> Line:
    """The line through ln(bits per byte - floor) of at least three minima against ln C."""
    loss = np.array([m.loss for m in minima])
    _, draws = resample_minima(minima, DRAWS, seed=0)
    above = np.log(np.maximum(draws - floor, 1e-3 * loss.min()))
    return fit_line(np.array([m.budget for m in minima]), np.log(loss - floor), above, centre)


def size_law(minima: Iterable[Located | Flat], centre: float) -> Line | None:
    """The line through ln(parameters) of the minima whose place is known; None below three."""
    located = [m for m in minima if isinstance(m, Located)]
    if len(located) < MIN_BUDGETS:
        return None
    draws, _ = resample_minima(located, DRAWS, seed=0)
    return fit_line(np.array([m.budget for m in located]), np.array([m.x for m in located]), draws, centre)
