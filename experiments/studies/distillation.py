"""Distilled against trained from scratch at equal FLOPs, with the teacher's counted in three ways (Busbridge et al.,
"Distillation Scaling Laws", arXiv 2502.08606, at playground size)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.findings import Estimate, Verdict
from experiments.harness.assembly import measure
from experiments.harness.identity import run_of
from experiments.harness.weights import FinishedRun, load_trained
from experiments.report.figures import COLOURS, MARKERS
from experiments.studies.study import Cell, Compose, Stages, Study
from objectives.post_training.distillation import Distillation

SCRATCH, TEACHER = "from_scratch", "teacher"
ACCOUNTS = {
    "own_flops": "the student's own FLOPs",
    "flops": "with the teacher's passes",
    "all_flops": "with the teacher's training too",
}
LINES = ["-", "--", ":"]


@dataclass(frozen=True)
class Distilled(Study):
    """Trains teachers, students from scratch, and the same students from their teachers, on data of known entropy.

    teachers: name -> overrides. students: name -> its overrides, its teacher, the overrides that train it from scratch
    and their budgets in FLOPs, those of each way to distil it, and their budgets, the teacher's passes included, and
    how many of the seeds it takes where not all. The verdict is on the first way of the first student.
    """

    teachers: dict[str, list[str]]
    students: dict[str, dict]
    seeds: list[int]

    def stages(self, compose: Compose) -> Stages:
        teachers = {}
        for name, overrides in self.teachers.items():
            labels = {"student": name, "method": TEACHER}
            teachers[name] = Cell(labels, run_of(compose(overrides)))
        scratch = [
            cell
            for name, student in self.students.items()
            for cell in self.trained(compose, name, SCRATCH, student[SCRATCH], student["scratch_budgets"])
        ]
        done = yield [*teachers.values(), *scratch]
        distilled = []
        for name, student in self.students.items():
            if (teacher := teachers[student["teacher"]]) in done:
                for method, overrides in student["distilled"].items():
                    overrides = [*overrides, f"objective.models.teacher={teacher.run.id}"]
                    distilled += self.trained(compose, name, method, overrides, student["budgets"])
        yield distilled

    def trained(
        self, compose: Compose, name: str, method: str, overrides: list[str], budgets: list[float]
    ) -> Iterator[Cell]:
        for seed in self.seeds[: self.students[name].get("seeds")]:
            for budget in budgets:
                more = [f"budget.flops={budget}", f"seed={seed}", f"session.arm={name}+{method}"]
                config = compose([*self.students[name]["overrides"], *overrides, *more])
                yield Cell({"student": name, "method": method, "budget": budget, "seed": seed}, run_of(config))

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """The entropy of the held-out data, in bits per byte, and the share of the run's FLOPs that was the teacher's
        passes."""
        if (nats := finished.data.heldout_entropy) is None:
            raise ValueError(f"{finished.data.name} has no known entropy: choose data that has, as data=hidden_markov")
        run, share = measure(cell.run.config, finished.data, load_trained(cell.run.others)), 0.0
        if isinstance(run.objective, Distillation):
            T = finished.config.data.sequence_length
            share = run.objective.teaching_flops(T, finished.data.counted) / T / run.costs.flops_per_token
        return [{"entropy": nats / math.log(2) / finished.data.heldout_bytes, "teaching": share}]

    def figure(self, table: pd.DataFrame) -> Figure:
        """Bits per byte above the entropy against FLOPs, counted in three ways: means over seeds and their spread."""
        canvas = Figure(figsize=(14, 5.2), layout="constrained")
        panels, runs = canvas.subplots(1, len(ACCOUNTS), sharey=True, sharex=True), accounted(table)
        methods = list(dict.fromkeys(runs.method))
        for axes, (account, title) in zip(panels, ACCOUNTS.items(), strict=True):
            for i, (name, student) in enumerate(self.students.items()):
                for method in (SCRATCH, *student["distilled"]):
                    rows = runs[(runs.student == name) & (runs.method == method)].groupby("budget")
                    middle, low, high = rows.gap.mean(), rows.gap.min(), rows.gap.max()
                    bound = " (upper bound)" if (rows.bits_per_byte_kind.first() == "bound").any() else ""
                    look = {"color": COLOURS[methods.index(method) % len(COLOURS)], "ls": LINES[i % len(LINES)]}
                    axes.errorbar(
                        rows[account].mean(), middle, [middle - low, high - middle], label=f"{name}, {method}{bound}",
                        marker=MARKERS[i % len(MARKERS)], ms=5, capsize=2, **look,
                    )  # fmt: skip
            teachers = runs[runs.method == TEACHER]
            axes.plot(teachers.flops, teachers.gap, ls="", color="#888888", marker="*", ms=11, label=TEACHER)
            axes.set(xscale="log", yscale="log", title=title, xlabel="training FLOPs")
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("held-out bits per byte above the entropy")
        canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        """From the largest budget of the first student's first way."""
        runs = accounted(table)
        found = {
            (name, method): {account: advantage(runs, name, method, account) for account in ACCOUNTS}
            for name, student in self.students.items()
            for method in student["distilled"]
        }
        judged = next(iter(found.values()))
        there, trained = judged["flops"], judged["all_flops"]
        if there is None or trained is None:
            return Verdict("cannot tell", "There are too few seeds to compare.", None, self.rule)
        if there.low > 1 > trained.high:
            outcome = "holds"
        elif there.high < 1 or trained.low > 1:
            outcome = "does not hold"
        else:
            outcome = "cannot tell"
        said = "; ".join(
            f"{name} {method} " + ", ".join("–" if x is None else f"{x:.2f}" for x in by_account.values())
            for (name, method), by_account in found.items()
        )
        sentence = (
            "How many times as far from the entropy as the distilled student is that from scratch at as many FLOPs: "
            f"of the student alone, with the teacher's passes, and with its training. {said}."
        )
        return Verdict(outcome, sentence, there, self.rule)


def accounted(table: pd.DataFrame) -> pd.DataFrame:
    """The runs that are done, with their distance to the entropy and their FLOPs by each account."""
    done = table[table.status == "done"]
    others = done.flops_others.fillna(0.0) if "flops_others" in done else 0.0
    return done.assign(
        gap=done.bits_per_byte - done.entropy,
        own_flops=done.flops * (1 - done.teaching),
        all_flops=done.flops + others,
    )


def advantage(runs: pd.DataFrame, student: str, method: str, account: str) -> Estimate | None:
    """Return the distance to the entropy of the student from scratch over that of the distilled student of the largest
    budget, which cost as much by this account: the mean over seeds of the logarithm, with its interval; None for fewer
    than two seeds. Between the budgets of a seed its losses from scratch are interpolated, both logarithmic; beyond
    them the nearest stands."""
    mine = runs[runs.student == student]
    ratios = []
    for _, rows in mine.groupby("seed"):
        scratch, rows = rows[rows.method == SCRATCH].sort_values("flops"), rows[rows.method == method]
        if len(scratch) and len(rows):
            largest = rows.loc[rows.budget.idxmax()]
            at = np.interp(np.log(largest[account]), np.log(scratch.flops), np.log(scratch.gap))
            ratios.append(at - np.log(largest.gap))
    return Estimate.of_mean(ratios).map(math.exp) if len(ratios) > 1 else None
