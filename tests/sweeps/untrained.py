"""Sweeps whose runs are not trained: their losses follow planted laws, so that what a sweep decides can be watched."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from experiments.harness import ledger
from experiments.scaling.design import Cell, Corpus
from experiments.sweeps.adaptive import missing_cells
from experiments.sweeps.plan import SETTINGS, Arm, Plan, known_first, make_cells

SWEEP = {
    "name": "untrained", "budgets": [3e10, 6e10, 1.2e11, 2.4e11], "sizes": 6, "span": 3, "seeds": [0],
    "holdout": {"budget": 9.6e11, "sizes": 3, "span": 2}, "recentre": True, "widen": 3,
    "tuning": {"budgets": [3e10, 2.4e11], "learning_rates": [0.0025, 0.005, 0.01, 0.02], "seeds": [1000], "widen": 4},
}  # fmt: skip


class UntrainedArm(Arm):
    """An arm of models of 48 width^2 parameters, each of six FLOPs per token, in a corpus of `corpus` tokens."""

    def __init__(self, name, corpus=math.inf, sizes=None):
        self.name, self.tokens_per_parameter, self.sizes, self.corpus = name, 50, sizes, corpus
        self.config = OmegaConf.create({"arch": {"width_multiple": 2}, "objective": {"name": "next_token"}})

    def params(self, width):
        return 48 * width**2

    def cell_id(self, cell):
        return "-".join(map(str, (cell.kind, cell.arm, cell.budget, cell.width, cell.seed, cell.learning_rate)))

    def cell(self, kind, budget, width, seed, learning_rate):
        tokens = int(budget / 6 / self.params(width))
        if not 0 < tokens < self.corpus:
            raise ValueError(f"{tokens} tokens")
        flops = 6.0 * tokens * self.params(width)
        return Cell(kind, self.name, budget, width, seed, learning_rate, self.params(width), 4, tokens, 1, flops)


class Untrained:
    """A sweep in memory, and the runs it has launched.

    off: the optimal number of parameters over the planned one. rate: the best learning rate. multipliers: by arm, the
    first is the reference. noise: of ln(loss). failing: of a cell, whether it fails. fewer: sizes of an arm that has
    its own number of them.
    """

    def __init__(
        self, off=1.0, rate=0.008, multipliers=(1.0, 1.2), noise=0.005, seed=0, failing=None, fewer=None, **changes
    ):
        self.off, self.rate, self.noise, self.rng = off, rate, noise, np.random.default_rng(seed)
        self.failing = failing or (lambda cell: False)
        self.arms = {
            name: UntrainedArm(name, sizes=(fewer or {}).get(name))
            for name in (f"arm{i}" for i in range(len(multipliers)))
        }
        self.multipliers = dict(zip(self.arms, multipliers, strict=True))
        sweep = OmegaConf.create(SWEEP | changes)
        self.rows = pd.DataFrame([], columns=ledger.COLUMNS)
        self.plan = Plan(
            name=sweep.name, arms=list(self.arms), budgets=sorted(sweep.budgets), prior={}, commands=[], configs={},
            holdout_budget=sweep.holdout.budget if sweep.holdout else None,
            settings={key: value for key, value in OmegaConf.to_container(sweep).items() if key in SETTINGS},
            corpus=Corpus("none", "0", 10**12, 1000), additions=[],
            cells=[cell for arm in self.arms.values() for cell in known_first(make_cells(arm, sweep), sweep)],
        )  # fmt: skip

    def loss(self, cell):
        """With alpha = beta = 0.4 and a floor of half of the loss at 1e11 FLOPs."""
        size, data = math.sqrt(1e11 / 300) * self.off, math.sqrt(1e11 / 300) * 50 / self.off
        gain = self.multipliers[cell.arm] ** -0.2
        loss = 1.5 + 0.75 * gain * ((cell.params / size) ** -0.4 + (cell.tokens / data) ** -0.4)
        return loss * (1 + 0.02 * math.log((cell.learning_rate or 0.01) / self.rate) ** 2)

    def run(self, cells):
        """Launch those of the cells that have no result, and return how many there were."""
        missing = missing_cells(self.plan, self.arms, self.rows, cells)
        known = self.rows[~self.rows.id.isin(missing)].to_dict("records")
        for name, cell in missing.items():
            status = "failed" if self.failing(cell) else "done"
            loss = self.loss(cell) * math.exp(self.rng.normal(0, self.noise))
            known.append(dict.fromkeys(ledger.COLUMNS) | {
                "id": name, "status": status, "kind": cell.kind, "arm": cell.arm, "budget_flops": cell.budget,
                "flops": cell.flops, "flops_6nd": cell.flops, "params_total": cell.params, "width": cell.width,
                "tokens": cell.tokens, "steps": cell.steps, "seed": cell.seed,
                "learning_rate": cell.learning_rate or 0.01,
                "bits_per_byte": loss if status == "done" else None, "bits_per_byte_se": 0.0,
                "bits_per_byte_kind": "exact", "wall_seconds": 1e-10 * cell.flops, "train_seconds": 1e-10 * cell.flops,
                "tokens_per_second": 1e4, "peak_memory_bytes": 1e9, "state_bytes": 1e5,
            })  # fmt: skip
        self.rows = pd.DataFrame(known, columns=ledger.COLUMNS)
        return len(missing)

    def add(self, addition):
        self.plan = replace(self.plan, additions=[*self.plan.additions, addition])

    def carry_out(self, kind, further):
        """As `Sweep.carry_out`; returns the additions."""
        before = len(self.plan.additions)
        while True:
            self.run(self.plan.select(kind))
            addition = further(self.plan, self.arms, self.rows)
            if addition is None:
                return self.plan.additions[before:]
            self.add(addition)
