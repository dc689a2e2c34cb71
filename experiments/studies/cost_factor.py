"""The factor of compute that one architecture or objective takes over another, against the one that is claimed."""

import math
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from experiments.findings import Estimate, Verdict, number
from experiments.report.figures import COLOURS, MARKERS, tick_budgets, tick_values
from experiments.scaling.joint import estimated
from experiments.studies.swept import Swept


@dataclass(frozen=True)
class CostFactor(Swept):
    """Compares arms by the compute that the reference takes for their loss, on a sweep's joint surface.

    It is read at the largest budget: the less that a better reference takes lies among the fitted budgets too.

    arm, reference: those of the claim. beside: further arms, for comparison. factor: of compute that is claimed.
    within: how many times more or less of it is the same.
    """

    arm: str
    reference: str
    beside: list[str]
    factor: float
    within: float

    def table(self, rows: pd.DataFrame) -> pd.DataFrame:
        """One row per arm and budget: the budget over what the reference takes, with its interval."""
        joint, found = self.joint(), []
        for arm in (self.arm, *self.beside):
            for budget in self.design.budgets:
                factor = estimated(*self.log_cost(joint, arm, self.reference, budget)).map(math.exp)
                found.append([arm, budget, factor.value, factor.low, factor.high])
        return pd.DataFrame(found, columns=["arm", "budget", "factor", "low", "high"])

    def figure(self, table: pd.DataFrame) -> Figure:
        """The factor against the budget, arm by arm, and the one that is claimed."""
        canvas = Figure(figsize=(6.5, 4.2), layout="constrained")
        axes = canvas.subplots()
        axes.axhspan(self.factor / self.within, self.factor * self.within, color="0.9", label="claimed")
        for i, (arm, own) in enumerate(table.groupby("arm", sort=False)):
            places = own.budget * 1.06**i
            errors = [own.factor - own.low, own.high - own.factor]
            axes.errorbar(places, own.factor, errors, color=COLOURS[i], marker=MARKERS[i], capsize=3, label=arm)
        axes.set(xscale="log", yscale="log", xlabel="training FLOPs")
        axes.set_ylabel(f"times the compute of {self.reference} for the same loss")
        tick_budgets(axes, table.budget)
        tick_values(axes)
        axes.grid(alpha=0.3)
        axes.legend()
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        last = table[table.budget == table.budget.max()].set_index("arm")
        factors = {str(arm): Estimate(*map(float, row)) for arm, *row in last[["factor", "low", "high"]].itertuples()}
        effect, low, high = factors[self.arm], self.factor / self.within, self.factor * self.within
        outcome = "cannot tell"
        if low < effect.low and effect.high < high:
            outcome = "holds"
        elif effect.low > high or effect.high < low:
            outcome = "does not hold"
        said = ", ".join(f"{arm} {number(factor)}" for arm, factor in factors.items())
        sentence = (
            f"For the loss that they have at {number(table.budget.max())} FLOPs these take so many times the compute "
            f"of {self.reference}: {said}. Claimed are {self.factor:g}, and {low:g} to {high:g} count as that. From "
            f"the runs of {self.sweep}."
        )
        return Verdict(outcome, sentence, effect, self.rule)
