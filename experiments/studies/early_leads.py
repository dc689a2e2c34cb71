"""Leads between architectures at the smallest budgets of a sweep, and whether they are the same at the largest."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.findings import Estimate, Verdict, number
from experiments.report.figures import COLOURS, MARKERS
from experiments.scaling.arm_runs import finished
from experiments.studies.swept import Swept

EARLY, LATE = "early", "late"


@dataclass(frozen=True)
class EarlyLeads(Swept):
    """Compares each pair of arms at a small budget, by a surface through the budgets up to it alone, and by their
    held-out runs.

    seen: FLOPs of the largest budget of the surface, at which it is read.
    """

    seen: float

    def table(self, rows: pd.DataFrame) -> pd.DataFrame:
        """One row per pair of arms with held-out runs: ln of the loss of the one over that of the other, early and
        late, with their intervals. Held-out runs scatter as the fitted ones do."""
        joint = self.joint(self.seen)
        held = {arm: finished(self.runs, arm, "holdout") for arm in joint.arms}
        late = {arm: math.log(own.bits_per_byte.astype(float).min()) for arm, own in held.items() if len(own)}
        rng, log_flops = np.random.default_rng(0), math.log(self.seen)
        early, drawn, later = {}, {}, {}
        for arm in late:
            mine = self.number(joint, arm)
            early[arm] = float(np.log(joint.fit.surface.frontier(mine, log_flops))[0])
            drawn[arm] = np.log(joint.draws.frontier(mine, log_flops))
            later[arm] = late[arm] + joint.fit.spread[mine] * rng.standard_normal(self.draws)
        found = []
        for arm, other in itertools.combinations(late, 2):
            row: dict = {"arm": arm, "other": other}
            for when, value, draws in ((EARLY, early, drawn), (LATE, late, later)):
                ratio = Estimate.of_draws(value[arm] - value[other], draws[arm] - draws[other])
                row |= {when: ratio.value, f"{when}_low": ratio.low, f"{when}_high": ratio.high}
            found.append(row)
        return pd.DataFrame(found)

    def figure(self, table: pd.DataFrame) -> Figure:
        """The differences of all pairs, early and late."""
        canvas = Figure(figsize=(8, 1.6 + 0.42 * len(table)), layout="constrained")
        axes, places = canvas.subplots(), np.arange(len(table))
        for i, (when, name) in enumerate(((EARLY, f"at {number(self.seen)} FLOPs"), (LATE, "at the largest budget"))):
            middle = 100 * table[when]
            reach = [middle - 100 * table[f"{when}_low"], 100 * table[f"{when}_high"] - middle]
            axes.errorbar(middle, places + 0.24 * i - 0.12, xerr=reach, fmt=MARKERS[i], color=COLOURS[i], label=name)
        axes.axvline(0, color="0.4", lw=1)
        axes.set_yticks(places, [f"{arm} − {other}" for arm, other in zip(table.arm, table.other, strict=True)])
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
        axes.set(xlabel="difference of the loss in percent")
        canvas.legend(loc="outside lower center", ncols=2)
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        signs = {when: told(table, when) for when in (EARLY, LATE)}
        kept, turned = int((signs[EARLY] * signs[LATE] > 0).sum()), int((signs[EARLY] * signs[LATE] < 0).sum())
        told_early = int((signs[EARLY] != 0).sum())
        outcome = "cannot tell"
        if not turned and 2 * kept > len(table):
            outcome = "holds"
        elif turned > kept:
            outcome = "does not hold"
        ranks = {when: ranking(table, when) for when in (EARLY, LATE)}
        sentence = (
            f"Of {len(table)} pairs {told_early} are told apart at {number(self.seen)} FLOPs; of these {kept} stand in "
            f"the same order at the largest budget, {turned} in the other, and of the rest one cannot tell. From the "
            f"lowest loss: {', '.join(ranks[EARLY])} before; {', '.join(ranks[LATE])} at last. From the runs of "
            f"{self.sweep}."
        )
        return Verdict(outcome, sentence, None, self.rule)


def told(table: pd.DataFrame, when: str) -> np.ndarray:
    """Returns the sign of the difference of each pair, 0 where its interval contains 0."""
    return (table[f"{when}_low"] > 0).to_numpy(int) - (table[f"{when}_high"] < 0).to_numpy(int)


def ranking(table: pd.DataFrame, when: str) -> list[str]:
    """Returns the arms from the lowest loss to the highest."""
    wins = dict.fromkeys([*table.arm, *table.other], 0)
    for arm, other, difference in zip(table.arm, table.other, table[when], strict=True):
        wins[arm if difference < 0 else other] += 1
    return sorted(wins, key=lambda arm: -wins[arm])
