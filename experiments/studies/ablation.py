"""Ablations: variants of a model at equal FLOPs, each at a learning rate of its own, over seeds.

Shape letters: A variants, S seeds.
"""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.special import stdtrit

from experiments.findings import Estimate, Verdict, number
from experiments.harness.data_module import heldout_batches
from experiments.harness.identity import Run, run_of
from experiments.harness.run import finished
from experiments.harness.weights import FinishedRun
from experiments.report.figures import COLOURS
from experiments.studies.sides import above, seeds_to_tell
from experiments.studies.study import Cell, Compose, Stages, Study, check_named

WINDOWS = 64  # held-out ones that a trained model is looked at on


@dataclass(frozen=True)
class Ablation(Study):
    """Tunes the learning rate of each variant by one seed, trains it at the best by the others, and compares.

    variants: name -> overrides of the config, of which the name of an earlier variant stands for all of that one's.
    better, than: the variants of which the best is claimed to have a lower loss than the best of the others. margin: by
    which fraction of the loss it must be lower; below 0, by which it may be higher. shares: of the budget, for variants
    that get a part of it. begins: variants that go on from the weights of another -> its name, and the fraction of its
    learning rate that they take. learning_rates: those that are tried, evenly apart in their log. widen: more of them
    at most, while the best is the last. tuning_seed: with which. seeds: of the runs that count, of which equal ones are
    pairs.
    """

    variants: dict[str, list[str]]
    better: list[str]
    than: list[str]
    margin: float
    shares: dict[str, float]
    begins: dict[str, tuple[str, float]]
    learning_rates: list[float]
    widen: int
    tuning_seed: int
    seeds: list[int]

    def stages(self, compose: Compose) -> Stages:
        named = (*self.better, *self.than, *self.shares, *self.begins)
        check_named("compares", named, self.variants)
        chosen = {name: self.learning_rates[0] for name in self.variants if name not in self.begins}
        if len(self.learning_rates) > 1:
            cell = partial(self._cell, compose, self.tuning_seed)
            chosen = yield from tune(chosen, self.learning_rates, self.widen, cell)
        done = yield [self._cell(compose, seed, name, rate) for name, rate in chosen.items() for seed in self.seeds]
        if self.begins:
            yield [
                self._cell(compose, cell.labels["seed"], name, fraction * cell.labels["learning_rate"], cell.run.id)
                for name, (first, fraction) in self.begins.items()
                for cell in done
                if cell.labels["variant"] == first
            ]

    def overrides(self, name: str) -> list[str]:
        """Return the overrides of a variant, with those of the earlier variants that it names."""
        earlier = list(self.variants)[: list(self.variants).index(name)]
        found = ((self.overrides(word) if word in earlier else [word]) for word in self.variants[name])
        return [override for overrides in found for override in overrides]

    def _cell(self, compose: Compose, seed: int, name: str, rate: float, init_from: str | None = None) -> Cell:
        config = compose(self.overrides(name))
        config.session.arm, config.init_from = name, init_from
        config.budget.flops *= self.shares.get(name, 1)
        config.optim.learning_rate, config.seed = rate, seed
        labels = {"variant": name, "stage": stage_of(seed, self.tuning_seed)}
        return Cell(labels | {"learning_rate": rate, "seed": seed}, run_of(config))

    @torch.no_grad()
    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """Return what parts of the model say of themselves, such as experts of their loads, on the first held-out
        windows."""
        settings = finished.config.data
        batch = heldout_batches(finished.data, settings.sequence_length, settings.packed, WINDOWS)[0]
        finished.objective.loss(finished.model.train(), batch, torch.Generator().manual_seed(0))
        return [finished.model.telemetry()]

    def figure(self, table: pd.DataFrame) -> Figure:
        """Held-out bits per byte of each variant: every run, and the mean over seeds with its interval."""
        canvas = Figure(figsize=(7.5, 1.4 + 0.42 * len(self.variants)), layout="constrained")
        axes, rows = canvas.subplots(), compared(table)
        _, error, reach = additive(rows) if len(rows.columns) > 1 else (None, math.nan, math.nan)
        for i, name in enumerate(self.variants):
            if name not in rows:
                continue
            side = COLOURS[0] if name in self.better else COLOURS[1] if name in self.than else "0.5"
            losses = np.exp(rows[name])
            axes.plot(losses, np.full(len(losses), i), ".", color=side, alpha=0.5)
            mean = math.exp(rows[name].mean())
            axes.errorbar(mean, i, xerr=mean * error * reach / math.sqrt(len(rows)), color=side, marker="o", capsize=3)
        axes.set_yticks(range(len(self.variants)), list(self.variants))
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
        axes.set(xlabel="held-out bits per byte")
        axes.set_title("blue: claimed to be better than orange", fontsize="medium")
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        rows = compared(table)
        sides = [[name for name in side if name in rows] for side in (self.better, self.than)]
        if not all(sides) or len(rows) < 2:
            sentence = f"{len(rows.columns)} variants over {len(rows)} seeds are too few to compare."
            return Verdict("cannot tell", sentence, None, self.rule)
        mean, error, reach = additive(rows)
        best, rival = (min(side, key=lambda name: mean[name]) for side in sides)
        half = reach * error * math.sqrt(2 / len(rows))
        effect = Estimate(mean[rival] - mean[best], mean[rival] - mean[best] - half, mean[rival] - mean[best] + half)
        outcome = above(effect, self.margin)
        said = ", ".join(f"{name} {math.exp(mean[str(name)]):.3f}" for name in rows)
        state = table[table.stage == "compare"].groupby("variant").state_bytes.first()
        sentence = (
            f"Held-out bits per byte, {'each at its own' if len(self.learning_rates) > 1 else 'all at one'} learning "
            f"rate: {said}. {rival} less {best}: "
            f"{100 * effect.value:.2f} % of the loss [{100 * effect.low:.2f}, {100 * effect.high:.2f}], where a run "
            f"scatters by {100 * error:.2f} %; bytes of decode state {number(state[best])} for {best}, "
            f"{number(state[rival])} for {rival}."
        )
        sentence += seeds_to_tell(outcome, effect, self.margin, len(rows), len(rows.columns) - 1)
        return Verdict(outcome, sentence + usage(table) + at_an_end(table), effect, self.rule)


