"""Over-optimisation of a learnt reward: what a policy's true reward becomes while its learnt one rises (Gao, Schulman &
Hilton, arXiv 2210.10760, at playground size). The truth is known: the likelihood of a hidden Markov language.

Shape letters: B answers, T tokens, N tokens of all answers, V token ids.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from hydra.utils import instantiate
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor

from experiments.data.hidden_markov import FLOOR, HiddenMarkovLanguage
from experiments.findings import Estimate, Verdict
from experiments.fits.over_optimisation import Curve, Law, coefficients, explained, fit_law, peak, reward_at
from experiments.harness.assembly import measure
from experiments.harness.identity import run_of
from experiments.harness.parts import open_data
from experiments.harness.weights import FinishedRun, load_run, load_trained
from experiments.report.figures import COLOURS, MARKERS
from experiments.studies.best_of_n import divergence, expected_best
from experiments.studies.recall import rank_correlation
from experiments.studies.study import Cell, Compose, Stages, Study
from objectives.contracts import Batch, Request
from objectives.post_training.divergences import written_kl
from objectives.post_training.reward_model import LearntReward
from objectives.post_training.tuning import Trained

AT_ONCE = 2048  # answers judged together
PROXY = ["width", "comparisons", "seed"]  # columns that tell proxies apart
TITLES: dict[Law, str] = {"best_of_n": "best of n", "rl": "reinforcement learning"}


@dataclass(frozen=True)
class OverOptimisation(Study):
    """Trains a policy on the language and reward models, the proxies, on pairs of its sequences, of which the likelier
    one is mostly chosen. Then the policy is pushed against each proxy in two ways: the best of n answers, and RL leg by
    leg, each of which goes on from the one before. Gold reward is the log-likelihood per symbol.

    widths, comparisons, seeds: of the proxies; a seed is that of the comparisons, of the weights and of RL. read: pairs
    that a proxy is trained on, those that it has again and again, or all of them once if it has more. pool: answers
    that the best of n are drawn from. candidates: the values of n. legs: steps of RL. answers: of a policy, by which it
    is measured. policy, proxy, tuning: overrides of the runs; those of RL have the first and the last.
    """

    widths: list[int]
    comparisons: list[int]
    seeds: list[int]
    read: int
    pool: int
    candidates: list[int]
    legs: list[int]
    answers: int
    policy: list[str]
    proxy: list[str]
    tuning: list[str]

    def stages(self, compose: Compose) -> Stages:
        if not 1 <= min(self.candidates) <= max(self.candidates) <= self.pool:
            raise ValueError(f"study.candidates={self.candidates} must be from 1 to study.pool={self.pool}")
        base = Cell({"stage": "base"}, run_of(compose(self.policy)))
        if not (yield [base]):
            return
        pushed = {}
        for proxy in (yield self._proxies(compose, base.run.id)):
            more = [f"seed={proxy.labels['seed']}", f"objective.models.reward={proxy.run.id}"]
            config = compose([*self.policy, *self.tuning, *more, f"init_from={base.run.id}"])
            pushed[proxy.run.id] = proxy.labels | {"stage": "rl"}, config, flops_per_step(config, proxy.run.folder)
        for leg, steps in enumerate(self.legs, 1):
            cells = {}
            for labels, config, flops in pushed.values():
                config.budget.flops = steps * flops
                run = run_of(config)
                cells[run.id] = Cell(labels | {"leg": leg}, run), config, flops
            pushed = {}
            for cell in (yield [cell for cell, _, _ in cells.values()]):
                _, config, flops = cells[cell.run.id]
                config.init_from = cell.run.id
                pushed[cell.run.id] = cell.labels, config, flops

    def _proxies(self, compose: Compose, base: str) -> Iterator[Cell]:
        for width in self.widths:
            for comparisons in self.comparisons:
                for seed in self.seeds:
                    labels = {"width": width, "comparisons": comparisons, "seed": seed}
                    more = [f"arch.width={width}", f"data.tokens.train_pairs={comparisons}"]
                    config = compose([*self.proxy, *more, f"data.tokens.seed={seed}", f"seed={seed}"])
                    pairs = config.budget.batch_tokens // (2 * config.data.sequence_length)  # of a step
                    # Whole steps, so that no pair is divided.
                    config.budget.flops = math.ceil(max(self.read, comparisons) / pairs) * flops_per_step(config)
                    yield Cell({"stage": "proxy", "base": base} | labels, run_of(config))

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """Of a proxy one row per n, of a policy of RL one row: its distance from the start in nats, and by how much its
        gold and proxy rewards are above those of the start, both in nats per symbol."""
        if cell.labels["stage"] == "base":
            return [{}]
        base = cell.run.session.root / "cells" / cell.labels["base"]
        if cell.labels["stage"] == "proxy":
            written_B, gold_B = start(base, self.pool)
            rewards = {"gold": gold_B, "proxy": judged(finished, written_B)}
            agreement = {"correlation": float(np.corrcoef(rewards["gold"], rewards["proxy"])[0, 1])}
            return [
                {"n": n, "kl": divergence(n)}
                | {name: expected_best(n, rewards["proxy"], x_B) - float(x_B.mean()) for name, x_B in rewards.items()}
                | agreement
                for n in self.candidates
            ]
        written, gold_B = answers(finished, self.answers)
        proxy, before = judged_start(cell.run.others["reward"], base, self.answers)
        risen_B = gold_B - start(base, self.answers)[1]
        return [
            {
                "kl": float(written_kl(finished.model, start_run(base).model, finished.objective, written).mean()),
                "gold": float(risen_B.mean()),
                "gold_se": float(risen_B.std(ddof=1) / len(risen_B) ** 0.5),
                "proxy": float(judged(proxy, written).mean() - before),
            }
        ]

    def figure(self, table: pd.DataFrame) -> Figure:
        """Best of n above, RL below: gold against distance with the fitted laws by comparisons and by width, and what
        becomes of the coefficients and of the peak."""
        canvas = Figure(figsize=(16, 9), layout="constrained")
        grid = canvas.subplots(2, 3)
        for axes, (law, title) in zip(grid, TITLES.items(), strict=True):
            points = points_of(table, law)
            for panel, column in zip(axes[:2], ("comparisons", "width"), strict=True):
                self._curves(panel, points, law, column)
                panel.set_title(f"{title}, by {column}")
            self._coefficients(axes[2], points, law)
        canvas.suptitle(
            "Reward above the start's, in the mean over proxies.  Points: gold;  lines: its fitted law;  dotted: proxy"
        )
        return canvas

    def _curves(self, panel: Axes, points: pd.DataFrame, law: Law, column: str) -> None:
        for i, (value, rows) in enumerate(points.groupby(column)):
            mean = rows.groupby("push")[["d", "gold", "proxy"]].mean()
            panel.plot(mean.d, mean.gold, MARKERS[i], color=COLOURS[i], label=f"{value:.0f}")
            panel.plot(mean.d, mean.proxy, ":", color=COLOURS[i])
            d = np.linspace(0, mean.d.max(), 100)
            panel.plot(d, reward_at(law, d, *coefficients(law, curves(rows))), color=COLOURS[i])
        panel.axhline(0, color="grey", lw=0.8)
        if law == "rl":  # where the fall is many times the rise
            panel.set_yscale("symlog", linthresh=0.2)
        panel.set(xlabel="d = square root of KL from the start, nats", ylabel="nats per symbol")
        panel.grid(alpha=0.3)
        panel.legend(title=column)

    def _coefficients(self, panel: Axes, points: pd.DataFrame, law: Law) -> None:
        for i, name in enumerate(("alpha", "beta", "peak")):
            groups = [(n, fit_law(law, curves(rows))) for n, rows in points.groupby("comparisons") if enough(rows)]
            found = [(n, getattr(fit, name)) for n, fit in groups if math.isfinite(getattr(fit, name).high)]
            if found:
                at, ends = zip(*found, strict=True)
                spread = [[x.value - x.low for x in ends], [x.high - x.value for x in ends]]
                label = "d*, the peak" if name == "peak" else name
                panel.errorbar(
                    at, [x.value for x in ends], spread, color=COLOURS[i], marker=MARKERS[i], capsize=3, label=label
                )
        panel.set(xscale="log", yscale="log", xlabel="comparisons", title=f"{TITLES[law]}: the law")
        panel.grid(alpha=0.3, which="both")
        panel.legend()

    def verdict(self, table: pd.DataFrame) -> Verdict:
        points = points_of(table, "rl")
        gold = points.pivot(index=PROXY, columns="push", values="gold").dropna()
        if len(gold) < 4 or gold.shape[1] < 2:
            return Verdict("cannot tell", f"{len(gold)} proxies are too few to compare.", None, self.rule)
        best, last = gold.mean().idxmax(), gold.columns[-1]
        rise, fall = Estimate.of_mean(gold[best]), Estimate.of_mean(gold[best] - gold[last])
        effect = trend(points, "rl", "comparisons")
        if min(rise.low, fall.low, effect.low) > 0:
            outcome = "holds"
        elif best == last or min(rise.high, fall.high, effect.high) < 0:
            outcome = "does not hold"
        else:
            outcome = "cannot tell"
        nats = points.groupby("push").d.apply(lambda d: (d**2).mean())
        of_best, highest = points_of(table, "best_of_n"), points.loc[points.groupby(PROXY).gold.idxmax()]
        sentence = (
            f"Over {len(gold)} proxies RL raises gold by {rise:.3f} nats per symbol at a KL of {nats[best]:.1f} and "
            f"has lost {fall:.3f} of it at {nats[last]:.1f}. The distance of the peak of its law has a rank "
            f"correlation of {effect:.2f} with the number of comparisons, that of the best leg itself one of "
            f"{over_proxies(highest.comparisons, highest.d):.2f}; the peak of best of n "
            f"{trend(of_best, 'best_of_n', 'comparisons'):.2f}. The laws explain {share('best_of_n', of_best):.0%} of "
            f"the variance of a curve of best of n and {share('rl', points):.0%} of one of RL, which that of best of n "
            f"explains by {share('best_of_n', points):.0%} (medians)."
        )
        return Verdict(outcome, sentence, effect, self.rule)


def points_of(table: pd.DataFrame, law: Law) -> pd.DataFrame:
    """The rows of a law's curves, with d, the distance, and push, the place on the curve: n, or the leg of RL."""
    stage, push = ("proxy", "n") if law == "best_of_n" else ("rl", "leg")
    rows = table[(table.stage == stage) & (table.status == "done")]
    return rows.assign(d=np.sqrt(np.maximum(rows.kl, 0)), push=rows[push]).sort_values([*PROXY, "push"])


