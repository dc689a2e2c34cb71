"""Recall against the bytes of decode state: multi-query associative recall (Arora et al., arXiv 2312.04927).

Shape letters: B sequences, T tokens, V token ids, N answers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from scipy.stats import spearmanr

from archs.language_model import LanguageModel
from experiments.data.token_data import TokenData
from experiments.data.windows import heldout_windows
from experiments.findings import QUANTILES, Estimate, Verdict
from experiments.harness.assembly import measure
from experiments.harness.identity import run_of
from experiments.harness.parts import open_data
from experiments.harness.weights import FinishedRun
from experiments.report.figures import COLOURS, MARKERS
from experiments.studies.study import Cell, Compose, Study
from objectives.contracts import Batch, Objective

AT_ONCE = 64  # sequences evaluated together
DRAWS = 500  # resamples of the points


@dataclass(frozen=True)
class Recall(Study):
    """Trains each curve's two-block model at each value of its dial, all for as many steps.

    steps: of every run. learning_rates: each point is trained with all of them and the best counts. full_attention: the
    curve that sees all tokens. curves: name -> pattern of the model, what in the arch is dialled, the values, and
    whether its state is recurrent.
    """

    steps: int
    learning_rates: list[float]
    full_attention: str
    curves: dict[str, dict]

    def cells(self, compose: Compose) -> Iterator[Cell]:
        base = compose([])
        data, mixers = open_data(base), base.arch.model.mixers
        for name, curve in self.curves.items():
            used = [entry.partition("+")[0] for entry in curve["pattern"]]
            if missing := sorted({*used} - {*mixers}):
                raise ValueError(f"curve {name!r} has a mixer {missing[0]!r}: choose from {', '.join(mixers)}")
            for value in curve["at"]:
                for learning_rate in self.learning_rates:
                    config = base.copy()
                    config.session.arm = config.arch.name = name
                    config.arch.model.pattern, config.arch.model.depth = curve["pattern"], len(curve["pattern"])
                    # Without the others, so that a mixer added to the config leaves the runs of these what they are.
                    config.arch.model.mixers = {mixer: mixers[mixer] for mixer in dict.fromkeys(used)}
                    OmegaConf.update(config.arch, curve["dial"], value)
                    config.optim.learning_rate = learning_rate
                    cost = measure(config, data).costs.flops_per_token
                    config.budget.flops = cost * self.steps * config.budget.batch_tokens
                    labels = {"curve": name, "setting": value, "learning_rate": learning_rate}
                    yield Cell(labels | {"recurrent": curve["recurrent"]}, run_of(config))

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """The fraction of answers recalled, by the number of pairs in a sequence."""
        length = finished.config.data.sequence_length
        fractions = accuracy(finished.model, finished.objective, finished.data, length)
        return [{f"accuracy@{pairs}": fraction for pairs, fraction in fractions.items()}]

    def figure(self, table: pd.DataFrame) -> Figure:
        """Accuracy against the bytes of the decode state, one panel per number of pairs, one curve per backbone."""
        columns = accuracies(table)
        canvas = Figure(figsize=(4.2 * len(columns), 4.6), layout="constrained")
        panels = canvas.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        rows = best(table)
        for panel, column in zip(panels, columns, strict=True):
            for i, name in enumerate(dict.fromkeys(table.curve)):
                curve = rows[rows.curve == name].sort_values("state_bytes")
                panel.plot(curve.state_bytes, curve[column], color=COLOURS[i], marker=MARKERS[i], label=name)
            panel.set(xscale="log", title=f"{column.partition('@')[2]} pairs", xlabel="bytes of decode state")
            panel.grid(alpha=0.3)
        panels[0].set(ylabel="fraction of answers recalled", ylim=(-0.02, 1.02))
        canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        rows, hardest = best(table), accuracies(table)[-1]
        recurrent, full = rows[rows.recurrent], rows[rows.curve == self.full_attention]
        if len(recurrent) < 4 or full.empty:
            sentence = f"{len(recurrent)} recurrent points and {len(full)} of full attention are too few."
            return Verdict("cannot tell", sentence, None, self.rule)
        effect, worst = rank_correlation(recurrent.state_bytes, recurrent[hardest]), full[hardest].min()
        if effect.low > 0.5 and worst >= 0.95:
            outcome = "holds"
        elif effect.high < 0.5 or worst < 0.5:
            outcome = "does not hold"
        else:
            outcome = "cannot tell"
        sentence = (
            f"Over {len(recurrent)} recurrent models recall of {hardest.partition('@')[2]} pairs goes with the bytes "
            f"of state at a rank correlation of {effect:.2f}; full attention recalls {worst:.2f} at worst."
        )
        return Verdict(outcome, sentence, effect, self.rule)


def accuracies(table: pd.DataFrame) -> list[str]:
    """The columns of accuracy, from the fewest pairs to the most."""
    columns = [str(column) for column in table if str(column).startswith("accuracy@")]
    return sorted(columns, key=lambda column: int(column.partition("@")[2]))


def best(table: pd.DataFrame) -> pd.DataFrame:
    """Of each point the run with the learning rate that recalls most, all numbers of pairs together."""
    done = table[table.status == "done"]
    done = done.assign(accuracy=done[accuracies(table)].mean(axis=1))
    return done.sort_values("accuracy", kind="stable").groupby(["curve", "state_bytes"], sort=False).tail(1)


def rank_correlation(x: pd.Series, y: pd.Series) -> Estimate:
    """Spearman's rank correlation with a bootstrap interval over the points; resamples without spread are left out."""
    points = pd.DataFrame({"x": x.to_numpy(), "y": y.to_numpy()})
    draws = (points.sample(len(points), replace=True, random_state=seed) for seed in range(DRAWS))
    values = [spearmanr(d.x, d.y).statistic for d in draws if d.x.nunique() > 1 and d.y.nunique() > 1]
    low, high = pd.Series(values).quantile(QUANTILES)
    value = float(spearmanr(points.x, points.y).statistic)
    return Estimate(value, min(float(low), value), max(float(high), value))


@torch.no_grad()
def accuracy(model: LanguageModel, objective: Objective, data: TokenData, sequence_length: int) -> dict[int, float]:
    """Fraction of held-out answers whose likeliest token is right, by the number of answers in a sequence."""
    if data.heldout_answers is None:
        raise ValueError(f"{data.name} marks no answers: choose data that does, such as data=associative_recall")
    tokens, answers = (heldout_windows(stream, sequence_length)[0] for stream in (data.heldout, data.heldout_answers))
    rows = []
    for tokens_BT, answers_BT in zip(tokens.split(AT_ONCE), answers.bool().split(AT_ONCE), strict=True):
        logits_NV = objective.logits(model, Batch(tokens_BT, answers_BT.float()))
        right_BT = torch.zeros_like(answers_BT).masked_scatter(
            answers_BT, logits_NV.argmax(-1) == tokens_BT[answers_BT]
        )
        rows.append(pd.DataFrame({"answers": answers_BT.sum(1), "right": right_BT.sum(1)}))
    sums = pd.concat(rows).assign(sequences=1).groupby("answers", as_index=False).sum()
    return dict(zip(sums.answers.tolist(), (sums.right / (sums.answers * sums.sequences)).tolist(), strict=True))
