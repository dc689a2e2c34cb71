"""The held-out budget: its prediction from the fitted ones, and its outcome."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from experiments.findings import Estimate, Refused
from experiments.scaling.design import Design
from experiments.scaling.frontier import MIN_BUDGETS, budget_curves, finished, loss_law, size_law, with_loss
from experiments.scaling.isoflop import Flat, Located
from experiments.scaling.results import Forecast, HeldOut, Prediction

FLOORS = (0.0, 0.5, 0.75)  # fractions of the lowest loss that a prediction's interval allows to be irreducible


def predict(rows: pd.DataFrame, design: Design, written: str) -> Prediction:
    """The bits per byte and optimal size of each arm at the held-out budget, from its fitted budgets alone.

    Raises:
        ValueError: for a design without a held-out budget.
    """
    if design.holdout_budget is None:
        raise ValueError(f"sweep {design.name} has no held-out budget: set sweep.holdout to have one predicted")
    arms = {arm: _forecast(finished(rows, "fit", arm), design, math.log(design.holdout_budget)) for arm in design.arms}
    return Prediction(written, design.holdout_budget, arms)


def _forecast(fit: pd.DataFrame, design: Design, log_flops: float) -> Forecast | Refused:
    minima = with_loss(budget_curves(fit, design.budgets))
    if len(minima) < MIN_BUDGETS:
        return Refused(f"{len(minima)} budgets with a minimum, at least {MIN_BUDGETS} are needed")
    size = size_law(minima, design.centre)
    return Forecast(
        bits_per_byte=extrapolate(minima, design.centre, log_flops),
        params=None if size is None else math.exp(size.at(log_flops)),
        budgets=len(minima),
    )


def extrapolate(minima: Sequence[Located | Flat], centre: float, log_flops: float) -> Estimate:
    """Bits per byte at some compute by the power law through at least three minima, with a 95 % prediction interval:
    the hull of laws with several irreducible losses, each with the scatter of the minima about it.

    Few budgets cannot tell these laws apart, and a pure power law alone promises too much: on the curves of Porian et
    al. (arXiv 2406.19146) four budgets over a factor 8 hold the loss at 4 times the largest in 89 % of cases by the
    power law's own interval, and in all 64 by this one."""
    laws = []
    for fraction in FLOORS:
        floor = fraction * min(m.loss for m in minima)
        law = loss_law(minima, centre, floor)
        residual = np.array([math.log(m.loss - floor) - law.at(math.log(m.budget)) for m in minima])
        scatter = math.sqrt((residual**2).sum() / (len(minima) - 2))
        noise = np.random.default_rng(0).normal(0, scatter, len(law.draws))
        above = law.estimate_at(log_flops, noise).map(math.exp)
        laws.append(Estimate(floor + above.value, floor + above.low, floor + above.high))
    return Estimate(laws[0].value, min(law.low for law in laws), max(law.high for law in laws))


def outcome(rows: pd.DataFrame, design: Design, forecast: Forecast | Refused | None) -> HeldOut | None:
    """The outcome of an arm's finished held-out runs, against what was expected: the parabola's minimum where there is
    one, else the best run, which is then an upper limit. None where there are no runs."""
    budget = design.holdout_budget
    if rows.empty or not budget:
        return None
    (curve,) = budget_curves(rows, [budget])
    if isinstance(curve, Located):
        value, params, how = curve.loss, math.exp(curve.x), "isoFLOP minimum"
    else:
        best = rows.loc[rows.bits_per_byte.idxmin()]
        value, params = float(best.bits_per_byte), float(best.params_total)
        how = f"best run ({'flat curve' if isinstance(curve, Flat) else curve.refused})"
    predicted = forecast.bits_per_byte if isinstance(forecast, Forecast) else None
    inside = None if predicted is None else value in predicted
    return HeldOut(budget, value, params, how, predicted, inside)