def curves(points: pd.DataFrame) -> list[Curve]:
    """Distances and gold rewards of each proxy."""
    return [(rows.d.to_numpy(), rows.gold.to_numpy()) for _, rows in points.groupby(PROXY)]


def enough(points: pd.DataFrame) -> bool:
    """Return True where there are two curves, for intervals."""
    return points.groupby(PROXY).ngroups > 1


def trend(points: pd.DataFrame, law: Law, column: str) -> Estimate:
    """The rank correlation of a column with the distance of the peak, over proxies."""
    values = points.groupby(PROXY, as_index=False).first()[column]
    peaks = [float(peak(law, *coefficients(law, [curve]))) for curve in curves(points)]
    return over_proxies(values, pd.Series(peaks))


def over_proxies(x: pd.Series, y: pd.Series) -> Estimate:
    """The rank correlation of two numbers of each proxy; 0 in [-1, 1] where one of them is the same for all."""
    return rank_correlation(x, y) if min(x.nunique(), y.nunique()) > 1 else Estimate(0.0, -1.0, 1.0)


def share(law: Law, points: pd.DataFrame) -> float:
    """The share of the variance of a proxy's curve that a law fitted to it explains, in the median over proxies."""
    return float(np.median([explained(law, curve) for curve in curves(points)]))


