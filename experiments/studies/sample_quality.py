"""What samples are worth and what they cost, sampler by sampler, on a hidden Markov language, whose distribution is
known.

Quality is the exact negative log-likelihood of samples, diversity the entropy of their pairs of neighbours, and the
distance of these pairs from the true ones is both. Each sampler is also run on the language itself in place of a
trained model, which leaves only the sampler's own error.

Shape letters: B sequences, T tokens, V symbols.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from hydra.utils import instantiate
from matplotlib.figure import Figure
from torch import Tensor

from archs.language_model import LanguageModel
from experiments.data.hidden_markov import HiddenMarkovLanguage
from experiments.data.optimal import OptimalModel
from experiments.findings import QUANTILES, Estimate, Verdict
from experiments.harness.assembly import measure
from experiments.harness.identity import run_of
from experiments.harness.parts import open_data
from experiments.harness.weights import FinishedRun
from experiments.report.figures import COLOURS, MARKERS
from experiments.studies.study import Cell, Compose, Study
from objectives.contracts import Model, Objective, Request, Sampler
from objectives.uniform_diffusion import UniformDiffusion

MEASURES = {
    "nats": "-log p per symbol under the truth, nats",
    "pair_entropy": "entropy of pairs of neighbours, nats",
    "pair_distance": "total variation of pairs from the true ones",
}
LOOKS = [*zip(COLOURS, MARKERS, strict=True), ("#888888", "*")]
TRUTH = "the language's own sequences"
RESAMPLES = 200  # of the sequences, for the interval of the distance


@dataclass(frozen=True)
class SampleQuality(Study):
    """Trains one model per objective with equal FLOPs, and decodes each by its samplers at several settings.

    samples: sequences from each sampler, `batch` at a time. tolerance: how much farther than autoregression's the pairs
    of a sampler may be to count as as good. curves: name -> objective, sampler, what in it is dialled, the values.
    """

    samples: int
    batch: int
    tolerance: float
    curves: dict[str, dict]

    def cells(self, compose: Compose) -> Iterator[Cell]:
        objectives = dict.fromkeys(curve["objective"] for curve in self.curves.values())
        configs = {name: compose([f"objective={name}"]) for name in objectives}
        data = open_data(next(iter(configs.values())))
        for name, config in configs.items():
            measure(config, data)
            yield Cell({"objective": name}, run_of(config))

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """One row per sampler and setting, on the trained model and on the language itself; for the first objective
        also one of as many sequences of the language."""
        language: HiddenMarkovLanguage = instantiate(finished.config.data.tokens.language)
        length = finished.config.data.sequence_length
        exact: Objective = instantiate(
            finished.config.objective.build, vocab_size=language.symbols, eot=language.symbols
        )
        columns = exact.model_vocab_size - language.symbols
        optimal = OptimalModel(language, columns, isinstance(exact, UniformDiffusion))
        sides = {"trained": (finished.objective, finished.model), "optimal": (exact, optimal)}
        rows = []
        if cell.labels["objective"] == next(iter(self.curves.values()))["objective"]:
            truth = language.sample(self.samples, length, torch.Generator().manual_seed(1))
            rows.append({"curve": TRUTH, "model": "truth"} | judge(language, truth))
        for name, curve in self.curves.items():
            for value in curve.get("at", [None]) if curve["objective"] == cell.labels["objective"] else []:
                dialled = {curve["dial"]: value} if "dial" in curve else {}
                sampler = instantiate(curve["sampler"] | dialled) if "sampler" in curve else None
                for model, parts in sides.items():
                    tokens_BT, cost = self.decode(*parts, length, sampler)
                    rows.append({"curve": name, "model": model, "setting": value} | cost | judge(language, tokens_BT))
        return rows

    def decode(
        self, objective: Objective, model: Model, length: int, sampler: Sampler | None
    ) -> tuple[Tensor, dict[str, float]]:
        """Tokens [samples, length], and the cost of one sequence."""
        generator, tokens, cost = torch.Generator().manual_seed(0), [], defaultdict(float)
        started = time.perf_counter()
        for start in range(0, self.samples, self.batch):
            copies = min(self.batch, self.samples - start)
            request = Request([torch.zeros(0, dtype=torch.long)], length, generator, copies=copies)
            drawn = objective.sample(model, request, sampler)
            tokens.append(drawn.tokens_BT)
            part = copies / self.samples
            cost["evaluations"] += part * drawn.evaluations
            cost["predictions"] += part * drawn.predictions
            if isinstance(model, LanguageModel):
                cost["sampling_flops"] += part * objective.sampling_flops(model, request, drawn)
        seconds = time.perf_counter() - started
        rates = {"tokens_per_second": self.samples * length / seconds, "seconds": seconds / self.samples}
        return torch.cat(tokens), cost | rates

    def figure(self, table: pd.DataFrame) -> Figure:
        """Three measures (rows) against passes of trained and of optimal models and against wall time (columns)."""
        canvas = Figure(figsize=(13, 11), layout="constrained")
        grid = canvas.subplots(3, 3, sharey="row")
        truth, curves = table[table.curve == TRUTH].iloc[0], table[table.curve != TRUTH]
        columns = [
            ("optimal", "evaluations", "passes, the language itself as model"),
            ("trained", "evaluations", "passes, trained model"),
            ("trained", "seconds", "seconds per sequence, trained model"),
        ]
        for axes_row, (measure_, title) in zip(grid, MEASURES.items(), strict=True):
            for axes, (kind, x, label) in zip(axes_row, columns, strict=True):
                for i, name in enumerate(dict.fromkeys(curves.curve)):
                    rows = curves[(curves.curve == name) & (curves.model == kind)].sort_values(x)
                    axes.plot(rows[x], rows[measure_], label=name, color=LOOKS[i][0], marker=LOOKS[i][1])
                axes.axhline(truth[measure_], color="grey", lw=1)
                axes.set(xscale="log", xlabel=label)
                axes.grid(alpha=0.3)
            axes_row[0].set_ylabel(title)
        canvas.legend(*grid[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        canvas.suptitle("grey: as many sequences of the language itself")
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        """From the fastest setting of a trained diffusion model whose pairs are as good as autoregression's."""
        rows = table[table.model == "trained"]
        base, others = rows[rows.objective == "next_token"], rows[rows.objective != "next_token"]
        if base.empty or others.empty:
            return Verdict("cannot tell", "There is no trained model to compare with.", None, self.rule)
        base = base.iloc[0]
        nearest = others.loc[others.pair_distance.idxmin()]
        with np.errstate(divide="ignore"):  # a distance that may be zero leaves the ratio without an upper end
            effect = Estimate(
                nearest.pair_distance / base.pair_distance,
                nearest.pair_distance_low / base.pair_distance_high,
                nearest.pair_distance_high / base.pair_distance_low,
            )
        good = others[others.pair_distance <= base.pair_distance * (1 + self.tolerance)]
        faster = good[good.seconds < base.seconds]
        reach = 1 + self.tolerance
        if len(faster):
            outcome = "holds"
        elif effect.low > reach or len(good):
            outcome = "does not hold"
        else:
            outcome = "cannot tell"
        exact = table[(table.model == "optimal") & (table.objective != "next_token")]
        truth = table[(table.model == "optimal") & (table.objective == "next_token")].iloc[0]
        parallel = exact[exact.pair_distance <= truth.pair_distance * reach]
        few = f"from {parallel.evaluations.min():.0f} passes on" if len(parallel) else "never"
        sentence = (
            f"The nearest trained diffusion sampler ({nearest.curve}, {nearest.evaluations:.0f} passes) has pairs "
            f"{effect:.2f} times as far from the true ones as cached autoregression's, at "
            f"{base.seconds / nearest.seconds:.2g} times its speed; with the language itself as the denoiser a "
            f"diffusion sampler is as good {few}, in place of {truth.evaluations:.0f}."
        )
        return Verdict(outcome, sentence, effect, self.rule)


