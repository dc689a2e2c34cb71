"""The cost in loss of training in narrow number formats, backbone by backbone.

Shape letters: S seeds, M backbones.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.special import stdtrit

from experiments.findings import Estimate, Verdict
from experiments.harness.identity import run_of
from experiments.report.figures import COLOURS, MARKERS
from experiments.studies.ablation import counted, stage_of, tune
from experiments.studies.sides import seeds_to_tell
from experiments.studies.study import Cell, Compose, Stages, Study

FULL = "float32"


@dataclass(frozen=True)
class LowPrecision(Study):
    """Tunes the learning rate of each backbone in float32, trains it at the best in every format, and compares.

    backbones: name -> overrides of the config. formats: of `archs.number_formats`, and whether the claim is about it.
    margin: of the loss, which a format is claimed to cost less than. learning_rates: those that are tried, evenly apart
    in their log. widen: more of them at most, while the best is the last. tuning_seed: with which. seeds: of the runs
    that count, of which equal ones are pairs.
    """

    backbones: dict[str, list[str]]
    formats: dict[str, bool]
    margin: float
    learning_rates: list[float]
    widen: int
    tuning_seed: int
    seeds: list[int]

    def stages(self, compose: Compose) -> Stages:
        cell = partial(self._cell, compose, self.tuning_seed, FULL)
        chosen = yield from tune(self.backbones, self.learning_rates, self.widen, cell)
        yield [
            self._cell(compose, seed, format, name, rate)
            for name, rate in chosen.items()
            for format in (FULL, *self.formats)
            for seed in self.seeds
        ]

    def _cell(self, compose: Compose, seed: int, format: str, name: str, rate: float) -> Cell:
        narrow = f"+low_precision={{_target_:archs.low_precision.LowPrecision,format:{format}}}"
        config = compose([*self.backbones[name], *([] if format == FULL else [narrow])])
        config.session.arm = f"{name}_{format}"
        config.optim.learning_rate, config.seed, config.trainer.precision = rate, seed, FULL
        labels = {"variant": name, "format": format, "stage": stage_of(seed, self.tuning_seed)}
        return Cell(labels | {"learning_rate": rate, "seed": seed}, run_of(config))

    def figure(self, table: pd.DataFrame) -> Figure:
        """The cost of each format to each backbone in % of the loss: every pair of runs, and the mean with its
        interval."""
        canvas = Figure(figsize=(7.5, 1.6 + 0.22 * len(self.backbones) * len(self.formats)), layout="constrained")
        axes, losses = canvas.subplots(), compared(table)
        for k, format in enumerate(self.formats):
            lost_SM = self.lost(losses, format)
            for name, cost in costs(lost_SM).items():
                y = list(self.backbones).index(name) + 0.22 * (k - (len(self.formats) - 1) / 2)
                axes.plot(100 * lost_SM[name], np.full(len(lost_SM), y), ".", color=COLOURS[k], alpha=0.4)
                reach = [[100 * (cost.value - cost.low)], [100 * (cost.high - cost.value)]]
                look = {"color": COLOURS[k], "marker": MARKERS[k], "capsize": 3}
                axes.errorbar(100 * cost.value, y, xerr=reach, label=format.replace("_", " "), **look)
        axes.axvline(0, color="0.5", lw=1)
        axes.axvline(100 * self.margin, color="0.5", lw=1, ls="--", label="margin of the claim")
        axes.set_yticks(range(len(self.backbones)), [name.replace("_", " ") for name in self.backbones])
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
        axes.set(xlabel="loss more than in float32, % of the held-out bits per byte")
        handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        axes.legend(handles.values(), handles.keys(), fontsize="small")
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        losses = compared(table)
        found = {format: costs(self.lost(losses, format)) for format in self.formats}
        judged = [found[format].get(name) for format, fine in self.formats.items() if fine for name in self.backbones]
        complete = [cost for cost in judged if cost is not None]
        worst = max(complete, key=lambda cost: cost.value, default=None)
        outcome = "cannot tell"
        if any(cost.low > self.margin for cost in complete):
            outcome = "does not hold"
        elif len(complete) == len(judged) and all(cost.high < self.margin for cost in complete):
            outcome = "holds"
        said = "; ".join(
            f"{format} " + ", ".join(f"{name} {percent(cost)}" for name, cost in of_format.items())
            for format, of_format in found.items()
            if of_format
        )
        if not said:
            return Verdict(outcome, "Too few pairs of runs to compare.", None, self.rule)
        sentence = f"Loss more than in float32, in %, at the learning rate of float32: {said}."
        if undecided := [cost for cost in complete if self.margin in cost]:
            nearest = min(undecided, key=lambda cost: abs(cost.value - self.margin))
            sentence += seeds_to_tell(outcome, nearest, self.margin, len(losses), len(self.backbones))
        return Verdict(outcome, sentence, worst, self.rule)

    def lost(self, losses: pd.DataFrame, format: str) -> pd.DataFrame:
        """Returns ln(bits per byte) in a format less that in float32, of pairs of equal seed [S, M]; a backbone that
        lacks a run is left out."""
        pairs = {
            name: losses[name, format] - losses[name, FULL]
            for name in self.backbones
            if (name, format) in losses and (name, FULL) in losses
        }
        return pd.DataFrame(pairs).dropna(axis=1)


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """Returns ln(bits per byte) of the runs that count: a row per seed, a column per backbone and format."""
    losses = counted(table).pivot(index="seed", columns=["variant", "format"], values="bits_per_byte")
    return losses.astype(float).map(math.log)


def costs(lost_SM: pd.DataFrame) -> dict[str, Estimate]:
    """Returns by backbone the mean over seeds, with the 95 % interval of the scatter about these means, pooled over the
    backbones: Student's t with its M (S - 1) degrees of freedom. Empty for less than two seeds."""
    S, M = lost_SM.shape
    if S < 2 or not M:
        return {}
    means, freedom = lost_SM.mean(), M * (S - 1)
    error = math.sqrt(float(((lost_SM - means) ** 2).to_numpy().sum()) / freedom)
    half = float(stdtrit(freedom, 0.975)) * error / math.sqrt(S)
    return {str(name): Estimate(mean, mean - half, mean + half) for name, mean in means.items()}


def percent(cost: Estimate) -> str:
    """An estimate of a fraction, in %."""
    return f"{100 * cost.value:.2f} [{100 * cost.low:.2f}, {100 * cost.high:.2f}]"
