"""The held-out budget: its prediction from the fitted ones, its outcome, and how predictions came out so far."""

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments.findings import QUANTILES, Estimate, Refused
from experiments.harness import ledger
from experiments.scaling.arm_runs import finished
from experiments.scaling.design import Design, read_design
from experiments.scaling.joint import DRAWS, Joint, join
from experiments.scaling.results import (
    Forecast,
    FormScore,
    HeldOut,
    Prediction,
    PredictionRecord,
    read_prediction,
)
from experiments.scaling.surface import Fit, Form, Runs, Surface, fit

WORSE = 3.0  # error of a form at the largest budget over that of the best, up to which it is used


class Alternative(NamedTuple):
    """A form of the surface, its error where the largest budget was left out (None where that cannot be), and whether
    predictions use it; its spread by arm [K] and draws then."""

    name: str
    error: float | None
    used: bool
    spread: np.ndarray
    draws: Surface | None


def predict(rows: pd.DataFrame, design: Design, written: str) -> Prediction:
    """Returns what to expect of each arm at the held-out budget, from the surfaces of its fitted budgets alone.

    Raises:
        ValueError: for a design without a held-out budget, and rows without the loss that it compares.
    """
    if design.holdout_budget is None:
        raise ValueError(f"sweep {design.name} has no held-out budget: set sweep.holdout to have one predicted")
    joint = join(design.losses(rows), design, {})
    if isinstance(joint, Refused):
        return Prediction(written, design.holdout_budget, dict.fromkeys(design.arms, joint), ())
    candidates = alternatives(joint.fit)
    arms = {arm: _forecast(joint, candidates, arm, design) for arm in design.arms}
    scores = tuple(FormScore(form.name, form.error, form.used) for form in candidates)
    return Prediction(written, design.holdout_budget, arms, scores)


def _forecast(joint: Joint, candidates: list[Alternative], arm: str, design: Design) -> Forecast | Refused:
    number, cells = joint.number(arm), design.holdout_cells.get(arm, ())
    if number is None:
        return Refused(f"{arm} has too few finished runs for a surface")
    if not cells:
        return Refused(f"{arm} has no held-out runs in the plan")
    flops, tokens = np.array(cells).T
    size, _ = joint.fit.surface.optimum(number, math.log(design.holdout_budget or 0))
    return Forecast(
        bits_per_byte=best_of(candidates, number, np.log(flops / (6 * tokens)), np.log(tokens)),
        params=float(joint.params(number, size)[0]),
        runs=int((joint.fit.model.runs.arm == number).sum()),
    )


def alternatives(fitted: Fit) -> list[Alternative]:
    """The surface and those of other forms, each scored on the runs of the largest budget, fitted without them. A form
    is used where its error there is at most `WORSE` times that of the best.

    The curves of Porian et al. (arXiv 2406.19146) level off later than the surface says and earlier than one without a
    floor does: four budgets there hold the loss at 4 times the largest in 43 of 64 cases by the surface alone and in
    60 by the hull of the forms used (with gamma = 1 in 24 and 57).
    """
    runs, form = fitted.model.runs, fitted.model.form
    forms = {
        "own exponents": form,
        "no floor": replace(form, floored=False),
        "tied exponents": replace(form, tied=True),
    }
    kept, left_out = runs.where(~runs.in_largest_budget), runs.where(runs.in_largest_budget)
    errors = {name: _error(kept, left_out, other) for name, other in forms.items()}
    known = [error for error in errors.values() if error is not None]
    worst = WORSE * min(known) if known else math.inf
    found = []
    for name, other in forms.items():
        error, mine = errors[name], fitted if other == form else None
        if mine is None and (not known or (error or math.inf) <= worst):
            try:
                mine = fit(runs, other)
            except ValueError:
                error = None
        draws = None if mine is None else mine.draws(DRAWS, seed=2)
        found.append(Alternative(name, error, mine is not None, (mine or fitted).spread, draws))
    return found


