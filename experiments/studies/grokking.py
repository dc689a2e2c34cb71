"""Grokking: when a model knows the sums it is shown, and when the others (Power et al., arXiv 2201.02177).

Shape letters: P numbers, D model width, F frequencies.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from scipy.special import stdtrit
from torch import Tensor

from experiments.data.modular_addition import EQUATION
from experiments.findings import Estimate, Verdict
from experiments.harness.assembly import measure
from experiments.harness.identity import Run, run_of
from experiments.harness.parts import open_data
from experiments.harness.weights import FinishedRun
from experiments.report.figures import COLOURS
from experiments.studies.ablation import at_an_end, counted, stage_of, tune
from experiments.studies.hidden_states import untrained
from experiments.studies.sides import seeds_to_tell
from experiments.studies.study import Cell, Compose, Stages, Study
from experiments.studies.tuned import evaluations

LEVEL = 0.99  # of the answers, from which on a model knows a part of the sums
PARTS = {"train": "memorised", "heldout": "generalised"}
STRONGEST = 5  # frequencies; Nanda et al. (arXiv 2301.05217) found five modulo 113


@dataclass(frozen=True)
class Grokking(Study):
    """Trains each model by each of two optimisers, at the learning rate that generalises soonest.

    models: name -> overrides. optimisers: the one that is claimed to take fewer steps, and the other. steps: of every
    run. learning_rates, widen, tuning_seed: as in `Ablation`. seeds: of the runs that count; of the pairs to train on
    as well, the same for all models and optimisers.
    """

    models: dict[str, list[str]]
    optimisers: list[str]
    steps: int
    learning_rates: list[float]
    widen: int
    tuning_seed: int
    seeds: list[int]

    def stages(self, compose: Compose) -> Stages:
        flops = {
            f"{model}, {optimiser}": self._flops(compose([*overrides, f"optim={optimiser}"]))
            for model, overrides in self.models.items()
            for optimiser in self.optimisers
        }
        cell = partial(self._cell, compose, flops, self.tuning_seed)
        chosen = yield from tune(flops, self.learning_rates, self.widen, cell, slowness)
        yield [self._cell(compose, flops, seed, name, rate) for name, rate in chosen.items() for seed in self.seeds]

    def _flops(self, config: DictConfig) -> float:
        """Return those of all steps, the optimiser's own counted."""
        found = measure(config, open_data(config))
        tokens = self.steps * (config.budget.batch_tokens // EQUATION) * EQUATION
        return found.costs.flops_per_token * tokens + found.flops_per_step * self.steps

    def _cell(self, compose: Compose, flops: dict[str, float], seed: int, variant: str, rate: float) -> Cell:
        model, optimiser = variant.split(", ")
        config = compose([*self.models[model], f"optim={optimiser}", f"optim.learning_rate={rate}", f"seed={seed}"])
        config.session.arm = variant
        config.data.tokens.seed = seed
        config.budget.flops = flops[variant]
        stage = stage_of(seed, self.tuning_seed)
        labels = {"variant": variant, "model": model, "optimiser": optimiser, "stage": stage}
        return Cell(labels | {"learning_rate": rate, "seed": seed}, run_of(config))

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """One row per evaluation, or of a run that tunes the last: the accuracies, the bits per held-out answer, the
        steps after which they are known (see `known_after`), and how much of the embedding's energy the strongest
        frequencies have before the run and after it."""
        lines = evaluations(cell.run.folder)
        found = {name: known_after(lines, part) for part, name in PARTS.items()}
        for when, model in (("before", untrained(finished)), ("after", finished.model)):
            found[f"energy_{when}"] = strongest(model.embedding.weight[: finished.data.eot].detach())
        rows = [
            {"step": line["step"], "flops_then": line["flops"], "bits": line["bits_per_byte"]}
            | {part: line["tasks"][part]["accuracy"][0] for part in PARTS}
            for line in lines
        ]
        return [row | found for row in (rows[-1:] if cell.labels["stage"] == "tune" else rows)]

    def figure(self, table: pd.DataFrame) -> Figure:
        """Accuracies above and bits per held-out answer below, against steps: a column per model, a line per seed."""
        canvas = Figure(figsize=(3.6 * len(self.models), 5.6), layout="constrained")
        panels = canvas.subplots(2, len(self.models), sharex=True, sharey="row", squeeze=False)
        rows = counted(table)
        for (above, below), model in zip(panels.T, self.models, strict=True):
            for optimiser, colour in zip(self.optimisers, COLOURS, strict=False):
                mine = rows[(rows.model == model) & (rows.optimiser == optimiser)]
                for number, (_, run) in enumerate(mine.groupby("seed")):
                    label = optimiser if number == 0 else None
                    above.plot(run.step, run.train, color=colour, ls=":", lw=1)
                    above.plot(run.step, run.heldout, color=colour, lw=1.3, label=label)
                    below.plot(run.step, run.bits, color=colour, lw=1.3)
            above.set_title(model.replace("_", " "))
            below.set(xscale="log", xlabel="steps")
            for axes in (above, below):
                axes.grid(alpha=0.3)
        panels[0, 0].set(ylabel="accuracy (dotted: trained on)", ylim=(-0.02, 1.02))
        panels[1, 0].set(ylabel="bits per held-out answer", ylim=(0, None))
        canvas.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        first, second = self.optimisers
        table = table.assign(variant=table.model + " with " + table.optimiser)
        runs = counted(table).groupby(["model", "optimiser", "seed"], sort=False).last().reset_index()
        ratios = log_ratios(runs, first, second, self.steps)
        if not ratios:
            return Verdict("cannot tell", "No model has two seeds of which one generalised.", None, self.rule)
        sooner = pooled(list(ratios.values())).map(math.exp)
        outcome = "holds" if sooner.high < 1 else "does not hold" if sooner.low > 1 else "cannot tell"
        each = ", ".join(f"{model} {math.exp(values.mean()):.2f}" for model, values in ratios.items())
        said = []
        for variant, own in runs.groupby("variant", sort=False):
            means = [geometric_mean(own[name].fillna(self.steps)) for name in PARTS.values()]
            missing = own.generalised.isna().sum()
            lacking = f" ({missing} of {len(own)} not within {self.steps})" if missing else ""
            said.append(f"{variant} {means[0]:.0f} and {means[1]:.0f}{lacking}")
        highest = counted(table).groupby("id").bits.max().groupby(runs.set_index("id").optimiser).mean()
        bumps = " and ".join(f"{highest[name]:.1f} ({name})" for name in self.optimisers)
        energies = [f"{runs[f'energy_{when}'].mean():.2f}" for when in ("before", "after")]
        sentence = (
            f"To {LEVEL} of the held-out sums {first} takes {sooner:.2f} of {second}'s steps ({each}). Steps to as "
            f"many of the sums trained on and of the others: {'; '.join(said)}. "
            f"Held-out answers cost up to {bumps} bits on the way. The {STRONGEST} strongest frequencies have "
            f"{energies[0]} of the embedding's energy at first and {energies[1]} at last."
        )
        seeds = min(len(values) for values in ratios.values())
        sentence += seeds_to_tell(outcome, sooner.map(math.log), 0.0, seeds, len(ratios))
        return Verdict(outcome, sentence + at_an_end(table), sooner, self.rule)


def known_after(lines: list[dict], part: str) -> float:
    """The step of the first evaluation at which the likeliest answer to at least LEVEL of a part of the sums is right;
    NaN where there is none."""
    return next((line["step"] for line in lines if line["tasks"][part]["accuracy"][0] >= LEVEL), math.nan)


def slowness(run: Run) -> float:
    """The steps until a run generalised, and of one that did not more than all, the less accurate it is at its end."""
    lines = evaluations(run.folder)
    step = known_after(lines, "heldout")
    return lines[-1]["step"] + 1 - lines[-1]["tasks"]["heldout"]["accuracy"][0] if math.isnan(step) else step


def strongest(embedding_PD: Tensor) -> float:
    """The part of the energy of the embedding, as a function of the number on a circle of P, that the STRONGEST
    frequencies have; the mean is none of them."""
    power_F = torch.fft.rfft(embedding_PD.double(), dim=0).abs().square().sum(1)[1:]
    return float(power_F.sort(descending=True).values[:STRONGEST].sum() / power_F.sum())


def log_ratios(runs: pd.DataFrame, first: str, second: str, steps: int) -> dict[str, pd.Series]:
    """The log of the steps to generalise by the first optimiser over those by the second, seed by seed of each model.

    A run that does not get there has taken all its steps. A seed of which neither does is left out, and a model with
    fewer than two others.
    """
    taken = runs.pivot(index=["model", "seed"], columns="optimiser", values="generalised").reindex(
        columns=[first, second]
    )
    taken = taken.dropna(how="all").fillna(steps).astype(float)
    ratios = (taken[first] / taken[second]).map(math.log)
    return {str(model): own for model, own in ratios.groupby("model", sort=False) if len(own) >= 2}


def pooled(groups: list[pd.Series]) -> Estimate:
    """The mean of the groups' means, with the 95 % interval of the scatter about these, pooled (Student's t). At least
    two values in each."""
    freedom = sum(len(group) - 1 for group in groups)
    variance = sum(float(((group - group.mean()) ** 2).sum()) for group in groups) / freedom
    error = math.sqrt(variance * sum(1 / len(group) for group in groups)) / len(groups)
    mean, half = float(np.mean([group.mean() for group in groups])), float(stdtrit(freedom, 0.975)) * error
    return Estimate(mean, mean - half, mean + half)


def geometric_mean(values: pd.Series) -> float:
    return math.exp(np.log(values.astype(float)).mean())
