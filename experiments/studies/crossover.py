"""Crossover: the compute at which an objective that gains longer from repeated data overtakes one that is ahead, over
sizes of the corpus, against a published law (Prabhudesai et al., arXiv 2507.15857)."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from experiments.findings import Estimate, Verdict, number
from experiments.harness.assembly import measure
from experiments.harness.identity import run_of
from experiments.harness.parts import open_data
from experiments.report.figures import COLOURS, MARKERS
from experiments.studies.ablation import counted, final_loss, stage_of
from experiments.studies.study import Cell, Compose, Stages, Study, check_named


class Place(NamedTuple):
    """A run but for its seed."""

    arm: str
    corpus: int
    setting: str
    epochs: int


@dataclass(frozen=True)
class Crossover(Study):
    """Finds, by a seed of its own, where on each corpus the challenger passes the champions at their best, and trains
    what lies on both sides of that with the seeds that count.

    law: FLOPs at which it is claimed to pass with a million tokens, and their exponent in the tokens. within: which
    fraction of the exponent counts as the same. corpora: their tokens. arms: name -> `overrides`, names of `settings`,
    and `epochs` from few to many; the challenger last. settings: name -> overrides. tuning_seed: of the search. seeds:
    of the runs that count.
    """

    law: tuple[float, float]
    within: float
    corpora: list[int]
    arms: dict[str, dict]
    settings: dict[str, list[str]]
    tuning_seed: int
    seeds: list[int]

    @property
    def challenger(self) -> str:
        return list(self.arms)[-1]

    @property
    def champions(self) -> list[str]:
        return list(self.arms)[:-1]

    def stages(self, compose: Compose) -> Stages:
        """
        Raises:
            ValueError: for an arm with a setting that there is none of.
        """
        for arm in self.arms.values():
            check_named("has an arm with the setting", arm["settings"], self.settings)
        tried: dict[Place, Cell] = {}

        def trials(arm: str, corpora: Iterable[int], epochs: Iterable[int]) -> Iterator[Cell]:
            for place in (
                Place(arm, corpus, setting, n)
                for corpus in corpora
                for setting in self.arms[arm]["settings"]
                for n in epochs
            ):
                tried[place] = self._cell(compose, place, self.tuning_seed)
                yield tried[place]

        yield [cell for arm in self.champions for cell in trials(arm, self.corpora, self.arms[arm]["epochs"])]
        climbing, lowest = self.corpora, dict.fromkeys(self.corpora, math.inf)
        for epochs in self.arms[self.challenger]["epochs"]:
            if not climbing:
                break
            yield list(trials(self.challenger, climbing, [epochs]))
            losses = {place: final_loss(cell.run) for place, cell in tried.items()}
            to_beat = {corpus: min(best(losses, arm, corpus)[1] for arm in self.champions) for corpus in climbing}
            now = {corpus: best(losses, self.challenger, corpus)[1] for corpus in climbing}
            climbing = [corpus for corpus in climbing if to_beat[corpus] < now[corpus] < lowest[corpus]]
            lowest |= now
        losses = {place: final_loss(cell.run) for place, cell in tried.items()}
        flops = {place: float(cell.run.config.budget.flops) for place, cell in tried.items()}
        chosen = [place for corpus in self.corpora for place in self._sides(losses, flops, corpus)]
        yield [self._cell(compose, place, seed) for place in dict.fromkeys(chosen) for seed in self.seeds]

    def _cell(self, compose: Compose, place: Place, seed: int) -> Cell:
        arm, corpus, setting, epochs = place
        config = compose([*self.arms[arm]["overrides"], *self.settings[setting]])
        config.session.arm, config.seed = arm, seed
        config.data.tokens = {
            "_target_": "experiments.data.spread.spread",
            "data": config.data.tokens,
            "train_tokens": corpus,
            "length": config.data.sequence_length,
        }
        config.budget.flops = measure(config, open_data(config)).costs.flops_per_token * corpus * epochs
        labels = place._asdict() | {"stage": stage_of(seed, self.tuning_seed), "seed": seed}
        return Cell(labels, run_of(config))

    def _sides(self, losses: dict[Place, float], flops: dict[Place, float], corpus: int) -> Iterator[Place]:
        """Yield the places where runs count: every champion at its best, and the challenger on both sides of where it
        passes each, by the setting that needs least, or at its best."""
        mine = [place for place in losses if place.arm == self.challenger and place.corpus == corpus]
        ladder = self.arms[self.challenger]["epochs"]
        for champion in self.champions:
            place, loss = best(losses, champion, corpus)
            yield place
            if passing := [place for place in mine if losses[place] <= loss]:
                first = min(passing, key=lambda place: flops[place])
                below = max(ladder.index(first.epochs) - 1, 0)
                yield from (first._replace(epochs=epochs) for epochs in ladder[below : below + 2])
            else:
                yield best(losses, self.challenger, corpus)[0]

    def predicted(self, tokens: float) -> float:
        """Return the FLOPs at which the law says that the challenger passes."""
        constant, exponent = self.law
        return constant * (tokens / 1e6) ** exponent

    def crossings(self, table: pd.DataFrame, champion: str) -> pd.DataFrame:
        """Return the FLOPs at which the challenger passes a champion, infinite where it does not: a row per corpus, a
        column per seed."""
        runs, found = counted(table), {}
        for (corpus, seed), rows in runs.groupby(["corpus", "seed"]):
            to_beat = rows[rows.arm == champion].bits_per_byte.min()
            paths = [path.sort_values("epochs") for _, path in rows[rows.arm == self.challenger].groupby("setting")]
            found[corpus, seed] = min(
                (overtaking(path.flops, path.bits_per_byte, to_beat) for path in paths),
                default=math.inf,
            )
        return pd.Series(found, dtype=float).unstack()

    def behind(self, table: pd.DataFrame, champion: str, corpus: int) -> Estimate | None:
        """Return the held-out bits per byte by which the challenger at its best is behind a champion on a corpus, from
        pairs of equal seed; None where there are fewer than two."""
        runs = counted(table)
        lowest = runs[runs.corpus == corpus].groupby(["seed", "arm"]).bits_per_byte.min().unstack()
        if not {champion, self.challenger} <= set(lowest):
            return None
        pairs = (lowest[self.challenger] - lowest[champion]).dropna()
        return Estimate.of_mean(pairs) if len(pairs) > 1 else None

    def figure(self, table: pd.DataFrame) -> Figure:
        """Left, the losses that were found against compute, corpus by corpus; right, where each champion is passed, and
        the law."""
        canvas = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = canvas.subplots(1, 2)
        done = table[table.status == "done"]
        for i, corpus in enumerate(self.corpora):
            for arm, style in zip((self.champions[0], self.challenger), ("--", "-"), strict=True):
                rows = done[(done.corpus == corpus) & (done.arm == arm) & (done.stage == "tune")].sort_values("flops")
                label = f"{number(corpus)} tokens" if style == "-" else None
                left.plot(
                    rows.flops,
                    rows.bits_per_byte.cummin(),
                    style,
                    color=COLOURS[i],
                    label=label,
                    drawstyle="steps-post",
                )
        left.set(xscale="log", xlabel="training FLOPs", ylabel="lowest held-out bits per byte so far")
        left.set_title(f"{self.champions[0]} dashed, {self.challenger} drawn", fontsize="medium")
        ends = [min(self.corpora) / 1.5, max(self.corpora) * 1.5]
        right.plot(ends, [self.predicted(tokens) for tokens in ends], color="grey", label="the law")
        for i, champion in enumerate(self.champions):
            crossings = self.crossings(table, champion).replace(math.inf, math.nan)
            for seed in crossings:
                right.plot(
                    crossings.index * 1.03**i, crossings[seed], MARKERS[i], color=COLOURS[i], alpha=0.7,
                    label=f"passes {champion}" if seed == crossings.columns[0] else None,
                )  # fmt: skip
        right.set(xscale="log", yscale="log", xlabel="tokens of the corpus", ylabel="training FLOPs")
        right.set_title("where it passes, seed by seed, at most a doubling beyond its runs", fontsize="medium")
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        claimed, first = self.law[1], self.champions[0]
        passed, behind = self._passed(table, first), self._behind(table, first)
        said = " ".join(f"{champion}, {self._said(table, champion)}." for champion in self.champions)
        effect = exponent(passed)
        low, high = claimed * (1 - self.within), claimed * (1 + self.within)
        outcome = "cannot tell"
        if any(by.low > 0 for by in behind.values()) or (effect and (effect.low > high or effect.high < low)):
            outcome = "does not hold"
        elif effect and len(passed) == len(self.corpora) and low < effect.low and effect.high < high:
            outcome = "holds"
        sentence = f"{self.challenger} against {said} Claimed is an exponent of {claimed:g}."
        return Verdict(outcome, sentence, effect, self.rule)

    def _passed(self, table: pd.DataFrame, champion: str) -> pd.DataFrame:
        """The crossings of the corpora on which the challenger passes with every seed."""
        crossings = self.crossings(table, champion)
        return crossings.replace(math.inf, math.nan).dropna()

    def _behind(self, table: pd.DataFrame, champion: str) -> dict[int, Estimate]:
        """The bits by which the challenger is behind on the other corpora, where there are seeds to tell."""
        passed = self._passed(table, champion).index
        found = {corpus: self.behind(table, champion, corpus) for corpus in self.corpora if corpus not in passed}
        return {corpus: by for corpus, by in found.items() if by is not None}

    def _said(self, table: pd.DataFrame, champion: str) -> str:
        passed = self._passed(table, champion)
        means = np.exp(np.log(passed).mean(axis=1))
        words = [
            f"with {tokens:,} tokens it passes at {number(means[tokens], 2)} FLOPs, "
            f"{number(means[tokens] / self.predicted(tokens), 2)} times the law's"
            for tokens in self.corpora
            if tokens in passed.index
        ]
        words += [
            f"with {corpus:,} it stays {by:.3f} bits per byte behind"
            for corpus, by in self._behind(table, champion).items()
        ]
        if slope := exponent(passed):
            words.append(f"an exponent of {slope:.2f}")
        return "; ".join(words) or "too few runs"


def best(losses: dict[Place, float], arm: str, corpus: int) -> tuple[Place, float]:
    """Return where an arm has its lowest loss on a corpus, and that."""
    mine = {place: loss for place, loss in losses.items() if (place.arm, place.corpus) == (arm, corpus)}
    place = min(mine, key=lambda place: mine[place])
    return place, mine[place]


def overtaking(flops: ArrayLike, losses: ArrayLike, to_beat: float) -> float:
    """Return the FLOPs at which a path of losses, from the fewest FLOPs to the most, first passes a loss, on lines in
    ln FLOPs: between two of its points, or at most a doubling beyond the first or the last, else infinity."""
    x, y = np.log(np.asarray(flops, float)), np.asarray(losses, float)
    places = []
    for i in range(len(x) - 1):
        slope = (y[i + 1] - y[i]) / (x[i + 1] - x[i])
        if slope >= 0:
            continue
        place = x[i] + (to_beat - y[i]) / slope
        low = x[i] - math.log(2) * (i == 0)
        high = x[i + 1] + math.log(2) * (i == len(x) - 2)
        if low <= place <= high:
            places.append(float(place))
    return math.exp(min(places)) if places else math.inf


def exponent(crossings: pd.DataFrame) -> Estimate | None:
    """Return the slope of ln FLOPs in ln tokens (the index), in the mean over seeds (the columns); None of fewer than
    three corpora or two seeds."""
    if len(crossings) < 3 or len(crossings.columns) < 2:
        return None
    slopes = np.polyfit(np.log(crossings.index.to_numpy(float)), np.log(crossings.to_numpy(float)), 1)[0]
    return Estimate.of_mean(slopes)