def final_loss(run: Run) -> float:
    """The held-out bits per byte of a run, infinite where it has none."""
    row = finished(run)
    return math.inf if row is None or row["bits_per_byte"] is None else row["bits_per_byte"]


def tune(
    names: Iterable[str],
    learning_rates: Sequence[float],
    widen: int,
    cell: Callable[[str, float], Cell],
    loss: Callable[[Run], float] = final_loss,
) -> Generator[Iterable[Cell], list[Cell], dict[str, float]]:
    """Return the best learning rate of each variant, of those given and of up to `widen` more beyond the last while
    that is the best; one that has none keeps the first. cell: of a variant, its label, and a learning rate. loss: of a
    run that is done, the less the better."""
    rates = sorted(learning_rates)
    step = rates[1] / rates[0]
    tried: dict[str, dict[float, float]] = {name: dict.fromkeys(rates, math.inf) for name in names}
    cells = [cell(name, rate) for name in tried for rate in rates]
    for more in range(widen + 1):
        for done in (yield cells):
            tried[done.labels["variant"]][done.labels["learning_rate"]] = loss(done.run)
        cells = []
        for name, losses in tried.items():
            best = min(losses, key=lambda rate: losses[rate])
            if more < widen and best in (min(losses), max(losses)) and losses[best] < math.inf:
                beyond = float(f"{best * step if best == max(losses) else best / step:.3g}")
                losses[beyond] = math.inf
                cells.append(cell(name, beyond))
        if not cells:
            break
    return {name: min(losses, key=lambda rate: losses[rate]) for name, losses in tried.items()}


def at_an_end(table: pd.DataFrame) -> str:
    """Names the variants whose best learning rate is the least or the greatest of those that they were tried at."""
    found = []
    for name, runs in table.groupby("variant", sort=False):
        tried, chosen = runs.learning_rate, runs.learning_rate[runs.stage == "compare"]
        if tried.nunique() > 1 and len(chosen) and chosen.iloc[0] in (tried.min(), tried.max()):
            found.append(str(name))
    return f" Best at an end of the rates tried: {', '.join(found)}." if found else ""


def usage(table: pd.DataFrame) -> str:
    """Says how evenly the models that have experts use them, in the mean over layers and seeds; "" where none has."""
    if "expert_load" not in table:
        return ""
    means = table[table.stage == "compare"].groupby("variant", sort=False)[["expert_load", "dead_experts"]].mean()
    said = (f"{name} {row.expert_load:.2f} and {row.dead_experts:.2f}" for name, row in means.dropna().iterrows())
    return f" The load of the fullest expert over the mean, and the share of experts never chosen: {', '.join(said)}."


def stage_of(seed: int, tuning_seed: int) -> str:
    """Return the stage of a run by its seed, "tune" or "compare", as `counted` asks for it."""
    return "tune" if seed == tuning_seed else "compare"


def counted(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of finished runs that count, which those that tune do not."""
    return table[(table.status == "done") & (table.stage == "compare")]


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """Returns ln(bits per byte) [S, A] of the runs that count; a variant that lacks a seed is left out."""
    losses = counted(table).pivot(index="seed", columns="variant", values="bits_per_byte")
    names = [name for name in dict.fromkeys(table.variant) if name in losses]
    return losses[names].astype(float).map(math.log).dropna(axis=1)


def additive(losses: pd.DataFrame) -> tuple[pd.Series, float, float]:
    """Returns the means of variants [A], the standard deviation of a run about the sum of its variant and its seed,
    pooled over all, and Student's t for a 95 % interval with its (A - 1)(S - 1) degrees of freedom."""
    values, means = losses.to_numpy(), losses.mean(axis=0)
    residual = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    freedom = (len(losses) - 1) * (len(losses.columns) - 1)
    if freedom < 1:
        return means, math.nan, math.nan
    error = math.sqrt(float((residual**2).sum()) / freedom)
    return means, error, float(stdtrit(freedom, 0.975))