def _error(kept: Runs, left_out: Runs, form: Form) -> float | None:
    """Root mean square of ln(loss) of the runs left out about the surface of the others; None where these are too
    few."""
    try:
        surface = fit(kept, form).surface
    except ValueError:
        return None
    squares = [
        (left_out.loss[mine] - np.log(surface.loss(arm, left_out.size[mine], left_out.data[mine])[0])) ** 2
        for arm in range(len(form.floors))
        if (mine := left_out.arm == arm).any()
    ]
    return float(np.sqrt(np.concatenate(squares).mean()))


def best_of(candidates: list[Alternative], arm: int, size: np.ndarray, data: np.ndarray) -> Estimate:
    """The lowest bits per byte among runs of these ln sizes and ln tokens, with a 95 % prediction interval: the hull of
    those of the forms used, each of surfaces that the fitted runs allow, with runs that scatter about them as those
    did. They are scored on the same held-out text and tuned the same way, so of those errors there is none."""
    rng, medians, ends = np.random.default_rng(3), [], []
    for candidate in candidates:
        if candidate.draws is not None:
            scatter = candidate.spread[arm] * rng.standard_normal((DRAWS, len(size)))
            lowest = (candidate.draws.loss(arm, size, data) * np.exp(scatter)).min(1)
            medians.append(np.median(lowest))
            ends.append(np.quantile(lowest, QUANTILES))
    low, high = np.array(ends).T
    return Estimate(float(np.mean(medians)), float(low.min()), float(high.max()))


def outcome(rows: pd.DataFrame, design: Design, forecast: Forecast | Refused | None) -> HeldOut | None:
    """The best of an arm's finished held-out runs, against what was expected of it; None where there are no runs."""
    if rows.empty or not design.holdout_budget:
        return None
    best = rows.loc[rows.bits_per_byte.idxmin()]
    value = float(best.bits_per_byte)
    predicted = forecast.bits_per_byte if isinstance(forecast, Forecast) else None
    inside = None if predicted is None else value in predicted
    how = "the only run" if len(rows) == 1 else f"the best of {len(rows)} runs"
    return HeldOut(design.holdout_budget, value, float(best.params_total), how, predicted, inside)


def scores(root: Path) -> pd.DataFrame:
    """The predictions of all sweeps below a folder against their outcomes, one row per arm: sweep, arm, budget, when it
    was written, predicted, low, high, outcome and inside. Those whose held-out runs are not all finished are left out.

    Raises:
        ValueError: for a prediction that cannot be read, or that lies without the plan of its sweep.
    """
    found = []
    for path in sorted(root.glob("*/prediction.json")):
        if not (path.parent / "plan.json").exists():
            raise ValueError(f"{path} lies there without the plan.json of its sweep: put that back, or move it away")
        design, prediction = read_design(path.parent), read_prediction(path)
        rows = design.losses(ledger.read(path.parent / "ledger.jsonl"))
        for arm, forecast in prediction.arms.items():
            runs = finished(rows, arm, "holdout")
            held = outcome(runs, design, forecast)
            if held is None or held.predicted is None or len(runs) < len(design.holdout_cells.get(arm, ())):
                continue
            said = held.predicted
            found.append(
                [design.name, arm, held.budget, prediction.written, said.value, said.low, said.high, held.bits_per_byte]
                + [held.inside]
            )
    columns = ["sweep", "arm", "budget", "written", "predicted", "low", "high", "outcome", "inside"]
    return pd.DataFrame(found, columns=columns)


def record(root: Path) -> PredictionRecord:
    """Count the predictions below a folder that came out so far, and those inside their intervals; none where one of
    them cannot be read, which `experiments.score` then says."""
    try:
        table = scores(root)
    except ValueError:
        return PredictionRecord(0, 0)
    return PredictionRecord(len(table), int(table.inside.sum()))
