"""The part of a sweep's plan that the analysis reads."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

BROKEN = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)  # of JSON that is something else


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
    """A decision of a sweep on its way, written to the plan before anything follows from it.

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
    held-out cell. above_entropy: the loss that is compared is the bits per byte above the entropy of the language."""

    name: str
    arms: tuple[str, ...]
    budgets: tuple[float, ...]
    centre: float
    holdout_budget: float | None
    cells: int
    corpus: Corpus
    commands: tuple[str, ...]
    holdout_cells: dict[str, tuple[tuple[float, float], ...]]
    above_entropy: bool = False

    @property
    def loss(self) -> str:
        """The loss that is compared, in words."""
        return "bits per byte above the entropy" if self.above_entropy else "bits per byte"

    def losses(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Returns rows of the ledger with that loss for their bits per byte.

        Raises:
            ValueError: for a run whose entropy is not known, or that does not lie above it.
        """
        if not self.above_entropy:
            return rows
        above = rows.bits_per_byte.astype(float) - rows.entropy_bits_per_byte.astype(float)
        wrong = rows.id[(rows.status == "done") & ~(above > 0)]
        if len(wrong):
            raise ValueError(
                f"run {wrong.iloc[0]} has no loss above the entropy: only a language whose entropy is known, such as "
                "data=hidden_markov, can be compared by it, and only by runs that are worse than perfect"
            )
        return rows.assign(bits_per_byte=above)

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
            above_entropy=plan.get("settings", {}).get("above_entropy", False),
        )


def read_plan(path: Path) -> dict:
    """Returns the plan that a sweep wrote.

    Raises:
        ValueError: for a file that holds something else.
    """
    try:
        plan = json.loads(path.read_text())
        Design.from_plan(plan)
    except BROKEN as error:
        raise ValueError(
            f"{path} holds no plan ({error!r}): put back the file that the sweep wrote, or give the sweep another name"
        ) from error
    return plan


def read_design(folder: Path) -> Design:
    """Returns the design of the sweep in a folder. Raises ValueError as `read_plan` does."""
    return Design.from_plan(read_plan(folder / "plan.json"))
