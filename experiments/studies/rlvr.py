"""Reinforcement learning from verifiable rewards against supervised fine-tuning on right answers, at equal FLOPs."""

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from experiments.findings import Estimate, Verdict
from experiments.studies.tuned import BASE, MEASURES, Tuned, draw, final

REWARDS, ANSWERS, CHANCE = "rewards", "right_answers", "chance_rewards"  # arms that the verdict is read from


@dataclass(frozen=True)
class RLVR(Tuned):
    """Tunes models by rewards, by right answers, by more of what they were pre-trained on, and by rewards that say
    nothing.

    working: the model whose answers have room for a working, and no part in the verdict.
    """

    working: str

    def figure(self, table: pd.DataFrame) -> Figure:
        """Scores on held-out problems against the FLOPs of tuning, one row of panels per model."""
        canvas = Figure(figsize=(3.2 * len(MEASURES), 3.3 * len(self.models)), layout="constrained")
        grid = canvas.subplots(len(self.models), len(MEASURES), squeeze=False)
        for panels, name in zip(grid, self.models, strict=True):
            draw(panels, table[table.model == name], list(self.arms), "flops_then", "FLOPs of tuning")
            panels[0].set_ylabel(name.replace("_", " "))
        canvas.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        ends = final(table)
        asked = ends[ends.model != self.working]
        by_arm = asked.pivot(index=["model", "seed"], columns="arm", values="pass@1")
        needed = {REWARDS, ANSWERS, CHANCE}
        paired = by_arm.dropna(subset=sorted(needed)) if needed <= {*by_arm} else by_arm.iloc[:0]
        names = [name for name in self.models if name != self.working]
        bases = asked[asked.arm == BASE].set_index("model")
        if any((paired.index.get_level_values("model") == name).sum() < 2 or name not in bases.index for name in names):
            return Verdict("cannot tell", "Too few runs were finished to compare.", None, self.rule)
        effect = Estimate.of_mean(paired[REWARDS] - paired[ANSWERS])
        lifts = [Estimate.of_mean(paired.loc[name, REWARDS] - bases["pass@1"][name]) for name in names]
        by_chance = paired[CHANCE].groupby("model").mean()
        if (by_chance > bases["pass@1_high"].reindex(by_chance.index)).any():
            outcome = "cannot tell"
        elif effect.low > 0 and all(lift.low > 0 for lift in lifts):
            outcome = "holds"
        elif effect.high < 0 or any(lift.high < 0 for lift in lifts):
            outcome = "does not hold"
        else:
            outcome = "cannot tell"
        return Verdict(outcome, f"pass@1 by rewards less by right answers: {effect}. {said(ends)}", effect, self.rule)


def said(ends: pd.DataFrame) -> str:
    """Returns what became of each model, arm by arm: pass@1, pass@16 and the length of answers."""
    models = []
    for name, rows in ends.groupby("model", sort=False):
        means = rows.groupby("arm", sort=False)[["pass@1", "pass@16", "length"]].mean()
        arms = (f"{arm} {one:.3f}, {many:.2f}, {length:.1f}" for arm, one, many, length in means.itertuples())
        models.append(f"{name}: {'; '.join(arms)}")
    return f"pass@1, pass@16 and tokens per answer: {'. '.join(models).replace('_', ' ')}."
