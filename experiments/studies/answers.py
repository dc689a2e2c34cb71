"""Variants that are compared by the answers they get right, pair by pair, and by the passes that an answer takes."""

from dataclasses import dataclass
from os.path import commonprefix

import pandas as pd
import torch
from matplotlib.figure import Figure

from experiments.findings import Estimate, Verdict
from experiments.harness.tasks import heldout_problems, texts_of
from experiments.harness.weights import FinishedRun
from experiments.report.figures import COLOURS, MARKERS
from experiments.studies.ablation import Ablation, at_an_end, counted
from experiments.studies.sides import on_their_sides
from experiments.studies.study import Cell
from objectives.contracts import Batch, Request, Sampler
from objectives.decoding.draws import Draw
from objectives.decoding.unmasking import Ordered, Unmasking
from objectives.post_training.tuning import evaluating, prompts_of


@dataclass(frozen=True)
class Answers(Ablation):
    """Tunes and trains each variant as an ablation does, on a task of its own, and has it answer held-out problems.

    Each of `better` is claimed to answer more of them right than the one in the same place of `than`, by more than
    `margin`. Always the likeliest token is taken: from left to right by next-token prediction, and by diffusion in
    passes that each keep an equal share of the masked tokens, the surest first.

    passes: of diffusion, besides as many as an answer has tokens, which is what is judged.
    """

    passes: list[int]

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """One row per number of passes. Nothing of the runs that tune."""
        if cell.labels["stage"] == "tune":
            return [{}]
        problems = heldout_problems(finished.data, finished.config.data.sequence_length)
        answer = int(problems.counted_BT.sum(1).max())
        samplers: list[Sampler | None] = [None]
        if Unmasking in finished.objective.samplers:
            fewer = [passes for passes in self.passes if passes < answer]
            samplers = [Ordered("confidence", passes) for passes in (*fewer, answer)]
        named = {"objective": finished.config.objective.name}
        return [named | answered(finished, problems, sampler) for sampler in samplers]

    def figure(self, table: pd.DataFrame) -> Figure:
        """The fraction of answers that are right against the passes that they took, a panel per pair."""
        canvas = Figure(figsize=(3.1 * len(self.better), 3.6), layout="constrained")
        grid = canvas.subplots(1, len(self.better), sharey=True, squeeze=False)[0]
        runs = counted(table)
        looks = dict(zip(runs.objective.unique(), zip(COLOURS, MARKERS, strict=True), strict=False))
        for panel, *pair in zip(grid, self.better, self.than, strict=True):
            for name in pair:
                rows = runs[runs.variant == name]
                for objective, some in rows.groupby("objective"):
                    colour, marker = looks[objective]
                    panel.plot(some.passes, some.accuracy, marker, color=colour, alpha=0.35, ms=4)
                    mean = some.groupby("passes").accuracy.mean()
                    panel.plot(mean.index, mean, color=colour, marker=marker, label=str(objective).replace("_", " "))
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:g}")
            panel.set_title(f"{_task(*pair)}\nclaimed ahead: {_rest(*pair)}", fontsize="medium")
            panel.set(ylim=(-0.03, 1.03), xlabel="passes per answer")
            panel.grid(alpha=0.3)
        canvas.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        grid[0].set_ylabel("fraction of answers right")
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        runs = counted(table)
        last = runs.sort_values("passes").groupby("id", sort=False).tail(1)
        right = last.pivot(index="seed", columns="variant", values="accuracy").reindex(columns=list(self.variants))
        pairs = {_task(*pair): right[pair[0]] - right[pair[1]] for pair in zip(self.better, self.than, strict=True)}
        outcome, task, effect = on_their_sides(pd.DataFrame(pairs), above=list(pairs), below=[], threshold=self.margin)
        if effect is None:
            return Verdict(outcome, f"{task} has too few seeds to judge.", None, self.rule)
        in_one = runs[runs.passes == 1].groupby("variant").accuracy.mean().to_dict()
        means = {
            name: f"{value:.3f}" + (f" ({in_one[name]:.3f} in one pass)" if name in in_one else "")
            for name, value in right.mean().items()
        }
        differences = {name: Estimate.of_mean(values.dropna()) for name, values in pairs.items()}
        said = (
            f"{name}: {_rest(a, b)} {means[a]}, {_rest(b, a)} {means[b]}, difference {differences[name]:.3f}"
            for name, a, b in zip(pairs, self.better, self.than, strict=True)
        )
        sentence = f"Answers right, the claimed winner first. {'; '.join(said)}. Read from {task}."
        return Verdict(outcome, sentence + at_an_end(table), effect, self.rule)


def answered(finished: FinishedRun, problems: Batch, sampler: Sampler | None) -> dict[str, float]:
    """Return the fraction of problems of its data that a model answers right by a sampler, taking the likeliest tokens,
    and the passes of the network that an answer took."""
    data, length = finished.data, finished.config.data.sequence_length
    assert data.environment is not None
    prompts, chance = prompts_of(problems), torch.Generator().manual_seed(0)
    with evaluating(finished.model):
        request = Request(prompts, length, chance, draw=Draw(temperature=0.0), stop=(data.eot,))
        written = finished.objective.sample(finished.model, request, sampler)
    texts = texts_of(data, written.tokens_BT, written.answers_BT)
    right = sum(data.environment.check(*text) == 1 for text in texts)
    return {"accuracy": right / len(texts), "passes": written.evaluations}


def _task(better: str, than: str) -> str:
    """Returns what two names have in common at their beginning."""
    return commonprefix([better, than]).rstrip("_").replace("_", " ")


def _rest(better: str, than: str) -> str:
    return better.removeprefix(commonprefix([better, than])).replace("_", " ")
