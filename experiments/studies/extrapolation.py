"""Losses far beyond the budgets that a law was fitted to, against what it had said."""

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from experiments.findings import Verdict, number
from experiments.report.figures import COLOURS
from experiments.scaling.arm_runs import finished
from experiments.scaling.holdout import outcome, predict
from experiments.scaling.results import Forecast
from experiments.studies.swept import Swept


@dataclass(frozen=True)
class Extrapolation(Swept):
    """Predicts the held-out runs of a sweep from its smaller budgets alone.

    seen: FLOPs of the largest budget that the law is fitted to. inside: arms whose loss has to lie inside its 95 %
    interval. sharp: the greatest half of an interval, in the median over arms, as a fraction of the fall of the loss
    from the last budget seen.
    """

    seen: float
    inside: int
    sharp: float

    def table(self, rows: pd.DataFrame) -> pd.DataFrame:
        """One row per arm with held-out runs: bits per byte as predicted with its interval, as measured, and the lowest
        at the last budget seen.

        Raises:
            ValueError: where no arm has both.
        """
        known = self.runs[self.runs.budget_flops <= self.seen]
        forecasts, found = predict(known, self.design, "").arms, []
        for arm, forecast in forecasts.items():
            held = outcome(finished(self.runs, arm, "holdout"), self.design, forecast)
            if held is None or not isinstance(forecast, Forecast):
                continue
            own = finished(known, arm, "fit")
            last = own.bits_per_byte.astype(float)[own.budget_flops == own.budget_flops.max()].min()
            said = forecast.bits_per_byte
            found.append([arm, held.budget, said.value, said.low, said.high, held.bits_per_byte, last])
        if not found:
            raise ValueError(f"study.sweep={self.sweep} has no arm with runs up to {self.seen:.3g} and held-out ones")
        columns = ["arm", "budget", "predicted", "low", "high", "measured", "last_seen"]
        return pd.DataFrame(found, columns=columns)

    def figure(self, table: pd.DataFrame) -> Figure:
        """Predicted and measured bits per byte, arm by arm."""
        canvas = Figure(figsize=(7, 1.8 + 0.45 * len(table)), layout="constrained")
        axes, places = canvas.subplots(), range(len(table))
        errors = [table.predicted - table.low, table.high - table.predicted]
        axes.errorbar(table.predicted, places, xerr=errors, fmt="o", color=COLOURS[0], capsize=3, label="predicted")
        axes.plot(table.measured, places, "D", color=COLOURS[1], label="measured")
        axes.plot(table.last_seen, places, "|", color="0.4", ms=12, label=f"lowest at {number(self.seen)} FLOPs")
        axes.set_yticks(places, list(table.arm))
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
        axes.set(xlabel=f"bits per byte at {number(table.budget.iloc[0])} FLOPs")
        canvas.legend(loc="outside lower center", ncols=3)
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        hits = int(((table.low <= table.measured) & (table.measured <= table.high)).sum())
        widths = (table.high - table.low) / 2 / (table.last_seen - table.measured)
        ratios = table.measured / table.predicted - 1
        outcome = "holds"
        if hits < self.inside:
            outcome = "does not hold"
        elif widths.median() > self.sharp:
            outcome = "cannot tell"
        sentence = (
            f"From budgets up to {number(self.seen)} FLOPs the law predicts those at {number(table.budget.iloc[0])}, "
            f"{number(table.budget.iloc[0] / self.seen, 2)} times as much: {hits} of {len(table)} arms lie in their "
            f"intervals, half of which is {widths.median():.0%} of the fall of the loss in the median; what was "
            f"measured lies {ratios.min():+.1%} to {ratios.max():+.1%} from what was predicted. From the runs of "
            f"{self.sweep}."
        )
        return Verdict(outcome, sentence, None, self.rule)
