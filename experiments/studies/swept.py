"""Studies of a sweep that has been run: they train nothing, and their tables come of its ledger."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.findings import Refused
from experiments.harness import ledger
from experiments.scaling.design import Design, read_design
from experiments.scaling.joint import Joint, join
from experiments.studies.study import Cell, Compose, Study


@dataclass(frozen=True)
class Swept(Study, ABC):
    """Reads a sweep. sweep: its folder. draws: of surfaces that its runs allow."""

    sweep: str
    draws: int

    def cells(self, compose: Compose) -> Iterable[Cell]:
        return ()

    @abstractmethod
    def table(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The table, from the sweep's ledger; of the study's own rows there are none."""

    @cached_property
    def design(self) -> Design:
        """The design of the sweep.

        Raises:
            ValueError: where there is none.
        """
        return read_design(Path(self.sweep))

    @cached_property
    def runs(self) -> pd.DataFrame:
        """The rows of its ledger."""
        return self.design.losses(ledger.read(Path(self.sweep) / "ledger.jsonl"))

    def joint(self, most: float = math.inf) -> Joint:
        """Return the surface of its fitted runs whose budgets are not above `most` FLOPs.

        Raises:
            ValueError: where they are too few.
        """
        joint = join(self.runs[self.runs.budget_flops <= most], self.design, {}, draws=self.draws)
        if isinstance(joint, Refused):
            raise ValueError(f"study.sweep={self.sweep} has no surface up to {most:.3g} FLOPs: {joint.refused}")
        return joint

    def log_cost(self, joint: Joint, arm: str, reference: str, budget: float) -> tuple[np.ndarray, np.ndarray]:
        """Return ln of how many times the compute of a reference an arm takes for its own loss at a budget of FLOPs: by
        the fitted surface, and by each that the runs allow.

        Raises:
            ValueError: for an arm that the surface has not.
        """
        mine, other, log_flops = self.number(joint, arm), self.number(joint, reference), math.log(budget)
        fitted, drawn = joint.fit.surface, joint.draws
        return -fitted.log_multiplier(mine, other, log_flops), -drawn.log_multiplier(mine, other, log_flops)

    def number(self, joint: Joint, arm: str) -> int:
        """Return the number of an arm in the surface.

        Raises:
            ValueError: for an arm that it has not.
        """
        number = joint.number(arm)
        if number is None:
            raise ValueError(f"study.sweep={self.sweep} has no fitted arm {arm!r}: choose from {', '.join(joint.arms)}")
        return number
