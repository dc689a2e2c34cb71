"""Wiring: whether a penalty on its length makes a network modular (Liu, Gan and Tegmark, arXiv 2305.08746; Clune,
Mouret and Lipson, 1207.2743)."""

import math
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from experiments.findings import Estimate, Verdict
from experiments.harness.identity import run_of
from experiments.harness.weights import FinishedRun, load_run
from experiments.report.figures import COLOURS
from experiments.studies.ablation import counted, stage_of
from experiments.studies.modules import (
    adjacency,
    contributions,
    effective,
    greedy_accuracy,
    importances,
    mean_length,
    modularity,
    negligible,
    problems_by_task,
    specialisation,
)
from experiments.studies.sides import on_their_sides
from experiments.studies.study import Cell, Compose, Stages, Study

NONE, LENGTH, L1 = "no penalty", "by length", "plain L1"
PENALTIES = {LENGTH: ["objective=wiring"], L1: ["objective=wiring", "objective.build.by_length=false"]}
SILENCED = 64  # problems of each task on which units are silenced
PANELS = {
    "specialisation": "specialisation of units",
    "accuracy": "held-out answers right",
    "negligible": "weights below 1 % of the largest",
    "mean_length": "mean length of wires",
}


@dataclass(frozen=True)
class Wiring(Study):
    """Trains a network on two tasks without a penalty, with one on the length of its wiring and with a plain one.

    strengths: of both penalties, of which each takes the largest that keeps the accuracy of a seed of its own. margin:
    of that, and by which accuracy may be lower with the penalty. tuning_seed, seeds: of those runs, and of those that
    count, of which equal ones are pairs.
    """

    strengths: list[float]
    margin: float
    tuning_seed: int
    seeds: list[int]

    def stages(self, compose: Compose) -> Stages:
        tried = [(NONE, 0.0), *((name, strength) for name in PENALTIES for strength in self.strengths)]
        done = yield [self._cell(compose, self.tuning_seed, *variant) for variant in tried]
        right = {
            (cell.labels["variant"], cell.labels["strength"]): accuracy(load_run(cell.run.folder)) for cell in done
        }
        least = right.get((NONE, 0.0), math.inf) - self.margin
        kept = {name: [x for x in self.strengths if right.get((name, x), 0.0) >= least] for name in PENALTIES}
        chosen = {NONE: 0.0} | {name: max(some, default=min(self.strengths)) for name, some in kept.items()}
        yield [self._cell(compose, seed, *variant) for seed in self.seeds for variant in chosen.items()]

    def _cell(self, compose: Compose, seed: int, variant: str, strength: float) -> Cell:
        penalty = [*PENALTIES[variant], f"objective.build.strength={strength}"] if variant in PENALTIES else []
        config = compose([*penalty, f"seed={seed}"])
        config.session.arm = variant
        stage = stage_of(seed, self.tuning_seed)
        return Cell({"variant": variant, "stage": stage, "strength": strength, "seed": seed}, run_of(config))

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """The accuracy; of the runs that count also the specialisation of units, by what they write and by what is lost
        without them, the effective number of them per task, the negligible part of the weights, the mean length of
        wires and Newman's Q."""
        found = {"accuracy": accuracy(finished)}
        if cell.labels["stage"] == "compare":
            model, batches = finished.model, problems_by_task(finished).values()
            write = [contributions(finished, batch) for batch in batches]
            lose = [importances(model, finished.objective, batch.part(slice(SILENCED))) for batch in batches]
            found |= {"specialisation": specialisation(*write), "specialisation_lost": specialisation(*lose)}
            found |= {"units": sum(map(effective, write)) / 2, "negligible": negligible(model)}
            found |= {"mean_length": mean_length(model), "modularity": modularity(adjacency(model))}
        return [found]

    def figure(self, table: pd.DataFrame) -> Figure:
        """Draw what is measured, by penalty: a dot per seed, those of one seed joined, and the mean."""
        canvas, rows = Figure(figsize=(11, 3.2), layout="constrained"), counted(table)
        for axes, (column, title) in zip(canvas.subplots(1, len(PANELS)), PANELS.items(), strict=True):
            values = rows.pivot(index="seed", columns="variant", values=column)
            values = values.reindex(columns=[NONE, L1, LENGTH])
            axes.plot(values.T.to_numpy(), color="0.75", lw=0.8, zorder=0)
            for i, name in enumerate(values):
                axes.plot([i] * len(values), values[name], ".", color=COLOURS[i], alpha=0.6)
                axes.plot(i, values[name].mean(), "_", color=COLOURS[i], ms=22, mew=2.5)
            axes.set_xticks(range(3), [NONE, L1, LENGTH])
            axes.set_xlim(-0.5, 2.5)
            axes.set_title(title, fontsize="medium")
            axes.grid(alpha=0.3)
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        rows = counted(table)
        units = rows.pivot(index="seed", columns="variant", values="specialisation").reindex(columns=[NONE, L1, LENGTH])
        others = {f"less {name}": name for name in (NONE, L1)}
        more = pd.DataFrame({column: units[LENGTH] - units[name] for column, name in others.items()})
        right = rows.pivot(index="seed", columns="variant", values="accuracy").reindex(columns=[NONE, L1, LENGTH])
        gained = (right[LENGTH] - right[NONE]).dropna()
        outcome, name, effect = on_their_sides(more, above=list(others), below=(), threshold=0.0)
        if effect is None or len(gained) < 2:
            return Verdict("cannot tell", f"Specialisation by length {name}: too few seeds.", None, self.rule)
        accurate = Estimate.of_mean(gained)
        if accurate.high < -self.margin:
            outcome = "does not hold"
        elif outcome == "holds" and accurate.low < -self.margin:
            outcome = "cannot tell"
        means = rows.groupby("variant").mean(numeric_only=True)
        said = "; ".join(
            f"{variant}{f' (strength {mean.strength:g})' if variant != NONE else ''} "
            f"{mean.specialisation:.2f} ({mean.specialisation_lost:.2f} by what is lost without a unit), "
            f"{mean.accuracy:.3f} of answers right, {mean.units:.0f} effective units a task, {mean.negligible:.2f} of "
            f"the weights negligible, mean length {mean.mean_length:.2f}, Newman's Q {mean.modularity:.2f}"
            for variant, mean in ((variant, means.loc[variant]) for variant in (NONE, L1, LENGTH))
        )
        differences = " and ".join(f"{column} {Estimate.of_mean(more[column].dropna()):.2f}" for column in others)
        sentence = (
            f"Specialisation of the units: {said}. By length {differences}; accuracy by length less that without "
            f"{accurate:.3f}. Read from by length {name}."
        )
        return Verdict(outcome, sentence, effect, self.rule)


def accuracy(finished: FinishedRun) -> float:
    """Return the fraction of held-out answers that are right, the mean of the two tasks'."""
    batches = problems_by_task(finished).values()
    return sum(greedy_accuracy(finished.model, finished.objective, batch) for batch in batches) / len(batches)
