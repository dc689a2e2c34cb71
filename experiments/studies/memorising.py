"""What comes first in a run: to know what is read by heart, or to answer what is not (Power et al., arXiv 2201.02177;
Arpit et al., 1706.05394)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from experiments.findings import Estimate, Verdict
from experiments.harness.assembly import measure
from experiments.harness.identity import run_of
from experiments.harness.parts import open_data
from experiments.harness.weights import FinishedRun
from experiments.report.figures import COLOURS
from experiments.studies.sides import on_their_sides, seeds_to_tell
from experiments.studies.study import Cell, Compose, Study, check_named
from experiments.studies.tuned import evaluations

HALF = 0.5  # of the largest


@dataclass(frozen=True)
class Memorising(Study):
    """Trains each arm from each seed on its data again and again, and looks at both parts of the data on the way.

    A model has generalised when its accuracy on the held-out part has reached half of its largest, and memorised when
    its lead, the accuracy on what it reads less that on the held-out part, has reached half of its own.

    data: name -> `overrides` of the config, which say on how many windows accuracies are taken, and the `tokens` of a
    corpus that each seed reads, windows that no other reads; null for data that draw their parts by a seed themselves.
    arms: name -> `data`, one of these names, and `overrides`. epochs: of every run, which is evaluated after each.
    least: a largest lead below it is none: such a run memorises at its end. seeds: of the runs.
    """

    data: dict[str, dict]
    arms: dict[str, dict]
    epochs: int
    least: float
    seeds: list[int]

    def cells(self, compose: Compose) -> Iterator[Cell]:
        check_named("has an arm with the data", (arm["data"] for arm in self.arms.values()), self.data)
        for name, arm in self.arms.items():
            read = self.data[arm["data"]]
            for seed in self.seeds:
                config = compose([*read["overrides"], *arm["overrides"], f"seed={seed}"])
                config.session.arm, config.trainer.evaluations = name, self.epochs
                if read["tokens"] is None:
                    config.data.tokens.seed = seed
                else:
                    config.data.tokens = {
                        "_target_": "experiments.data.window_parts.part_of_windows",
                        "data": config.data.tokens,
                        "sequence_length": config.data.sequence_length,
                        "train_tokens": read["tokens"],
                        "part": seed,
                    }
                data = open_data(config)
                config.budget.flops = measure(config, data).costs.flops_per_token * len(data.train) * self.epochs
                yield Cell({"arm": name, "seed": seed}, run_of(config))

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """One row per evaluation: the accuracies on what is read and on the held-out part."""
        parts = ("train", "heldout")
        lines = evaluations(cell.run.folder)
        return [{"step": line["step"]} | {part: line["tasks"][part]["accuracy"][0] for part in parts} for line in lines]

    def figure(self, table: pd.DataFrame) -> Figure:
        """Both accuracies against steps, a panel per arm, a line per seed."""
        canvas = Figure(figsize=(3.3 * len(self.arms), 3.4), layout="constrained")
        panels = canvas.subplots(1, len(self.arms), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, self.arms, strict=True):
            for number, (_, run) in enumerate(table[table.arm == name].dropna(subset="train").groupby("seed")):
                for part, colour, said in (("train", COLOURS[1], "read"), ("heldout", COLOURS[0], "held out")):
                    axes.plot(run.step, run[part], color=colour, lw=1, label=None if number else said)
            axes.set(xscale="log", xlabel="steps", title=name.replace("_", " "), ylim=(-0.02, 1.02))
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("accuracy")
        panels[0].legend()
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        found = steps_of(table, self.least)
        ratios = (found.memorised / found.generalised).map(math.log).unstack("arm")
        outcome, name, effect = on_their_sides(ratios, above=[], below=list(self.arms), threshold=0.0)
        if effect is None:
            return Verdict(outcome, f"{name} has too few seeds to tell.", None, self.rule)
        means = found[["memorised", "generalised"]].map(math.log).groupby("arm", sort=False).mean().map(math.exp)
        said = []
        for arm in means.index.map(str):
            ratio = Estimate.of_mean(ratios[arm].dropna()).map(math.exp)
            said.append(
                f"{arm} {means.memorised[arm]:.0f} and {means.generalised[arm]:.0f} ({ratio} times; the lead reaches "
                f"{found.lead[arm].mean():.2f}, the accuracy on held-out data {found.best[arm].mean():.2f})"
            )
        sentence = (
            "Steps to half of the largest lead on what is read, and to half of the largest accuracy on held-out data: "
            f"{'; '.join(said)}. Read from {name}."
        )
        sentence += seeds_to_tell(outcome, effect, 0.0, len(ratios[name].dropna()))
        return Verdict(outcome, sentence, effect.map(math.exp), self.rule)


def steps_of(table: pd.DataFrame, least: float) -> pd.DataFrame:
    """Returns by arm and seed the steps at which a run had `memorised` and `generalised`, its largest `lead`, and its
    `best` accuracy on held-out data. A run that never answers any of these right is left out."""
    found = []
    for (arm, seed), run in table[table.status == "done"].sort_values("step").groupby(["arm", "seed"], sort=False):
        lead, best = run.train - run.heldout, run.heldout.max()
        if best == 0:
            continue
        memorised = run.step[lead >= HALF * lead.max()].iloc[0] if lead.max() >= least else run.step.iloc[-1]
        generalised = run.step[run.heldout >= HALF * best].iloc[0]
        found.append((arm, seed, memorised, generalised, lead.max(), best))
    columns = ["arm", "seed", "memorised", "generalised", "lead", "best"]
    return pd.DataFrame(found, columns=columns).set_index(["arm", "seed"])
