"""What is forgotten for what is gained: one base tuned to a new task by several methods of equal FLOPs (Shenfeld et
al., "RL's Razor", arXiv 2509.04259, at playground size).

Shape letters: P held-out prompts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from archs.language_model import LanguageModel
from experiments.data.token_data import TokenData
from experiments.findings import Estimate, Verdict
from experiments.harness.identity import run_of
from experiments.harness.parts import build
from experiments.harness.tasks import heldout_problems, score
from experiments.harness.weights import FinishedRun, load_run
from experiments.report.figures import COLOURS, MARKERS
from experiments.studies.sides import above
from experiments.studies.study import Cell, Compose, Stages, Study
from objectives.contracts import Batch, Objective, Request
from objectives.post_training.divergences import written_kl
from objectives.post_training.tuning import prompts_of

BASE, TEACHER = "base", "teacher"
DRAWS = 500  # resamples of the models
LAW = 0.8  # of the pairs of models, above which the divergence tells who has forgotten more


@dataclass(frozen=True)
class Forgetting(Study):
    """Trains a base on old tasks and on the form of a new one, and goes on with the new one alone.

    old: data configs of the old tasks, with their overrides. correct: the fraction of the new task's demonstrations
    that are right in the base's data. base, teacher: overrides of these two runs; the teacher begins with the base.
    methods: name -> its overrides, the learning rates it is tried with, and whether it asks for the teacher.
    prompts, samples: held-out prompts of each task, and answers to each, that models are scored by.
    """

    old: dict[str, list[str]]
    correct: float
    base: list[str]
    teacher: list[str]
    methods: dict[str, dict]
    seeds: list[int]
    prompts: int
    samples: int

    def stages(self, compose: Compose) -> Stages:
        done = yield [Cell({"method": BASE}, run_of(self.base_config(compose)))]
        if not done:
            return
        begin = f"init_from={done[0].run.id}"
        learners = {name: method for name, method in self.methods.items() if not method.get(TEACHER)}
        teacher = Cell({"method": TEACHER}, run_of(compose([*self.teacher, begin])))
        done = yield [teacher, *self.tuned(compose, learners, begin)]
        taught = {name: method for name, method in self.methods.items() if method.get(TEACHER)}
        if teacher in done:
            yield self.tuned(compose, taught, begin, f"objective.models.teacher={teacher.run.id}")

    def base_config(self, compose: Compose) -> DictConfig:
        """That of the base, whose data are the new task's demonstrations, few of them right, and the old tasks'."""
        config = compose(self.base)
        old = [compose([f"data={name}", *overrides]).data.tokens for name, overrides in self.old.items()]
        new = OmegaConf.merge(config.data.tokens, {"correct": self.correct})
        config.data.tokens = {
            "_target_": "experiments.data.mixture.mixture",
            "_convert_": "all",
            "parts": [OmegaConf.to_container(part, resolve=True) for part in (new, *old)],
            "weights": [1.0] * (1 + len(old)),
            "sequence_length": config.data.sequence_length,
            "seed": 0,
        }
        return config

    def tuned(self, compose: Compose, methods: dict[str, dict], *more: str) -> Iterator[Cell]:
        for name, method in methods.items():
            for rate in method["learning_rates"]:
                for seed in self.seeds:
                    own = [*method["overrides"], f"optim.learning_rate={rate}", f"seed={seed}"]
                    config = compose([*own, *more])
                    config.session.arm = name
                    yield Cell({"method": name, "learning_rate": rate, "seed": seed}, run_of(config))

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """pass@1 of the new task and of the old ones in the mean, bits per byte of all old tasks' held-out answers, and
        the divergences between the model and the base, in nats per answer."""
        base = load_run(cell.run.init_from, finished.data) if cell.run.init_from else finished
        few = {"train_problems": 1, "demonstrations": 1}  # which the held-out ones do not depend on
        old = [build(DictConfig({**part} | few)) for part in base.config.data.tokens.parts[1:]]
        model, objective, length = finished.model, finished.objective, finished.config.data.sequence_length

        def passed(data: TokenData) -> list[float]:
            (found,) = score(model, objective, data, length, self.prompts, self.samples).values()
            return found["pass@1"]

        nats = sum(heldout_nats(model, objective, data, length) for data in old)
        pairs = {"kl": (model, base.model), "kl_back": (base.model, model)}
        moved = {name: divergence(*pair, objective, finished.data, length) for name, pair in pairs.items()}
        return [
            dict(zip(("pass@1", "pass@1_low", "pass@1_high"), passed(finished.data), strict=True))
            | {"old_pass@1": float(np.mean([passed(data)[0] for data in old]))}
            | {"old_bits_per_byte": nats / math.log(2) / sum(data.heldout_bytes for data in old)}
            | {f"{name}{end}": x for name, found in moved.items() for end, x in zip(("", "_se"), found, strict=True)}
        ]

    def figure(self, table: pd.DataFrame) -> Figure:
        """Forgetting against the divergence, and against the gain, a marker per model; lines through the means of
        seeds, from the least learning rate to the greatest."""
        canvas = Figure(figsize=(11, 5), layout="constrained")
        panels = canvas.subplots(1, 2, sharey=True)
        models = against_base(table)
        looks = list(zip(COLOURS, MARKERS, strict=True))
        for axes, x in zip(panels, ("kl", "gain"), strict=True):
            for (colour, marker), name in zip(looks, self.methods, strict=False):
                rows = models[models.method == name]
                line = rows.groupby("learning_rate")[[x, "forgetting"]].mean()
                axes.plot(line[x], line.forgetting, color=colour, lw=0.8, alpha=0.6)
                axes.plot(rows[x], rows.forgetting, ls="", color=colour, marker=marker, ms=5, label=name)
            teacher = models[models.method == TEACHER]
            axes.plot(teacher[x], teacher.forgetting, ls="", color="#888888", marker="*", ms=11, label=TEACHER)
            axes.set_yscale("symlog", linthresh=0.01)
            axes.grid(alpha=0.3)
        panels[0].set(xscale="log", xlabel="KL(tuned || base) on the new task, nats per answer")
        panels[0].set_ylabel("forgotten: old tasks' bits per byte above the base's")
        panels[1].set_xlabel("gained: pass@1 of the new task above the base's")
        canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(self.methods) + 1)
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        """From the pairs of models that two methods have made of the base."""
        models = against_base(table)
        models = models[models.method.isin(list(self.methods))]
        sizes = models.groupby("method").size()
        if len(sizes) < 2 or sizes.min() < 2:
            sentence = f"{len(models)} models of {len(sizes)} methods are too few."
            return Verdict("cannot tell", sentence, None, self.rule)
        effect, by_gain = concordance(models, "kl"), concordance(models, "gain")
        outcome = above(effect, LAW)
        level, least = forgotten_at_equal_gain(models)
        said = ", ".join(f"{name} {x:.3f}" for name, x in least.sort_values().items())
        sentence = (
            f"Of two of {len(models)} models tuned by different methods, the one that moved farther has forgotten more "
            f"in {effect:.2f} of the pairs, and the one that gained more in {by_gain:.2f}. At the gain in pass@1 that "
            f"all methods reach, {level:.2f}, they have forgotten, in bits per byte: {said}."
        )
        return Verdict(outcome, sentence, effect, self.rule)


def against_base(table: pd.DataFrame) -> pd.DataFrame:
    """The tuned models, with what each has gained and forgotten since the base."""
    done = table[table.status == "done"]
    base, models = done[done.method == BASE], done[done.method != BASE]
    if base.empty:
        return models.iloc[:0].assign(gain=0.0, forgetting=0.0)
    of_base = base.iloc[0]
    return models.assign(
        gain=models["pass@1"] - of_base["pass@1"],
        forgetting=models["old_bits_per_byte"] - of_base["old_bits_per_byte"],
    )


def concordance(models: pd.DataFrame, column: str) -> Estimate:
    """Of all pairs of models of different methods, the fraction in which the one with more in the column has forgotten
    more, a tie being half; with the 95 % interval over models drawn again within each method."""
    codes, values = models.method.factorize()[0], models[[column, "forgetting"]].to_numpy(float)

    def fraction(rows: np.ndarray) -> float:
        x, y = values[rows].T
        signs = np.sign(x[:, None] - x) * np.sign(y[:, None] - y)
        return float((1 + signs[codes[rows][:, None] != codes[rows]]).mean() / 2)

    random, all_rows = np.random.default_rng(0), np.arange(len(models))
    strata = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    draws = [fraction(np.concatenate([random.choice(rows, len(rows)) for rows in strata])) for _ in range(DRAWS)]
    return Estimate.of_draws(fraction(all_rows), np.array(draws))


def forgotten_at_equal_gain(models: pd.DataFrame) -> tuple[float, pd.Series]:
    """Nine tenths of the gain that the best learning rate of every method reaches, and by method the least forgetting
    of a learning rate that gains so much; means over seeds."""
    means = models.groupby(["method", "learning_rate"])[["gain", "forgetting"]].mean()
    level = 0.9 * float(means.gain.groupby("method").max().min())
    return level, means[means.gain >= level].forgetting.groupby("method").min()


def heldout_nats(model: LanguageModel, objective: Objective, data: TokenData, length: int) -> float:
    """-log p of all held-out answers."""
    likelihood = objective.evaluate(model, heldout_problems(data, length), torch.Generator().manual_seed(0))
    return likelihood.nats_B.sum().item()


def divergence(
    writer: LanguageModel, other: LanguageModel, objective: Objective, data: TokenData, length: int
) -> tuple[float, float]:
    """KL(writer || other) in nats per answer to the held-out prompts, one of each of which is drawn from the writer,
    and its standard error over prompts."""
    prompts = prompts_of(heldout_problems(data, length))
    request = Request(prompts, length, torch.Generator().manual_seed(0), stop=(data.eot,))
    written = objective.sample(writer, request)
    nats_P = written_kl(writer, other, objective, Batch(written.tokens_BT, written.answers_BT.float()))
    return nats_P.mean().item(), (nats_P.std() / len(nats_P) ** 0.5).item()
