"""The finished runs of one arm, and the isoFLOP minima of its budgets."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from experiments.fits.isoflop import Curve, NoMinimum, find_minimum


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
