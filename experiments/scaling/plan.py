"""The plan of a sweep: every cell with its model, tokens and FLOPs, fixed before the first run."""

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from omegaconf import DictConfig, OmegaConf

from archs.flops import Costs
from experiments.data.token_data import TokenData
from experiments.harness.run import measure, run_id, spend


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. `learning_rate` is None until the tuning stage has chosen the arm's."""

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

    @property
    def overrides(self) -> list[str]:
        """What distinguishes the cell among those of its arm, as Hydra overrides."""
        rate = [] if self.learning_rate is None else [f"optim.learning_rate={self.learning_rate!r}"]
        changes = [
            f"kind={self.kind}",
            f"budget.flops={self.budget!r}",
            f"arch.width={self.width}",
            f"seed={self.seed}",
        ]
        return changes + rate


class Arm:
    """A backbone under an objective: its config, and models of it near a given size."""

    def __init__(
        self,
        spec: DictConfig,
        tokens_per_parameter: float,
        compose: Callable[[list[str]], DictConfig],
        data: TokenData,
    ):
        self.name = spec.get("name", f"{spec.arch}+{spec.objective}")
        self.tokens_per_parameter = spec.get("tokens_per_parameter", tokens_per_parameter)
        self.overrides = [f"arch={spec.arch}", f"objective={spec.objective}", f"arm={self.name}"]
        self.overrides += spec.get("overrides", [])
        self.config, self.data = compose(self.overrides), data

    def configure(self, cell: Cell) -> DictConfig:
        """The run's config, as the launcher will compose it from the overrides."""
        config = self.config.copy()
        OmegaConf.update(config, "budget.flops", cell.budget)
        OmegaConf.update(config, "arch.width", cell.width)
        OmegaConf.update(config, "seed", cell.seed)
        if cell.learning_rate is not None:
            OmegaConf.update(config, "optim.learning_rate", cell.learning_rate)
        return config

    def cell_id(self, cell: Cell) -> str:
        return run_id(self.configure(cell))

    @functools.cache
    def measure(self, width: int) -> tuple[Costs, int]:
        config = self.config.copy()
        OmegaConf.update(config, "arch.width", width)
        return measure(config, self.data)

    def params(self, width: int) -> int:
        return self.measure(width)[0].params_total

    def optimum(self, budget: float) -> float:
        """The planned optimal number of parameters, N* = sqrt(C / (6 r)) with r tokens a parameter."""
        return math.sqrt(budget / (6 * self.tokens_per_parameter))

    def widths(self, budget: float, sizes: int, span: float) -> list[int]:
        """`sizes` different widths whose models lie from N* / span to N* x span, evenly in log N as far as widths go."""
        step = self.config.arch.width_multiple
        centre, chosen = self.optimum(budget), []
        for i in range(sizes):
            target = centre * span ** (2 * i / max(1, sizes - 1) - 1) if sizes > 1 else centre
            width = max(nearest_width(self.params, target, step), chosen[-1] + step if chosen else step)
            chosen.append(width)
        return chosen

    def cell(self, kind: str, budget: float, width: int, seed: int, learning_rate: float | None) -> Cell:
        """Raises ValueError when the budget does not pay for this model or the corpus is too short for it."""
        cost, depth = self.measure(width)
        cell = Cell(kind, self.name, budget, width, seed, learning_rate, cost.params_total, depth, 0, 0, 0.0)
        try:
            allocation = spend(self.configure(cell), self.data, cost)
        except ValueError as error:
            raise ValueError(f"{self.name}, budget {budget:.3g}, width {width}: {error}") from error
        return replace(cell, tokens=allocation.tokens, steps=allocation.steps, flops=allocation.flops)


