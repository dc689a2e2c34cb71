"""Mechanisms: in which way models add that all add right (Zhong et al., "The clock and the pizza", arXiv 2306.17844).

Shape letters: P numbers, N sums of two, V token ids.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from archs.language_model import LanguageModel
from experiments.findings import Estimate, Verdict
from experiments.harness.weights import FinishedRun
from experiments.report.figures import COLOURS
from experiments.studies.sides import above, seeds_to_tell
from experiments.studies.study import Cell, Compose, Study, check_named, over_seeds
from experiments.studies.tuned import evaluations

PASSED = 0.99  # of the held-out sums


@dataclass(frozen=True)
class Mechanisms(Study):
    """Trains each architecture from each seed on modular addition, and asks of those that add right whether their
    confidence follows the distance of the two numbers.

    architectures: name -> overrides of the config. pair: the two of which the first is claimed to heed the distance
    less. seeds: of the runs, and of the sums that are trained on. margin: by how much less.
    """

    architectures: dict[str, list[str]]
    pair: list[str]
    seeds: list[int]
    margin: float

    def cells(self, compose: Compose) -> Iterator[Cell]:
        check_named("compares", self.pair, self.architectures)
        return over_seeds(compose, self.architectures, self.seeds)

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """Return the fraction of held-out sums that are right, and the distance irrelevance."""
        last = evaluations(cell.run.folder)[-1]["tasks"]["heldout"]["accuracy"][0]
        confidence_PP = right_logits(finished.model.eval(), finished.config.data.tokens.modulus, finished.data.eot)
        return [{"heldout": last, "irrelevance": distance_irrelevance(confidence_PP)}]

    def figure(self, table: pd.DataFrame) -> Figure:
        """The distance irrelevance of every run, against the fraction of held-out sums that are right."""
        canvas = Figure(figsize=(6.5, 3.8), layout="constrained")
        axes = canvas.subplots()
        done = table[table.status == "done"]
        for i, name in enumerate(self.architectures):
            rows = done[done.architecture == name]
            axes.plot(rows.irrelevance, rows.heldout, "o", color=COLOURS[i], alpha=0.7, label=name.replace("_", " "))
        axes.axhline(PASSED, color="0.4", ls=":")
        axes.set(xlim=(0, 1), xlabel="distance irrelevance", ylabel="held-out sums right")
        axes.grid(alpha=0.3)
        axes.legend()
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        done = table[table.status == "done"]
        passed = done[done.heldout >= PASSED]
        by_seed = passed.pivot(index="seed", columns="architecture", values="irrelevance").reindex(columns=self.pair)
        pairs = (by_seed[self.pair[0]] - by_seed[self.pair[1]]).dropna()
        if len(pairs) < 2:
            return Verdict("cannot tell", f"{len(pairs)} seeds with which both add right are too few.", None, self.rule)
        effect = Estimate.of_mean(pairs)
        outcome = above(effect, self.margin)
        each = ", ".join(
            f"{name} {rows.irrelevance.mean():.2f} ({rows.irrelevance.min():.2f} to {rows.irrelevance.max():.2f}, "
            f"{len(rows)} of {(done.architecture == name).sum()} runs)"
            for name, rows in passed.groupby("architecture", sort=False)
        )
        sentence = (
            f"Distance irrelevance of the runs with at least {PASSED} of the held-out sums right: {each}. "
            f"{self.pair[0]} less {self.pair[1]}, seed by seed: {effect:.2f}."
        )
        sentence += seeds_to_tell(outcome, effect, self.margin, len(pairs))
        return Verdict(outcome, sentence, effect, self.rule)


@torch.no_grad()
def right_logits(model: LanguageModel, modulus: int, eot: int) -> np.ndarray:
    """Return the logits [P, P] of the right answers to all sums of two numbers, each read at the equals sign."""
    first_N, second_N = np.divmod(np.arange(modulus**2), modulus)
    sums = np.stack([np.full(modulus**2, eot), first_N, second_N, np.full(modulus**2, modulus)], axis=1)
    logits_NV = model(torch.from_numpy(sums).to(model.embedding.weight.device))[:, -1].float().cpu().numpy()
    right_N = np.take_along_axis(logits_NV, ((first_N + second_N) % modulus)[:, None], axis=1)
    return right_N.reshape(modulus, modulus)


def distance_irrelevance(confidence_PP: np.ndarray) -> float:
    """Return the scatter of the logits of right answers at one distance of the two numbers, in the mean over
    distances, over the scatter of all: 0 where they follow from the distance alone, 1 where it says nothing (Zhong et
    al., section 4.2)."""
    P = len(confidence_PP)
    distance_PP = (np.arange(P)[None] - np.arange(P)[:, None]) % P
    within = [confidence_PP[distance_PP == distance].std() for distance in range(P)]
    return float(np.mean(within) / confidence_PP.std())
