"""Two factors of compute that arms of a sweep take over others, the one over the other: at two budgets, or of two
pairs of arms."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from experiments.findings import Estimate, Verdict, number
from experiments.report.figures import COLOURS, MARKERS, tick_budgets, tick_values
from experiments.scaling.joint import estimated
from experiments.studies.swept import Swept


class Factor(NamedTuple):
    """How many times the compute of a reference an arm takes for its own loss at a budget, in FLOPs."""

    arm: str
    reference: str
    budget: float


@dataclass(frozen=True)
class CostRatio(Swept):
    """Compares two factors of compute on a sweep's joint surface.

    factor, over: arm, reference and budget of each, as in `Factor`; the one is divided by the other. claimed: the range
    in which their ratio is claimed to lie.
    """

    factor: tuple[str, str, float]
    over: tuple[str, str, float]
    claimed: tuple[float, float]

    @property
    def factors(self) -> tuple[Factor, Factor]:
        """Both, the one that is divided first."""
        return Factor(*self.factor), Factor(*self.over)

    def table(self, rows: pd.DataFrame) -> pd.DataFrame:
        """One row per pair of arms and budget with the factor and its interval; the last row is the ratio."""
        joint, found = self.joint(), []
        for arm, reference in dict.fromkeys((factor.arm, factor.reference) for factor in self.factors):
            for budget in self.design.budgets:
                factor = estimated(*self.log_cost(joint, arm, reference, budget)).map(math.exp)
                found.append(["factor", arm, reference, budget, factor.value, factor.low, factor.high])
        (value, draws), (below, draws_below) = (
            self.log_cost(joint, factor.arm, factor.reference, factor.budget) for factor in self.factors
        )
        ratio = estimated(value - below, draws - draws_below).map(math.exp)
        found.append(["ratio", *(factor.arm for factor in self.factors), math.nan, ratio.value, ratio.low, ratio.high])
        return pd.DataFrame(found, columns=["kind", "arm", "reference", "budget", "factor", "low", "high"])

    def figure(self, table: pd.DataFrame) -> Figure:
        """The factors against the budget, pair by pair."""
        canvas = Figure(figsize=(6.5, 4.2), layout="constrained")
        axes, factors = canvas.subplots(), table[table.kind == "factor"]
        for i, ((arm, reference), own) in enumerate(factors.groupby(["arm", "reference"], sort=False)):
            errors = [own.factor - own.low, own.high - own.factor]
            axes.errorbar(
                own.budget * 1.03**i, own.factor, errors, color=COLOURS[i], marker=MARKERS[i], capsize=3,
                label=f"{arm} over {reference}",
            )  # fmt: skip
        axes.axhline(1, color="0.6", lw=1)
        axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="times the compute for the same loss")
        tick_budgets(axes, factors.budget)
        tick_values(axes)
        axes.grid(alpha=0.3)
        axes.legend()
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        estimates = [Estimate(*map(float, row)) for row in table[["factor", "low", "high"]].to_numpy()]
        places = zip(table.arm, table.reference, table.budget, strict=True)
        found, effect = dict(zip(places, estimates, strict=True)), estimates[-1]
        low, high = self.claimed
        outcome = "cannot tell"
        if low < effect.low and effect.high < high:
            outcome = "holds"
        elif effect.low > high or effect.high < low:
            outcome = "does not hold"
        said = "; ".join(
            f"at {number(f.budget)} FLOPs {f.arm} takes {number(found[f.arm, f.reference, f.budget])} times the "
            f"compute of {f.reference}"
            for f in self.factors
        )
        sentence = (
            f"For its own loss {said}. The first over the second is {number(effect)}; claimed is {low:g} to {high:g}. "
            f"From the runs of {self.sweep}."
        )
        return Verdict(outcome, sentence, effect, self.rule)
