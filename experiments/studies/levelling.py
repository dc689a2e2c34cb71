"""Levelling off: what more text still gives to models of several sizes (Hoffmann et al., arXiv 2203.15556)."""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.findings import Estimate, Verdict, number
from experiments.harness.assembly import measure
from experiments.harness.identity import run_of
from experiments.harness.parts import open_data
from experiments.report.figures import COLOURS, MARKERS, tick_values
from experiments.studies.ablation import counted, stage_of, tune
from experiments.studies.sides import above, seeds_to_tell
from experiments.studies.study import Cell, Compose, Stages, Study


@dataclass(frozen=True)
class Levelling(Study):
    """Trains each size on each number of tokens, every one of these at a learning rate of its own, over seeds.

    sizes: name -> overrides of the config, the smallest first. tokens: from the fewest to the most. learning_rates:
    those that are tried, evenly apart in their log. widen: more of them at most, while the best is the last.
    tuning_seed: with which. seeds: of the runs that count, of which equal ones are pairs.
    """

    sizes: dict[str, list[str]]
    tokens: list[float]
    learning_rates: list[float]
    widen: int
    tuning_seed: int
    seeds: list[int]

    def stages(self, compose: Compose) -> Stages:
        places = {}
        for size, overrides in self.sizes.items():
            config = compose(overrides)
            flops_per_token = measure(config, open_data(config)).costs.flops_per_token
            places |= {f"{size} {tokens:g}": (size, tokens, flops_per_token * tokens) for tokens in self.tokens}
        cell = partial(self._cell, compose, places, self.tuning_seed)
        chosen = yield from tune(places, self.learning_rates, self.widen, cell)
        yield [self._cell(compose, places, seed, name, rate) for name, rate in chosen.items() for seed in self.seeds]

    def _cell(
        self, compose: Compose, places: dict[str, tuple[str, float, float]], seed: int, name: str, rate: float
    ) -> Cell:
        size, tokens, flops = places[name]
        config = compose(self.sizes[size])
        config.session.arm, config.seed, config.optim.learning_rate = size, seed, rate
        config.budget.flops = flops
        labels = {"variant": name, "size": size, "asked": tokens}
        labels["stage"] = stage_of(seed, self.tuning_seed)
        return Cell(labels | {"learning_rate": rate, "seed": seed}, run_of(config))

    def figure(self, table: pd.DataFrame) -> Figure:
        """Held-out bits per byte against the tokens of the training, size by size: every run, and the means."""
        canvas = Figure(figsize=(6.5, 4.2), layout="constrained")
        axes = canvas.subplots()
        for i, (size, runs) in enumerate(counted(table).groupby("size", sort=False)):
            axes.plot(runs.tokens, runs.bits_per_byte, ".", color=COLOURS[i], alpha=0.5)
            means = runs.groupby("asked")[["tokens", "bits_per_byte"]].mean()
            label = f"{size}, {number(float(runs.params_total.iloc[0]))} parameters"
            axes.plot(means.tokens, means.bits_per_byte, color=COLOURS[i], marker=MARKERS[i], label=label)
        axes.set(xscale="log", yscale="log", xlabel="training tokens", ylabel="held-out bits per byte")
        tick_values(axes)
        axes.grid(alpha=0.3)
        axes.legend()
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        runs = counted(table)
        first, last = min(self.tokens), max(self.tokens)
        losses = runs.pivot(index="seed", columns=["size", "asked"], values="bits_per_byte").astype(float).map(math.log)
        gains = {
            size: (losses[size, first] - losses[size, last]).dropna()
            for size in self.sizes
            if (size, first) in losses and (size, last) in losses
        }
        small, large = list(self.sizes)[0], list(self.sizes)[-1]
        pairs = (gains[large] - gains[small]).dropna() if {small, large} <= gains.keys() else pd.Series(dtype=float)
        if len(pairs) < 2:
            return Verdict("cannot tell", f"{len(pairs)} seeds of both sizes are too few to tell.", None, self.rule)
        effect = Estimate.of_mean(pairs)
        outcome = above(effect, 0.0)
        params = runs.groupby("size").params_total.first()
        said = "; ".join(
            f"{size}, of {number(float(params[size]))} parameters, by {100 * gain.mean():.2f} %, from "
            f"{np.exp(losses[size, first].mean()):.3f} to {np.exp(losses[size, last].mean()):.3f} bits per byte"
            for size, gain in gains.items()
        )
        sentence = (
            f"{number(last / first, 2)} times the text, {number(last)} tokens for {number(first)}, lowers the loss: "
            f"{said}. {large} gains {100 * effect.value:.2f} % of the loss [{100 * effect.low:.2f}, "
            f"{100 * effect.high:.2f}] more than {small}."
        )
        sentence += seeds_to_tell(outcome, effect, 0.0, len(pairs))
        return Verdict(outcome, sentence, effect, self.rule)
