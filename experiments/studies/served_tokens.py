"""The cheapest size of a model that is also to be served, on a sweep's surface (Sardana et al., arXiv 2401.00448).

A model of M FLOPs per token over six, trained on D tokens and asked for S more, costs 6 M D + 2 M S FLOPs. Along the
models of one loss, where the part that size leaves is a fraction u of both, ln M = (a - gamma ln u - ln R) / alpha and
ln D = (b - gamma ln(1 - u) - ln R) / beta, with R what the loss has above its floor.

Shape letters: S draws, U fractions.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.findings import Estimate, Verdict, number
from experiments.report.figures import COLOURS, MARKERS, tick_values
from experiments.scaling.joint import estimated
from experiments.scaling.surface import Surface
from experiments.studies.swept import Swept

FRACTIONS = np.linspace(1e-3, 1 - 1e-3, 4000)  # of what size leaves


@dataclass(frozen=True)
class ServedTokens(Swept):
    """Finds the size at which a model of the loss that is optimal at the largest fitted budget is cheapest to train and
    serve.

    arms: the first is that of the claim. served: tokens over those of the optimum in training. judged: which of them
    the claim is about. smaller: fraction of the optimum's size that the cheapest is claimed to lie below.
    """

    arms: list[str]
    served: list[float]
    judged: float
    smaller: float

    def table(self, rows: pd.DataFrame) -> pd.DataFrame:
        """One row per arm and number of tokens served: the size of the cheapest over the optimum's, tokens over the
        optimum's, FLOPs over those of serving the optimum, each with its interval.

        Raises:
            ValueError: where `judged` is not among `served`.
        """
        if self.judged not in self.served:
            raise ValueError(f"study.judged={self.judged} must be one of study.served={self.served}")
        joint, log_flops = self.joint(), math.log(max(self.design.budgets))
        found = []
        for arm in self.arms:
            mine = self.number(joint, arm)
            for served in self.served:
                value, draws = (cheapest(s, mine, log_flops, served) for s in (joint.fit.surface, joint.draws))
                row: dict = {"arm": arm, "served": served}
                for name, one, many in zip(("size", "tokens", "flops"), value, draws, strict=True):
                    ratio = estimated(one, many).map(math.exp)
                    row |= {name: ratio.value, f"{name}_low": ratio.low, f"{name}_high": ratio.high}
                found.append(row)
        return pd.DataFrame(found)

    def figure(self, table: pd.DataFrame) -> Figure:
        """Size, tokens in training and FLOPs of the cheapest against the tokens served."""
        canvas = Figure(figsize=(12, 3.8), layout="constrained")
        titles = {"size": "size over the optimum's", "tokens": "training tokens over the optimum's"}
        titles |= {"flops": "all FLOPs over the optimum's"}
        panels = canvas.subplots(1, len(titles))
        for axes, (column, title) in zip(panels, titles.items(), strict=True):
            for i, (arm, own) in enumerate(table.groupby("arm", sort=False)):
                low, high = own[f"{column}_low"], own[f"{column}_high"]
                axes.plot(own.served, own[column], color=COLOURS[i], marker=MARKERS[i], label=arm)
                axes.fill_between(own.served, low, high, color=COLOURS[i], alpha=0.15, lw=0)
            axes.set(xscale="log", yscale="log", title=title, xlabel="tokens served over tokens of the optimum")
            tick_values(axes)
            axes.grid(alpha=0.3)
        panels[0].axhline(self.smaller, color="grey", lw=1, ls=":")
        panels[0].legend()
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        at = table[table.served == self.judged].set_index("arm")
        sizes = at[["size", "size_low", "size_high"]].astype(float)
        effects = {str(arm): Estimate(*row) for arm, *row in sizes.itertuples()}
        effect = effects[self.arms[0]]
        outcome = "cannot tell"
        if effect.high < self.smaller:
            outcome = "holds"
        elif effect.low > self.smaller:
            outcome = "does not hold"
        first = at.loc[self.arms[0]]
        said = ", ".join(f"{arm} {number(one)}" for arm, one in effects.items())
        sentence = (
            f"Where {self.judged:g} times the tokens of the optimum are served, the cheapest model of its loss is so "
            f"many times its size: {said}. That of {self.arms[0]} is trained on {first.tokens:.2g} times the tokens "
            f"and saves {1 - first.flops:.0%} of the FLOPs of training and serving. From the runs of {self.sweep}."
        )
        return Verdict(outcome, sentence, effect, self.rule)


def cheapest(surface: Surface, arm: int, log_flops: float, served: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns ln of the size, of the tokens in training and of all FLOPs of the cheapest model, each over that of the
    optimum at C = exp(log_flops), where as many tokens are served as `served` times the optimum's, [S]."""
    e, a, b, alpha, beta, gamma = (x[:, arm][:, None] for x in surface.constants)
    size, data = surface.optimum(arm, log_flops)
    above = np.log(surface.frontier(arm, log_flops)[:, None] - e)
    size_SU = (a - gamma * np.log(FRACTIONS) - above) / alpha + surface.origin[0]
    data_SU = (b - gamma * np.log(1 - FRACTIONS) - above) / beta + surface.origin[1]
    asked = np.log(2 * served) + data[:, None]
    cost_SU = size_SU + np.logaddexp(np.log(6) + data_SU, asked)
    best, rows = cost_SU.argmin(1), np.arange(len(size))
    of_optimum = size + np.logaddexp(np.log(6) + data, asked[:, 0])
    return size_SU[rows, best] - size, data_SU[rows, best] - data, cost_SU[rows, best] - of_optimum