def judge(language: HiddenMarkovLanguage, tokens_BT: Tensor) -> dict[str, float]:
    """Quality, diversity and distance of samples. Sequences with an id that is no symbol have probability zero: their
    fraction is given, and they are left out of the rest."""
    possible_BT = tokens_BT[(tokens_BT < language.symbols).all(1)]
    V, T = language.symbols, tokens_BT.shape[1]
    nats_B = -language.log_likelihood(possible_BT) / T
    pairs_BT = possible_BT[:, :-1] * V + possible_BT[:, 1:]
    truth = language.log_likelihood(torch.cartesian_prod(torch.arange(V), torch.arange(V))).exp()

    def frequencies(rows_BT: Tensor) -> Tensor:
        return torch.bincount(rows_BT.flatten(), minlength=V * V) / rows_BT.numel()

    def distance(rows_BT: Tensor) -> float:
        return 0.5 * (frequencies(rows_BT) - truth).abs().sum().item()

    generator, B = torch.Generator().manual_seed(0), len(pairs_BT)
    draws = [distance(pairs_BT[torch.randint(B, (B,), generator=generator)]) for _ in range(RESAMPLES)]
    value = distance(pairs_BT)
    # Resampled sequences lie farther from the truth than the sequences themselves: the spread is taken, not the place.
    low, high = (value + float(q) for q in pd.Series(draws).sub(pd.Series(draws).mean()).quantile(QUANTILES))
    return {
        "impossible": 1 - len(possible_BT) / len(tokens_BT),
        "nats": nats_B.mean().item(),
        "nats_se": (nats_B.std() / len(nats_B) ** 0.5).item(),
        "pair_entropy": -torch.special.xlogy(p := frequencies(pairs_BT), p).sum().item(),
        "pair_distance": value,
        "pair_distance_low": low,
        "pair_distance_high": high,
    }
