"""The plan of a sweep: every cell with its model, tokens and FLOPs, fixed before the first run."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from omegaconf import DictConfig

from experiments.data.token_data import TokenData
from experiments.harness.assembly import Measured, measure, spend
from experiments.harness.identity import plain, run_of
from experiments.scaling.design import Corpus, Design


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
class Plan:
    """What is written to plan.json.

    prior: what the sizes are laid around. tuning: the settings of that stage, or None. corpus: name, digest and sizes
    of the data. commands: what made the plan. configs: the id of each arm's config before a cell is chosen. cells: arm
    by arm.
    """

    name: str
    arms: list[str]
    budgets: list[float]
    holdout_budget: float | None
    prior: dict
    tuning: dict | None
    corpus: Corpus
    commands: list[str]
    configs: dict[str, str]
    cells: list[Cell]

    @property
    def design(self) -> Design:
        """The part that the analysis reads."""
        return Design.from_plan(asdict(self))


class Arm:
    """A backbone under an objective: its config, and models of it near a given size.

    Args:
        spec: arch, objective and, where wanted, name, tokens_per_parameter and further overrides.
        tokens_per_parameter: where the spec has none of its own.
        compose: overrides -> the config of a run with its session.
    """

    def __init__(
        self,
        spec: DictConfig,
        tokens_per_parameter: float,
        compose: Callable[[list[str]], DictConfig],
        data: TokenData,
    ):
        self.name = spec.get("name", f"{spec.arch}+{spec.objective}")
        self.tokens_per_parameter = spec.get("tokens_per_parameter", tokens_per_parameter)
        self.config = compose([f"arch={spec.arch}", f"objective={spec.objective}", *spec.get("overrides", [])])
        self.config.session.arm = self.name
        self.data, self.measured = data, {}

    def configure(self, cell: Cell) -> DictConfig:
        """The config of a cell's run with its session: the one place where a cell is spelled out."""
        config = self.config.copy()
        config.session.kind = cell.kind
        config.budget.flops, config.arch.width, config.seed = cell.budget, cell.width, cell.seed
        if cell.learning_rate is not None:
            config.optim.learning_rate = cell.learning_rate
        return config

    def cell_id(self, cell: Cell) -> str:
        return run_of(self.configure(cell)).id

    def measure(self, width: int) -> Measured:
        """Costs of the arm's model of this width."""
        if width not in self.measured:
            config = self.config.copy()
            config.arch.width = width
            self.measured[width] = measure(config, self.data)
        return self.measured[width]

    def params(self, width: int) -> int:
        return self.measure(width).costs.params_total

    def optimum(self, budget: float) -> float:
        """The planned optimal number of parameters, N* = sqrt(C / (6 r)) with r tokens per parameter."""
        return math.sqrt(budget / (6 * self.tokens_per_parameter))

    def widths(self, budget: float, sizes: int, span: float) -> list[int]:
        """`sizes` different widths whose models lie from N* / span to N* x span, evenly in log N as far as widths
        go."""
        step = self.config.arch.width_multiple
        centre, chosen = self.optimum(budget), []
        for i in range(sizes):
            target = centre * span ** (2 * i / max(1, sizes - 1) - 1) if sizes > 1 else centre
            width = max(nearest_width(self.params, target, step), chosen[-1] + step if chosen else step)
            chosen.append(width)
        return chosen

    def cell(self, kind: str, budget: float, width: int, seed: int, learning_rate: float | None) -> Cell:
        """Plan one cell.

        Raises:
            ValueError: when the budget does not pay for this model or the corpus is too short for it.
        """
        measured = self.measure(width)
        params, depth = measured.costs.params_total, measured.depth
        cell = Cell(kind, self.name, budget, width, seed, learning_rate, params, depth, 0, 0, 0.0)
        try:
            allocation = spend(self.configure(cell), self.data, measured)
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


def make_plan(sweep: DictConfig, arms: list[Arm], data: TokenData, command: str) -> Plan:
    """The plan of a sweep.

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
    return Plan(
        name=sweep.name,
        arms=names,
        budgets=budgets,
        holdout_budget=holdout,
        prior={
            "rule": "N* = sqrt(C / (6 r)), D* = C / (6 N*)",
            "tokens_per_parameter": {arm.name: arm.tokens_per_parameter for arm in arms},
            "optimal_params": {
                arm.name: {f"{c:.6g}": arm.optimum(c) for c in [*budgets, holdout or budgets[-1]]} for arm in arms
            },
        },
        tuning=plain(sweep.tuning) if sweep.tuning else None,
        corpus=Corpus(data.name, data.digest, len(data.train), data.heldout_bytes),
        commands=[command],
        configs={arm.name: run_of(arm.config).id for arm in arms},
        cells=[cell for arm in arms for cell in make_cells(arm, sweep)],
    )


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """Places where two plans as JSON differ, one line each; long lists are summed up."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in difference(old.get(key), new.get(key), f"{path}.{key}".strip("."))]
    if isinstance(old, list) and isinstance(new, list) and old and isinstance((old + new)[0], dict):
        gone, come = [x for x in old if x not in new], [x for x in new if x not in old]
        return [f"{path}: {len(gone)} only on disk, {len(come)} only in the new plan"] if gone or come else []
    return [] if old == new else [f"{path}: {old} on disk, {new} in the new plan"]
