"""Abilities by the loss: whether models of another size or kind can do at a loss what those known could do at it (Wei
et al., arXiv 2206.07682; Du et al., 2403.15796)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from experiments.findings import Estimate, Verdict, number
from experiments.harness.weights import FinishedRun
from experiments.report.figures import COLOURS, MARKERS
from experiments.studies.sides import above, seeds_to_tell
from experiments.studies.study import Cell, Compose, Study, check_named, over_seeds
from experiments.studies.tuned import evaluations

LEARNING = (0.05, 0.95)  # accuracies between which a task is being learnt


@dataclass(frozen=True)
class Abilities(Study):
    """Trains each architecture from each seed on several tasks at once, one rate for all, and reads from its
    evaluations the held-out loss over all tasks and the accuracy of each.

    architectures: name -> overrides of the config. known: those whose evaluations make the curve of each task, the
    accuracy as a falling function of the loss; the others are read on it. seeds: of the runs. margin: the mean error
    from which on accuracies are not predicted.
    """

    architectures: dict[str, list[str]]
    known: list[str]
    seeds: list[int]
    margin: float

    def cells(self, compose: Compose) -> Iterator[Cell]:
        check_named("knows", self.known, self.architectures)
        return over_seeds(compose, self.architectures, self.seeds)

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """One row per evaluation and task."""
        return [
            {"step": line["step"], "loss": line["bits_per_byte"], "task": task, "accuracy": scores["pass@1"][0]}
            for line in evaluations(cell.run.folder)
            for task, scores in line["tasks"].items()
        ]

    def figure(self, table: pd.DataFrame) -> Figure:
        """Accuracy against the loss, a panel per task: the curve of those known, and a line per run."""
        done = table[table.status == "done"]
        tasks = list(done.task.unique())
        canvas = Figure(figsize=(3.6 * len(tasks), 4.0), layout="constrained")
        panels = canvas.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for panel, task in zip(panels, tasks, strict=True):
            rows = done[done.task == task]
            for i, name in enumerate(self.architectures):
                look = {"color": COLOURS[i], "marker": MARKERS[i], "ms": 3, "lw": 0 if name in self.known else 0.8}
                for first, (_, run) in enumerate(rows[rows.architecture == name].groupby("seed")):
                    panel.plot(run.loss, run.accuracy, label=None if first else name.replace("_", " "), **look)
            losses = np.sort(rows[rows.architecture.isin(self.known)].loss)
            panel.plot(losses, expected(rows[rows.architecture.isin(self.known)], losses), color="k", label="curve")
            panel.set(xscale="log", xlabel="held-out loss over all tasks, bits per byte", title=task)
            panel.invert_xaxis()
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("accuracy")
        canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        done = table[table.status == "done"]
        is_known = done.architecture.isin(self.known)
        asked = errors(done[is_known], done[~is_known])
        seeds = asked.groupby("seed").error.mean()
        if len(seeds) < 2:
            return Verdict("cannot tell", f"{len(seeds)} seeds are too few to judge.", None, self.rule)
        effect = Estimate.of_mean(seeds)
        outcome = above(effect, self.margin)
        among = [errors(done[is_known & (done.id != run)], done[done.id == run]) for run in done[is_known].id.unique()]
        each = asked.groupby(["architecture", "task"], sort=False).error.mean().reset_index()
        said = ", ".join(f"{row.architecture} at {row.task} {row.error:.3f}" for row in each.itertuples())
        where = "; ".join(
            f"{task} " + ", ".join(f"{name} {jump(runs)}" for name, runs in rows.groupby("architecture", sort=False))
            for task, rows in done.groupby("task", sort=False)
        )
        sentence = (
            f"What is read at their loss from the curve of {' and '.join(self.known)} misses the accuracy of the "
            f"others by {effect:.3f} while they learn ({said}); the accuracy of a run of the known ones, from the "
            f"curve of the rest, by {pd.concat(among).error.mean():.3f}. Half of the answers are right from a loss of: "
            f"{where} bits per byte."
        )
        sentence += seeds_to_tell(outcome, effect, self.margin, len(seeds))
        return Verdict(outcome, sentence, effect, self.rule)


def expected(known: pd.DataFrame, losses: np.ndarray) -> np.ndarray:
    """Return the accuracies at losses: the falling step function closest to the evaluations of one task (isotonic
    regression), with straight lines in between, in the log of the loss."""
    known = known.sort_values("loss")
    fitted = isotonic_regression(known.accuracy.to_numpy(float), increasing=False).x
    return np.interp(np.log(losses), np.log(known.loss.to_numpy(float)), fitted)


def errors(known: pd.DataFrame, asked: pd.DataFrame) -> pd.DataFrame:
    """Return the evaluations of the asked runs, task by task, with what is `expected` and the absolute `error`: those
    at a loss that the known runs had too, and with what is found or expected between the ends of LEARNING."""
    found = []
    for task, rows in asked.groupby("task", sort=False):
        own = known[known.task == task]
        rows = rows[rows.loss.between(own.loss.min(), own.loss.max())]
        rows = rows.assign(expected=expected(own, rows.loss.to_numpy(float)))
        learning = rows.accuracy.between(*LEARNING) | rows.expected.between(*LEARNING)
        found.append(rows[learning].assign(error=(rows.accuracy - rows.expected).abs()))
    return pd.concat(found)


def jump(runs: pd.DataFrame) -> str:
    """Says at which loss runs get half of a task right, in the mean over seeds, and how many do."""
    losses = [loss for _, run in runs.groupby("seed") if not np.isnan(loss := halfway(run))]
    some = "" if len(losses) == runs.seed.nunique() else f" ({len(losses)} of {runs.seed.nunique()} runs)"
    return number(float(np.mean(losses)) if losses else None) + some


def halfway(run: pd.DataFrame) -> float:
    """Return the loss at which the accuracy of one run first reaches a half, between two evaluations by a straight line
    in the log of the loss; NaN where it does not."""
    run = run.sort_values("step")
    reached = np.flatnonzero(run.accuracy >= 0.5)
    if not len(reached):
        return np.nan
    two = run.iloc[max(reached[0] - 1, 0) : reached[0] + 1]
    return float(np.exp(np.interp(0.5, two.accuracy, np.log(two.loss.astype(float)))))
