"""Recall by the distance to what is recalled, at equal FLOPs (Arora et al., arXiv 2312.04927)."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.findings import Verdict, number
from experiments.harness.weights import FinishedRun
from experiments.report.figures import COLOURS
from experiments.studies.ablation import Ablation, at_an_end, counted
from experiments.studies.by_position import recall_by_distance
from experiments.studies.sides import on_their_sides, seeds_to_tell
from experiments.studies.study import Cell

JUDGED = {"worst": "recalled at the worst distances", "slope": "lost or won per doubling of the distance"}


@dataclass(frozen=True)
class RecallDistance(Ablation):
    """Tunes and trains each variant as an ablation does, and asks at which distances it recalls.

    judged: "worst", the fraction recalled in the range of distances where that is least, which is claimed to lie above
    `margin` for `better` and below it for `than`; or "slope", of that fraction by log2 of the distance, which is
    claimed to lie below `margin` for `than`, and to be greater by more than `margin` for `better`.

    Raises:
        ValueError: for anything else that is to be judged.
    """

    judged: str

    def __post_init__(self):
        if self.judged not in JUDGED:
            raise ValueError(f"study.judged={self.judged} must be one of {', '.join(JUDGED)}")

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """The fraction of answers recalled: of all, in the worst range of distances and in each, and the slope by log2
        of the distance over the answers. Nothing of the runs that tune."""
        if cell.labels["stage"] == "tune":
            return [{}]
        report = recall_by_distance(finished)
        slope = np.polyfit(np.log2(report["first"]), report.accuracy, 1, w=np.sqrt(report.answers))[0]
        found = {"all": float((report.accuracy * report.answers).sum() / report.answers.sum())}
        found |= {"worst": float(report.accuracy.min()), "slope": float(slope)}
        return [found | {f"@{first}": x for first, x in zip(report["first"], report.accuracy, strict=True)}]

    def figure(self, table: pd.DataFrame) -> Figure:
        """The fraction recalled against the distance, a panel per variant and a line per seed."""
        runs = counted(table)
        ranges = [column for column in map(str, runs) if column.startswith("@")]
        canvas = Figure(figsize=(10, 5.4), layout="constrained")
        panels = canvas.subplots(-(-len(self.variants) // 3), 3, sharex=True, sharey=True, squeeze=False).flat
        for name, colour, panel in zip(self.variants, COLOURS, panels, strict=False):
            for _, run in runs[runs.variant == name].iterrows():
                panel.plot([int(column[1:]) for column in ranges], run[ranges], color=colour, marker="o", ms=4)
            panel.set_xscale("log", base=2)
            panel.set(title=name.replace("_", " "), ylim=(-0.02, 1.02))
            panel.grid(alpha=0.3)
        for unused in panels:
            unused.remove()
        canvas.supxlabel("distance to the key, from", fontsize="medium")
        canvas.supylabel("fraction of answers recalled", fontsize="medium")
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        runs = counted(table)
        values = runs.pivot(index="seed", columns="variant", values=self.judged)
        above = self.better
        if self.judged == "slope":
            values = values.reindex(columns=list(self.variants))
            pairs = [(better, than) for better in self.better for than in self.than]
            differences = {f"{better} less {than}": values[better] - values[than] for better, than in pairs}
            values, above = values.assign(**differences), list(differences)
        outcome, name, effect = on_their_sides(values, above=above, below=self.than, threshold=self.margin)
        if effect is None:
            return Verdict(outcome, f"{name} has too few seeds to judge.", None, self.rule)
        means = runs.groupby("variant", sort=False)[["all", "state_bytes", self.judged]].mean()
        said = ", ".join(
            f"{variant} {row[self.judged]:.3f} ({row['all']:.3f}; {number(row.state_bytes)})"
            for variant, row in means.iterrows()
        )
        sentence = (
            f"Fraction of answers {JUDGED[self.judged]} (of all recalled; bytes of decode state): {said}. Read from "
            f"{name}: {effect:.3f}."
        )
        sentence += seeds_to_tell(outcome, effect, self.margin, values[name].count())
        return Verdict(outcome, sentence + at_an_end(table), effect, self.rule)
