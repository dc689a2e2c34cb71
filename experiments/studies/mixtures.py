"""Mixtures of data: the best one for a test, by a regression on small runs, tried on larger ones (RegMix: Liu et al.,
arXiv 2407.01492; data mixing laws: Ye et al., 2403.16952).

Shape letters: R runs, P parts (three), K terms of the regression.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.data.heldout_elsewhere import byte_lengths
from experiments.data.token_data import TokenData
from experiments.findings import Estimate, Verdict
from experiments.harness.identity import Run, run_of
from experiments.harness.parts import open_data
from experiments.harness.weights import FinishedRun
from experiments.report.figures import COLOURS
from experiments.studies.ablation import at_an_end, counted, stage_of, tune
from experiments.studies.sides import on_their_sides
from experiments.studies.study import Cell, Compose, Stages, Study

Shares = tuple[float, ...]  # of each part, summing to 1
CORNERS = np.array([[0, 0], [1, 0], [0.5, math.sqrt(0.75)]])  # of the triangle of mixtures, part by part


@dataclass(frozen=True)
class Mixtures(Study):
    """Trains a small model on a design of mixtures, and a larger one on those and on the ones predicted best.

    parts, tests: names of the three parts and of the tests of the data, in its order. design: mixtures, each as
    weights of the parts in any unit. steps: the predicted ones are of shares of so many steps from 0 to 1. margin: by
    which fraction of its loss a mixture of the design may be better than the predicted one. sizes: name -> overrides of
    the config, the small and the large. learning_rates: those that are tried for each size on the even mixture, evenly
    apart in their log. widen: more of them at most, while the best is the last. tuning_seed: with which. seeds: of the
    runs that count.
    """

    parts: list[str]
    tests: list[str]
    design: list[list[float]]
    steps: int
    margin: float
    sizes: dict[str, list[str]]
    learning_rates: list[float]
    widen: int
    tuning_seed: int
    seeds: list[int]

    def stages(self, compose: Compose) -> Stages:
        config = compose([])
        nodes = config.data.tokens
        if len(self.parts) != 3 or (len(nodes.data.parts), len(nodes.tests)) != (3, len(self.tests)):
            raise ValueError(
                f"study.parts={self.parts} and study.tests={self.tests} must name the three parts and all tests of "
                f"data={config.data.name}, which has {len(nodes.data.parts)} and {len(nodes.tests)}"
            )
        if nodes.tokens % config.data.sequence_length:
            raise ValueError(
                f"data.tokens.tokens={nodes.tokens} must be a multiple of data.sequence_length="
                f"{config.data.sequence_length}, so that no window has tokens of two tests"
            )
        small, large = self.sizes
        cell = partial(self._cell, compose, self.tuning_seed, self.even)
        chosen = yield from tune(self.sizes, self.learning_rates, self.widen, cell)
        mixtures = [shares_of(weights) for weights in self.design]
        done = yield [self._cell(compose, seed, m, small, chosen[small]) for m in mixtures for seed in self.seeds]
        if not done:
            return
        data = open_data(config)
        best = self.predicted_best(pd.DataFrame([cell.labels | self._losses(cell.run, data) for cell in done]))
        mixtures = list(dict.fromkeys([*mixtures, *best.values()]))
        yield [self._cell(compose, seed, m, large, chosen[large]) for m in mixtures for seed in self.seeds]

    @property
    def even(self) -> Shares:
        return shares_of([1] * len(self.parts))

    def _cell(self, compose: Compose, seed: int, mixture: Shares, size: str, rate: float) -> Cell:
        config = compose(self.sizes[size])
        config.session.arm, config.seed, config.optim.learning_rate = size, seed, rate
        node = config.data.tokens.data
        present = [i for i, share in enumerate(mixture) if share]
        node.parts, node.weights = [node.parts[i] for i in present], [mixture[i] for i in present]
        labels = {"variant": size, "stage": stage_of(seed, self.tuning_seed)}
        labels |= {"mixture": label(mixture)} | dict(zip(self.parts, mixture, strict=True))
        return Cell(labels | {"learning_rate": rate, "seed": seed}, run_of(config))

    def _losses(self, run: Run, data: TokenData) -> dict[str, float]:
        """Return the bits per byte of each test, all of which have as many held-out tokens."""
        nats = np.load(run.folder / "heldout_nats.npy").reshape(len(self.tests), -1).sum(1)
        sizes = byte_lengths(data, data.heldout).reshape(len(self.tests), -1).sum(1)
        return dict(zip(self.tests, (nats / math.log(2) / sizes).tolist(), strict=True))

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        return [self._losses(cell.run, finished.data)]

    def regression(self, rows: pd.DataFrame, test: str) -> np.ndarray:
        """Return the coefficients [K] of `terms` for ln of the bits per byte of a test, by least squares."""
        x_RK = terms(rows[self.parts].to_numpy(float))
        return np.linalg.lstsq(x_RK, np.log(rows[test].to_numpy(float)))[0]

    def predicted_best(self, rows: pd.DataFrame) -> dict[str, Shares]:
        """Return for each test the mixture that the regression on these runs puts lowest, of all in steps."""
        grid = self._grid()
        return {test: shares_of(grid[np.argmin(terms(grid) @ self.regression(rows, test))]) for test in self.tests}

    def _grid(self) -> np.ndarray:
        counts = product(range(self.steps + 1), repeat=len(self.parts))
        return np.array([row for row in counts if sum(row) == self.steps]) / self.steps

    def figure(self, table: pd.DataFrame) -> Figure:
        """Each test in a column: what the small runs predict, on the triangle of mixtures; and the larger runs' loss
        against what was predicted for the small ones, every run, mixture by mixture."""
        runs, (small, large) = counted(table), self.sizes
        canvas = Figure(figsize=(4.2 * len(self.tests), 7.5), layout="constrained")
        panels = canvas.subplots(2, len(self.tests), squeeze=False)
        few = runs[runs.variant == small]
        if few.empty:
            return canvas
        best = self.predicted_best(few)
        for (above, below), test in zip(panels.T, self.tests, strict=True):
            law = self.regression(few, test)
            self._triangle(above, few, law, test, best)
            rows = runs[runs.variant == large]
            foretold = np.exp(terms(rows[self.parts].to_numpy(float)) @ law) if len(rows) else []
            below.plot(foretold, rows[test], ".", color=COLOURS[0], alpha=0.6)
            own = (rows.mixture == label(best[test])).to_numpy(bool)
            below.plot(np.asarray(foretold)[own], rows[test][own], "*", color=COLOURS[1], ms=11)
            below.set(xlabel=f"predicted for {small}, bits per byte", ylabel=f"{large}, bits per byte")
            below.grid(alpha=0.3)
        return canvas

    def _triangle(self, axes: Axes, rows: pd.DataFrame, law: np.ndarray, test: str, best: dict[str, Shares]) -> None:
        grid = self._grid()
        losses = terms(grid) @ law
        above = 100 * np.expm1(losses - losses.min())
        x, y = (grid @ CORNERS).T
        areas = axes.tricontourf(x, y, above, levels=12, cmap="viridis_r")
        axes.figure.colorbar(areas, ax=axes, shrink=0.6, label="% above the lowest")
        axes.plot(*(rows[self.parts].to_numpy(float) @ CORNERS).T, "o", mfc="none", color="white", ms=5)
        axes.plot(*(np.array(best[test]) @ CORNERS), "*", color=COLOURS[1], ms=14, mec="white")
        for part, (x, y) in zip(self.parts, CORNERS, strict=True):
            axes.text(x, y + (0.04 if y else -0.1), part, ha="center")
        axes.set_title(f"{test}: best {label(best[test])}", fontsize="medium", pad=24)
        axes.set_aspect("equal")
        axes.axis("off")

    def verdict(self, table: pd.DataFrame) -> Verdict:
        runs, (small, large) = counted(table), self.sizes
        few, rows = runs[runs.variant == small], runs[runs.variant == large]
        if few.empty or rows.seed.nunique() < 2:
            sentence = f"{len(few)} small runs and {rows.seed.nunique()} seeds of larger ones are too few to tell."
            return Verdict("cannot tell", sentence, None, self.rule)
        best = {test: label(mixture) for test, mixture in self.predicted_best(few).items()}
        differences, slack, said = {}, {}, []
        for test in self.tests:
            losses = rows.pivot(index="seed", columns="mixture", values=test).astype(float).map(math.log)
            if best[test] not in losses:
                sentence = f"No larger run on {best[test]}, predicted best for {test}, is there to tell."
                return Verdict("cannot tell", sentence, None, self.rule)
            behind = losses.sub(losses[best[test]], axis=0)
            others = [label(self.even), *(best[other] for other in self.tests if other != test)]
            for mixture in behind:
                if mixture in others or mixture != best[test]:
                    name = f"{mixture} on {test}"
                    differences[name], slack[name] = behind[mixture], 0.0 if mixture in others else self.margin
            foretold = self._foretold(few, rows, test)
            said.append(self._said(test, best[test], behind, foretold))
        frame = pd.DataFrame(differences)
        outcome, name, _ = on_their_sides(frame + pd.Series(slack), list(differences), [], 0.0)
        if len(set(best.values())) == 1:
            outcome = "does not hold"
        effect = Estimate.of_mean(frame[name].dropna()) if frame[name].count() > 1 else None
        ratio = rows.flops.mean() / few.flops.mean()
        sentence = (
            f"In shares of {', '.join(self.parts)} (%), from runs of {1 / ratio:.2g} of the compute: {'; '.join(said)}."
        )
        if effect is not None:
            values = ", ".join(f"{100 * end:.2f}" for end in (effect.low, effect.high))
            sentence += f" Nearest to failing: {name}, {100 * effect.value:.2f} % [{values}] above the predicted one."
        return Verdict(outcome, sentence + at_an_end(table), effect, self.rule)

    def _foretold(self, few: pd.DataFrame, rows: pd.DataFrame, test: str) -> pd.Series:
        mixtures = rows.groupby("mixture")[self.parts].first()
        return pd.Series(terms(mixtures.to_numpy(float)) @ self.regression(few, test), mixtures.index)

    def _said(self, test: str, best: str, behind: pd.DataFrame, foretold: pd.Series) -> str:
        means = behind.mean()
        lowest = str(means.idxmin())
        place = "the lowest" if lowest == best else f"the lowest, {lowest}, {100 * means[lowest]:+.2f} %"
        rank = means.rank().corr(foretold.rank())
        return (
            f"for {test} {best} (the even mixture {100 * means[label(self.even)]:+.2f} %; of {len(means)} mixtures "
            f"number {int((means < means[best]).sum()) + 1}, {place}; rank correlation {rank:.2f})"
        )


def shares_of(weights: Iterable[float]) -> Shares:
    """Weights in any unit as shares."""
    found = np.array(list(weights), float)
    return tuple((found / found.sum()).tolist())


def label(mixture: Sequence[float]) -> str:
    """The shares of a mixture in per cent, as 50/50/0."""
    return "/".join(f"{100 * share:.0f}" for share in mixture)


def terms(shares_RP: np.ndarray) -> np.ndarray:
    """Return the shares and their roots [R, K], whose sum is steep where a part is left out, as losses are, and has at
    most one lowest mixture where the roots count against the loss."""
    return np.column_stack([shares_RP, np.sqrt(shares_RP)])
