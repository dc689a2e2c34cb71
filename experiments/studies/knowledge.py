"""Knowledge beside reasoning: facts that are remembered and chains that are followed, by two kinds of model at equal
FLOPs (Jelassi et al., arXiv 2410.19034; bits per parameter: Allen-Zhu and Li, 2404.05405)."""

import math
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.data.environments.facts import Facts
from experiments.findings import Estimate, Verdict, number
from experiments.harness.tasks import heldout_problems
from experiments.harness.weights import FinishedRun
from experiments.report.figures import COLOURS
from experiments.studies.ablation import Ablation, at_an_end, counted
from experiments.studies.answers import answered
from experiments.studies.sides import on_their_sides, seeds_to_tell
from experiments.studies.study import Cell


@dataclass(frozen=True)
class Knowledge(Ablation):
    """Tunes and trains each variant as an ablation does, on a task of its own, and has it answer problems by the
    likeliest tokens.

    The first of `better` is claimed to answer more right than the first of `than` by more than `margin`, where facts
    are asked; the second no more than that, where steps are.
    """

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """Return the fraction of answers that are right, and of facts how many were trained on, their letters and the
        bits of one. Nothing of the runs that tune."""
        if cell.labels["stage"] == "tune":
            return [{}]
        problems = heldout_problems(finished.data, finished.config.data.sequence_length)
        found = {"accuracy": answered(finished, problems, None)["accuracy"]}
        environment = finished.data.environment
        if isinstance(environment, Facts):
            found["facts"] = len(finished.data.train) // finished.config.data.sequence_length
            found |= {"letters": environment.length, "bits_per_letter": math.log2(environment.letters)}
        return [found]

    def figure(self, table: pd.DataFrame) -> Figure:
        """The fraction of answers that are right, a panel per task: every run, and the means."""
        canvas = Figure(figsize=(6.5, 3.6), layout="constrained")
        panels = canvas.subplots(1, len(self.better), sharey=True, squeeze=False)[0]
        runs = counted(table)
        for panel, *pair in zip(panels, self.better, self.than, strict=True):
            for i, name in enumerate(pair):
                rows = runs[runs.variant == name]
                panel.plot([i] * len(rows), rows.accuracy, "o", color=COLOURS[i], alpha=0.5, ms=5)
                panel.plot([i - 0.2, i + 0.2], [rows.accuracy.mean()] * 2, color=COLOURS[i])
            panel.set_xticks(range(len(pair)), [name.replace("_", " ") for name in pair])
            panel.set(xlim=(-0.6, len(pair) - 0.4), ylim=(-0.03, 1.03))
            panel.grid(alpha=0.3, axis="y")
        panels[0].yaxis.set_major_formatter(PercentFormatter(1))
        panels[0].set_ylabel("answers right")
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        runs = counted(table)
        right = runs.pivot(index="seed", columns="variant", values="accuracy").reindex(columns=list(self.variants))
        (knows, _), (than_knows, _) = self.better, self.than
        pairs = {f"{a} less {b}": right[a] - right[b] for a, b in zip(self.better, self.than, strict=True)}
        facts, steps = pairs
        outcome, name, effect = on_their_sides(pd.DataFrame(pairs), above=[facts], below=[steps], threshold=self.margin)
        if effect is None:
            return Verdict(outcome, f"{name} has too few seeds to judge.", None, self.rule)
        held = runs.facts * runs.letters * (runs.bits_per_letter - runs.bits_per_byte) / runs.params_total
        bits = held.groupby(runs.variant).mean()
        means = ", ".join(f"{variant} {value:.3f}" for variant, value in right.mean().items())
        differences = ", ".join(f"{pair} {Estimate.of_mean(values.dropna()):.3f}" for pair, values in pairs.items())
        sentence = (
            f"Answers right: {means}; {differences}. Of the {number(runs.facts.max())} facts a parameter holds "
            f"{bits[knows]:.2f} bits in {knows} and {bits[than_knows]:.2f} in {than_knows}, all parameters counted. "
            f"Read from {name}."
        )
        sentence += seeds_to_tell(outcome, effect, self.margin, pairs[name].count())
        return Verdict(outcome, sentence + at_an_end(table), effect, self.rule)
