"""The finished runs of one arm, the lowest of each budget, and the isoFLOP minima."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from experiments.fits.isoflop import Curve, NoMinimum, find_minimum


def finished(rows: pd.DataFrame, arm: str, *kinds: str) -> pd.DataFrame:
    """Returns the rows of an arm's finished runs of these kinds: tune, fit, holdout."""
    return rows[(rows.status == "done") & rows.kind.isin(kinds) & (rows.arm == arm)]


def lowest_by_budget(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the run of the lowest bits per byte of each budget, from the smallest budget on."""
    return runs.loc[runs.groupby("budget_flops").bits_per_byte.idxmin().to_numpy()]


def budget_curves(rows: pd.DataFrame, budgets: Iterable[float]) -> list[Curve]:
    """Returns the isoFLOP curve of each budget, over ln(parameters), from one arm's finished runs."""
    spent, params, loss = (rows[name].to_numpy(float) for name in ("budget_flops", "params_total", "bits_per_byte"))
    curves: list[Curve] = []
    for budget in budgets:
        mine = np.isclose(spent, budget)
        if mine.any():
            curves.append(find_minimum(budget, np.log(params[mine]), loss[mine]))
        else:
            curves.append(NoMinimum(budget, 0, (), None, "no finished runs"))
    return curves