def flops_per_step(config: DictConfig, reward: Path | None = None) -> float:
    """FLOPs of one whole step of a run. reward: folder of the reward model that it asks for."""
    measured = measure(config, open_data(config), load_trained({} if reward is None else {"reward": reward}))
    return measured.costs.flops_per_token * config.budget.batch_tokens + measured.flops_per_step


def answers(run: FinishedRun, number: int) -> tuple[Batch, np.ndarray]:
    """Return samples of a policy from nothing, and their gold rewards [B]; the chance is the same for every policy."""
    T, nothing = run.config.data.sequence_length, torch.zeros(0, dtype=torch.long)
    request = Request([nothing], T, torch.Generator().manual_seed(0), copies=number, stop=(run.data.eot,))
    samples = run.objective.sample(run.model, request)
    written = Batch(samples.tokens_BT, samples.answers_BT.float())
    return written, gold_reward(instantiate(run.config.data.tokens.language), written).numpy()


def gold_reward(language: HiddenMarkovLanguage, written: Batch) -> Tensor:
    """The log-likelihood of each answer under the language in nats per symbol of a whole window, [B] float64. A symbol
    that is missing because the answer ended early, and the end itself, count as the least likely of all."""
    symbol_BT = written.counted_BT & (written.tokens_BT < language.symbols)
    tokens_BT = written.tokens_BT.where(symbol_BT, 0)  # nothing stands behind an end, so this is not looked back on
    log_p_BT = language.conditionals(tokens_BT).gather(2, tokens_BT[..., None])[..., 0]
    return log_p_BT.where(symbol_BT, math.log(FLOOR)).mean(1)


def judged(proxy: FinishedRun, written: Batch) -> np.ndarray:
    """The rewards [B] that a reward model gives, times the temperature of its labels: in the unit of gold, so that a
    perfect proxy's differences are those of gold."""
    reward = LearntReward(Trained(proxy.model, proxy.objective))
    parts = zip(written.tokens_BT.split(AT_ONCE), written.counted_BT.split(AT_ONCE), strict=True)
    return torch.cat([reward(*part) for part in parts]).numpy() * proxy.config.data.tokens.temperature


@functools.cache
def start_run(base: Path) -> FinishedRun:
    """The policy before it was pushed."""
    return load_run(base)


@functools.cache
def start(base: Path, number: int) -> tuple[Batch, np.ndarray]:
    """Return samples of that policy, and their gold rewards [B]."""
    return answers(start_run(base), number)


@functools.cache
def judged_start(reward: Path, base: Path, number: int) -> tuple[FinishedRun, float]:
    """A proxy, and the mean reward that it gives to what the policy writes at the start."""
    proxy = load_run(reward)
    return proxy, float(judged(proxy, start(base, number)[0]).mean())
