"""The part of a sweep's plan that the analysis reads."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Corpus:
    name: str
    digest: str
    train_tokens: int
    heldout_bytes: int


@dataclass(frozen=True)
class Cell:
    """One run of a sweep, as the plan, the ledger's labels and the launcher know it. `learning_rate` is None until the
    tuning stage has chosen the arm's."""

    kind: str
    arm: str
    budget: float
    width: int
    seed: int
    learning_rate: float | None
    params: int
    depth: int
    tokens: int
    steps: int
    flops: float

    def with_rate(self, learning_rate: float | None) -> "Cell":
        """The cell with the learning rate that tuning chose; tuning cells keep their own."""
        return self if self.learning_rate is not None else replace(self, learning_rate=learning_rate)


@dataclass(frozen=True)
class Addition:
    """What a sweep decided on its way, written to the plan before anything follows from it.

    stage: what it is about. reason: in words. cells: to be run from then on. rates: the learning rate of all other
    runs, by arm.
    """

    time: str
    stage: str
    reason: str
    cells: list[Cell]
    rates: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Design:
    """arms: names, the reference first. budgets: the fitted ones in FLOPs, ascending, with those that were added.
    centre: the mean of ln budget of those first planned, at which the laws' levels are given: a budget that is added
    does not move the question. cells: the number planned and added. holdout_cells: by arm, (FLOPs, tokens) of each
    held-out cell."""

    name: str
    arms: tuple[str, ...]
    budgets: tuple[float, ...]
    centre: float
    holdout_budget: float | None
    cells: int
    corpus: Corpus
    commands: tuple[str, ...]
    holdout_cells: dict[str, tuple[tuple[float, float], ...]]

    @classmethod
    def from_plan(cls, plan: dict) -> "Design":
        """Returns the design of a plan as plan.json holds it, with the additions made so far."""
        corpus = plan["corpus"]
        added = [cell for addition in plan.get("additions", []) for cell in addition["cells"]]
        cells = [*plan["cells"], *added]
        held_out = [cell for cell in cells if cell.get("kind") == "holdout" and "tokens" in cell]
        return cls(
            name=plan["name"],
            arms=tuple(plan["arms"]),
            budgets=tuple(sorted({*plan["budgets"], *(cell["budget"] for cell in added if cell["kind"] == "fit")})),
            centre=float(np.log(plan["budgets"]).mean()),
            holdout_budget=plan["holdout_budget"],
            cells=len(cells),
            corpus=Corpus(corpus["name"], corpus["digest"], corpus["train_tokens"], corpus["heldout_bytes"]),
            commands=tuple(plan["commands"]),
            holdout_cells={
                arm: tuple((cell["flops"], cell["tokens"]) for cell in held_out if cell["arm"] == arm)
                for arm in plan["arms"]
            },
        )


def read_design(folder: Path) -> Design:
    """Read it from the sweep's folder."""
    return Design.from_plan(json.loads((folder / "plan.json").read_text()))