def nearest_width(params: Callable[[int], int], target: float, step: int) -> int:
    """The multiple of `step` whose model is nearest to `target` parameters in log; params must grow with width."""
    high = 1
    while params(high * step) < target:
        high *= 2
    low = max(1, high // 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if params(middle * step) < target else (low, middle)
    return step * min((low, high), key=lambda n: abs(math.log(params(n * step) / target)))


def make_cells(arm: Arm, sweep: DictConfig) -> list[Cell]:
    """All cells of an arm: tuning, the fitted budgets from small to large, the held-out budget."""
    cells = []
    budgets = sorted(float(budget) for budget in sweep.budgets)
    if sweep.tuning:
        budget = float(sweep.tuning.budget)
        width = arm.widths(budget, 1, 1)[0]
        for rate in sweep.tuning.learning_rates:
            cells.append(arm.cell("tune", budget, width, sweep.tuning.seed, float(rate)))
    stages = [("fit", budget, sweep.sizes, sweep.span) for budget in budgets]
    if sweep.holdout:
        stages.append(("holdout", float(sweep.holdout.budget), sweep.holdout.sizes, sweep.holdout.span))
    for kind, budget, sizes, span in stages:
        for width in arm.widths(budget, sizes, span):
            cells += [arm.cell(kind, budget, width, seed, None) for seed in sweep.seeds]
    return cells


def make_plan(sweep: DictConfig, arms: list[Arm], data: TokenData, command: str) -> dict:
    """The plan as written to plan.json.

    Raises:
        ValueError: for budgets that are not positive and distinct, a held-out budget that is not the largest, two arms
            of one name, and whatever makes a cell impossible.
    """
    budgets = sorted(float(budget) for budget in sweep.budgets)
    if not budgets or budgets[0] <= 0 or len(set(budgets)) < len(budgets):
        raise ValueError(f"sweep.budgets={budgets} must be positive and different FLOPs")
    holdout = float(sweep.holdout.budget) if sweep.holdout else None
    if holdout is not None and holdout <= budgets[-1]:
        raise ValueError(
            f"sweep.holdout.budget={holdout:.3g} must lie above the largest fitted budget, {budgets[-1]:.3g}"
        )
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ValueError(f"sweep.arms={names} must have different names: give each its own `name`")
    return {
        "name": sweep.name,
        "arms": names,
        "budgets": budgets,
        "holdout_budget": holdout,
        "prior": {
            "rule": "N* = sqrt(C / (6 r)), D* = C / (6 N*)",
            "tokens_per_parameter": {arm.name: arm.tokens_per_parameter for arm in arms},
            "optimal_params": {
                arm.name: {f"{c:.6g}": arm.optimum(c) for c in [*budgets, holdout or budgets[-1]]} for arm in arms
            },
        },
        "tuning": OmegaConf.to_container(sweep.tuning, resolve=True) if sweep.tuning else None,
        "corpus": {
            "name": data.name,
            "digest": data.digest,
            "train_tokens": len(data.train),
            "heldout_bytes": data.heldout_bytes,
        },
        "commands": [command],
        "configs": {arm.name: run_id(arm.config) for arm in arms},
        "cells": [asdict(cell) for arm in arms for cell in make_cells(arm, sweep)],
    }


def difference(old: dict, new: dict, path: str = "") -> list[str]:
    """Where two plans differ, one line a place; long lists are summed up."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in difference(old.get(key), new.get(key), f"{path}.{key}".strip("."))]
    if isinstance(old, list) and isinstance(new, list) and old and isinstance((old + new)[0], dict):
        gone, come = [x for x in old if x not in new], [x for x in new if x not in old]
        return [f"{path}: {len(gone)} only on disk, {len(come)} only in the new plan"] if gone or come else []
    return [] if old == new else [f"{path}: {old} on disk, {new} in the new plan"]


def with_rate(cell: Cell, learning_rate: float | None) -> Cell:
    """A planned cell with the learning rate that tuning chose; tuning cells keep their own."""
    return cell if cell.learning_rate is not None else replace(cell, learning_rate=learning_rate)
