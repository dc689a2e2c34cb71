"""Models that are pre-trained once and then tuned in several ways with the same FLOPs: what such studies share."""

import json
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from experiments.findings import number
from experiments.harness.identity import run_of
from experiments.harness.training import EVALUATIONS
from experiments.harness.weights import FinishedRun
from experiments.report.figures import COLOURS, MARKERS
from experiments.studies.study import Cell, Compose, Stages, Study

BASE = "base"  # the arm of what is pre-trained and not tuned
MEASURES = {
    "pass@1": "pass@1",
    "pass@4": "pass@4",
    "pass@16": "pass@16",
    "majority": "majority of 16",
    "length": "tokens per answer",
}


@dataclass(frozen=True)
class Tuned(Study, ABC):
    """Pre-trains each model, and tunes it by each of its arms from each seed.

    models: name -> `overrides` of the config, and the `arms` by which it is tuned. tuning: overrides of every tuned
    run. arms: name -> overrides that tell it from the others. seeds: of the tuned runs.
    """

    models: dict[str, dict]
    tuning: list[str]
    arms: dict[str, list[str]]
    seeds: list[int]

    def stages(self, compose: Compose) -> Stages:
        """
        Raises:
            ValueError: for a model with an arm that there is none of.
        """
        for name, model in self.models.items():
            if missing := [arm for arm in model["arms"] if arm not in self.arms]:
                raise ValueError(f"model {name!r} has an arm {missing[0]!r}: choose from {', '.join(self.arms)}")
        done = yield [
            Cell({"model": name, "arm": BASE, "seed": 0}, run_of(compose(model["overrides"])))
            for name, model in self.models.items()
        ]
        yield [
            self.tuned(compose, base, arm, seed)
            for base in done
            for arm in self.models[base.labels["model"]]["arms"]
            for seed in self.seeds
        ]

    def tuned(self, compose: Compose, base: Cell, arm: str, seed: int) -> Cell:
        """Returns a run that goes on from a base."""
        own = [*self.tuning, *self.arms[arm], f"seed={seed}", f"init_from={base.run.id}"]
        config = compose([*self.models[base.labels["model"]]["overrides"], *own])
        return Cell(base.labels | {"arm": arm, "seed": seed}, run_of(config))

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """One row per evaluation, with the FLOPs of the run until then."""
        return [
            {"step": line["step"], "flops_then": line["flops"]} | scores(line["tasks"])
            for line in evaluations(cell.run.folder)
        ]


def evaluations(folder: Path) -> list[dict]:
    """Return what the evaluations of the run in a folder have found, step by step."""
    lines = (folder / EVALUATIONS).read_text().splitlines()
    last = {line["step"]: line for line in map(json.loads, lines)}
    return [line for _, line in sorted(last.items())]


def scores(tasks: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Columns of the scores of the only task, with the ends of their intervals. pass@k is by the true check, `reward`
    the fraction of answers that the reward is given to."""
    (found,) = tasks.values()
    found = {"reward": found["pass@1"]} | found
    if "gold@1" in found:
        del found["majority"]  # by the reward
        found |= {f"pass{name.removeprefix('gold')}": value for name, value in found.items() if name[:5] == "gold@"}
    return {
        name + end: value
        for name, values in found.items()
        if not name.startswith("gold")
        for end, value in zip(("", "_low", "_high"), values, strict=True)
    }


def final(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of the last evaluation of each run."""
    if "step" not in table:
        return table.iloc[:0].assign(**dict.fromkeys(MEASURES))
    return table.dropna(subset="step").sort_values("step").groupby("id").tail(1).sort_index()


def draw(panels: Sequence[Axes], rows: pd.DataFrame, arms: Sequence[str], x: str, label: str) -> None:
    """Draw each measure of one model in a panel against the column x: its arms, seed by seed and in the mean, and where
    they have begun, with its interval."""
    base = final(rows[rows.arm == BASE])
    for axes, (column, title) in zip(panels, MEASURES.items(), strict=False):
        for _, start in base.iterrows():
            axes.axhline(start[column], color="grey", lw=1, label="before")
            axes.axhspan(start[column + "_low"], start[column + "_high"], color="grey", alpha=0.15, lw=0)
        for arm in dict.fromkeys(rows.arm[rows.arm != BASE]):
            look = {"color": COLOURS[list(arms).index(arm)], "marker": MARKERS[list(arms).index(arm)]}
            runs = rows[(rows.arm == arm) & rows[column].notna()]
            for _, run in runs.groupby("id"):
                axes.plot(run[x], run[column], color=look["color"], lw=0.7, alpha=0.4)
            mean = runs.groupby("step")[[x, column]].mean()
            axes.plot(mean[x], mean[column], label=arm.replace("_", " "), **look)
        axes.set(xscale="log", title=title, xlabel=label)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: number(value, 1))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
