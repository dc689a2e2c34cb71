"""Who wins when data is short: every objective reads the first tokens of a corpus once, twice and so on (Prabhudesai et
al., arXiv 2507.15857; Ni et al., 2511.03276, at playground size)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.special import stdtrit

from experiments.findings import Estimate, Verdict
from experiments.harness.assembly import measure
from experiments.harness.identity import run_of
from experiments.harness.parts import open_data
from experiments.report.figures import COLOURS, MARKERS
from experiments.studies.sides import above, seeds_to_tell
from experiments.studies.study import Cell, Compose, Study


@dataclass(frozen=True)
class RepeatedData(Study):
    """Trains one backbone under each objective for each number of epochs and each seed.

    train_tokens: of the corpus that are read, the first ones. objectives: the challenger and the champion, in this
        order.
    """

    train_tokens: int
    epochs: list[int]
    objectives: list[str]
    seeds: list[int]

    def cells(self, compose: Compose) -> Iterator[Cell]:
        for objective in self.objectives:
            base = compose([f"objective={objective}"])
            base.data.tokens = {
                "_target_": "experiments.data.token_data.beginning",
                "data": base.data.tokens,
                "train_tokens": self.train_tokens,
            }
            cost = measure(base, open_data(base)).costs.flops_per_token
            for seed in self.seeds:
                for epochs in self.epochs:
                    config = base.copy()
                    config.seed, config.budget.flops = seed, cost * self.train_tokens * epochs
                    yield Cell({"objective": objective, "epochs": epochs, "seed": seed}, run_of(config))

    def figure(self, table: pd.DataFrame) -> Figure:
        """Held-out bits per byte against epochs, with intervals over seeds."""
        canvas = Figure(figsize=(7, 4.6), layout="constrained")
        axes, rows = canvas.subplots(), summary(table)
        for i, name in enumerate(dict.fromkeys(table.objective)):
            curve = rows[rows.objective == name]
            bound = (table[table.objective == name].bits_per_byte_kind == "bound").any()
            axes.errorbar(
                curve.epochs, curve["mean"], curve.reach, color=COLOURS[i], marker=MARKERS[i], capsize=3,
                label=f"{name} (upper bound)" if bound else name,
            )  # fmt: skip
        ticks = sorted(set(rows.epochs))
        axes.set(xscale="log", xlabel="epochs over the same tokens", ylabel="held-out bits per byte")
        axes.set_xticks(ticks, [str(n) for n in ticks], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        """From the best number of epochs of each objective, seed by seed."""
        challenger, champion = self.objectives
        done = table[table.status == "done"]
        lowest = done.groupby(["objective", "seed"]).bits_per_byte.min().unstack("objective")
        if len(lowest) < 2 or lowest.isna().any(axis=None):
            return Verdict("cannot tell", f"{len(lowest)} seeds are too few to compare.", None, self.rule)
        effect = Estimate.of_mean(lowest[champion] - lowest[challenger])
        outcome = above(effect, 0.0)
        means = summary(table)
        best = means.loc[means.groupby("objective")["mean"].idxmin()].set_index("objective")
        said = ", ".join(
            f"{name} {best['mean'][name]:.3f} after {best.epochs[name]} epochs" for name in self.objectives
        )
        at = leads(table, challenger, champion)
        ahead = "; ".join(f"{name} is ahead at {', '.join(map(str, epochs)) or 'none'}" for name, epochs in at.items())
        sentence = (
            f"Best held-out bits per byte: {said}; {champion} less {challenger} is {effect:.3f}. By epochs: {ahead}."
        )
        sentence += seeds_to_tell(outcome, effect, 0.0, len(lowest))
        return Verdict(outcome, sentence, effect, self.rule)


def leads(table: pd.DataFrame, challenger: str, champion: str) -> dict[str, list[int]]:
    """The numbers of epochs at which each is ahead, as far as the differences of runs of the same seed tell."""
    ahead: dict[str, list[int]] = {champion: [], challenger: []}
    done = table[table.status == "done"].pivot(index=["epochs", "seed"], columns="objective", values="bits_per_byte")
    for epochs in done.index.unique("epochs"):
        rows = done.loc[epochs]
        difference = (rows[champion] - rows[challenger]).dropna()
        if len(difference) >= 2 and 0.0 not in (effect := Estimate.of_mean(difference)):
            ahead[challenger if effect.value > 0 else champion].append(epochs)
    return ahead


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Of every objective and number of epochs the mean over seeds, and half of its 95 % interval (Student's t)."""
    done = table[table.status == "done"]
    groups = done.groupby(["objective", "epochs"], sort=False).bits_per_byte.agg(["mean", "std", "count"]).reset_index()
    reach = stdtrit(np.maximum(groups["count"] - 1, 1), 0.975) * groups["std"] / np.sqrt(groups["count"])
    return groups.assign(reach=reach)
