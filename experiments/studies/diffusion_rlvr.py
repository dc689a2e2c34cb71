"""Reinforcement learning of a masked diffusion policy, by what is differentiated as the likelihood of its answers."""

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from experiments.findings import Estimate, Verdict
from experiments.studies.rlvr import said
from experiments.studies.sides import above, seeds_to_tell
from experiments.studies.tuned import MEASURES, Tuned, draw, final


@dataclass(frozen=True)
class DiffusionRLVR(Tuned):
    """Tunes one diffusion model by the same rewards with several estimators of its policy gradient.

    unbiased: the arm that the others are compared with.
    """

    unbiased: str

    def figure(self, table: pd.DataFrame) -> Figure:
        """Scores on held-out problems against the FLOPs of tuning (above) and its steps (below)."""
        columns = [name for name in MEASURES if name != "length"]  # the windows are filled
        canvas = Figure(figsize=(3.2 * len(columns), 6.6), layout="constrained")
        above, below = canvas.subplots(2, len(columns))
        draw(above, table, list(self.arms), "flops_then", "FLOPs of tuning")
        draw(below, table, list(self.arms), "step", "steps of tuning")
        canvas.legend(*above[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        """From the last evaluations, which are at equal FLOPs."""
        ends = final(table)
        by_arm = ends.pivot(index="seed", columns="arm", values="pass@1")
        others = [arm for arm in self.arms if arm != self.unbiased]
        paired = by_arm.dropna(subset=[*self.arms]) if {*self.arms} <= {*by_arm} else by_arm.iloc[:0]
        if len(paired) < 2:
            return Verdict("cannot tell", f"{len(paired)} seeds are too few to compare.", None, self.rule)
        best = str(paired[others].mean().idxmax())
        effect = Estimate.of_mean(paired[self.unbiased] - paired[best])
        outcome = above(effect, 0.0)
        steps = ends.groupby("arm", sort=False).step.max()
        taken = ", ".join(f"{arm.replace('_', ' ')} {steps[arm]:.0f}" for arm in self.arms)
        sentence = (
            f"pass@1 by {self.unbiased} less by {best.replace('_', ' ')}, the best of the others: {effect}. Steps that "
            f"the FLOPs paid for: {taken}. At equal steps, {self.level(table)}. {said(ends)}"
        )
        sentence += seeds_to_tell(outcome, effect, 0.0, len(paired))
        return Verdict(outcome, sentence, effect, self.rule)

    def level(self, table: pd.DataFrame) -> str:
        """Returns the mean pass@1 of each arm after as many steps as the dearest could take, between two evaluations on
        a straight line."""
        runs = table[table.arm.isin([*self.arms])].dropna(subset="step")
        reached = int(runs.groupby("id").step.max().min())
        found = {}
        for (arm, _), run in runs.groupby(["arm", "id"], sort=False):
            run = run.set_index("step")["pass@1"].sort_index()
            steps = sorted({*run.index, reached})
            found.setdefault(arm, []).append(run.reindex(steps).interpolate("index", limit_area="inside")[reached])
        means = ", ".join(f"{arm.replace('_', ' ')} {pd.Series(found[arm]).mean():.3f}" for arm in self.arms)
        return f"after {reached}: {means}"
