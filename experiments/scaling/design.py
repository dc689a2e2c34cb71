"""The part of a sweep's plan that the analysis reads."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Corpus:
    name: str
    digest: str
    train_tokens: int
    heldout_bytes: int


@dataclass(frozen=True)
class Design:
    """arms: names, the reference first. budgets: the fitted ones in FLOPs, ascending. cells: the number planned."""

    name: str
    arms: tuple[str, ...]
    budgets: tuple[float, ...]
    holdout_budget: float | None
    cells: int
    corpus: Corpus
    commands: tuple[str, ...]

    @classmethod
    def from_plan(cls, plan: dict) -> "Design":
        """Returns the design of a plan as plan.json holds it."""
        corpus = plan["corpus"]
        return cls(
            name=plan["name"],
            arms=tuple(plan["arms"]),
            budgets=tuple(plan["budgets"]),
            holdout_budget=plan["holdout_budget"],
            cells=len(plan["cells"]),
            corpus=Corpus(corpus["name"], corpus["digest"], corpus["train_tokens"], corpus["heldout_bytes"]),
            commands=tuple(plan["commands"]),
        )

    @property
    def centre(self) -> float:
        """The mean of ln budget, at which the laws' levels are given."""
        return float(np.log(self.budgets).mean())


def read_design(folder: Path) -> Design:
    """Read it from the sweep's folder."""
    return Design.from_plan(json.loads((folder / "plan.json").read_text()))
