"""The plan of a sweep: every cell with its model, tokens and FLOPs, fixed before the first run."""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments.data.token_data import TokenData
from experiments.harness.assembly import Measured, measure, spend
from experiments.harness.identity import models_of, plain, run_of
from experiments.harness.parts import build
from experiments.harness.weights import load_trained
from experiments.scaling.design import BROKEN, Addition, Cell, Corpus, Design
from objectives.post_training.tuning import Trained

PLACES = 10_000  # of seeds, a thousand to each
LAID_BLINDLY = 2  # fitted budgets whose sizes are laid around the guess N*, even where later ones are not
SETTINGS = ("sizes", "span", "seeds", "holdout", "tuning", "recentre", "widen", "above_entropy")  # by which cells come
FREE = ("commands", "additions")  # in which plans on disk and of a command may differ


@dataclass(frozen=True)
class Plan:
    """The content of plan.json.

    prior: what the sizes are laid around. settings: by which cells are added. corpus: name, digest and sizes of the
    data. commands: what made the plan. configs: the id of each arm's config before a cell is chosen. cells: those known
    from the beginning, arm by arm. additions: those decided since, and why.
    """

    name: str
    arms: list[str]
    budgets: list[float]
    holdout_budget: float | None
    prior: dict
    settings: dict
    corpus: Corpus
    commands: list[str]
    configs: dict[str, str]
    cells: list[Cell]
    additions: list[Addition]

    @property
    def design(self) -> Design:
        """The part that the analysis reads."""
        return Design.from_plan(asdict(self))

    @property
    def groups(self) -> list[list[Cell]]:
        """All cells so far, in the order in which they were decided on."""
        return [self.cells, *(addition.cells for addition in self.additions)]

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates that were decided on, by arm."""
        return {arm: rate for addition in self.additions for arm, rate in addition.rates.items()}

    def select(self, kind: str, arm: str | None = None, budget: float | None = None) -> list[Cell]:
        """All cells so far of a kind, of an arm and a budget where given."""
        return [
            cell
            for group in self.groups
            for cell in group
            if cell.kind == kind and arm in (None, cell.arm) and budget in (None, cell.budget)
        ]

    def with_additions(self, written: dict) -> "Plan":
        """Returns the plan with the additions of plan.json.

        Raises:
            ValueError: for additions that no sweep wrote.
        """
        try:
            additions = [
                Addition(**addition | {"cells": [Cell(**cell) for cell in addition["cells"]]})
                for addition in written["additions"]
            ]
        except BROKEN as error:
            raise ValueError(f"plan.json holds additions that no sweep wrote ({error!r}): put back its file") from error
        return replace(self, additions=additions)


class Arm:
    """A backbone under an objective: its config, and models of it near a given size.

    Args:
        spec: arch, objective and, where wanted, name, tokens_per_parameter, sizes and further overrides.
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
        self.sizes: int | None = spec.get("sizes")
        self.config = compose([f"arch={spec.arch}", f"objective={spec.objective}", *spec.get("overrides", [])])
        self.config.session.arm = self.name
        self.data, self.measured, self.ids = data, {}, {}

    def configure(self, cell: Cell) -> DictConfig:
        """The config of a cell's run with its session: the one place where a cell is spelled out."""
        config = self.config.copy()
        config.session.kind = cell.kind
        config.budget.flops, config.arch.width, config.seed = cell.budget, cell.width, cell.seed
        if cell.learning_rate is not None:
            config.optim.learning_rate = cell.learning_rate
        return config

    def cell_id(self, cell: Cell) -> str:
        """The id of a cell's run."""
        if cell not in self.ids:
            self.ids[cell] = run_of(self.configure(cell)).id
        return self.ids[cell]

    @cached_property
    def trained(self) -> dict[str, Trained]:
        """The models that the arm's objective asks for, by name, which are the same for every width."""
        models = models_of(plain(self.config.objective), Path(self.config.session.root))
        return load_trained({name: folder for name, (folder, _) in models.items()})

    def measure(self, width: int) -> Measured:
        """Costs of the arm's model of this width."""
        if width not in self.measured:
            config = self.config.copy()
            config.arch.width = width
            self.measured[width] = measure(config, self.data, self.trained)
        return self.measured[width]

    def params(self, width: int) -> int:
        return self.measure(width).costs.params_total

    def optimum(self, budget: float) -> float:
        """The planned optimal number of parameters, N* = sqrt(C / (6 r)) with r tokens per parameter."""
        return math.sqrt(budget / (6 * self.tokens_per_parameter))

    def widths(self, centre: float, sizes: int, span: float) -> list[int]:
        """`sizes` different widths whose models lie from centre / span to centre x span parameters, evenly in their log
        as far as widths go."""
        step, chosen = self.config.arch.width_multiple, []
        for i in range(sizes):
            target = centre * span ** (2 * i / max(1, sizes - 1) - 1) if sizes > 1 else centre
            width = max(nearest_width(self.params, target, step), chosen[-1] + step if chosen else step)
            chosen.append(width)
        return chosen

    def width_beyond(self, width: int, factor: float) -> int | None:
        """The width whose model has `factor` times the parameters, at least one step away; None below the smallest."""
        step = self.config.arch.width_multiple
        wanted = nearest_width(self.params, self.params(width) * factor, step)
        beyond = max(wanted, width + step) if factor > 1 else min(wanted, width - step)
        return beyond if beyond >= step else None

    def evaluations(self, cell: Cell) -> int:
        """The number of held-out evaluations in a cell's run."""
        evaluation = self.measure(cell.width).evaluation_flops(self.data)
        return build(self.config.trainer).evaluations_in(cell.flops, evaluation)

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
    """All cells of an arm as they are expected before any run: tuning, the fitted budgets from small to large, the
    held-out budget."""
    cells = []
    if sweep.tuning:
        rates = sorted(float(rate) for rate in sweep.tuning.learning_rates)
        for number, budget in enumerate(sorted(float(budget) for budget in sweep.tuning.budgets)):
            width = arm.widths(arm.optimum(budget), 1, 1)[0]
            middle = rates[len(rates) // 2]
            for rate in rates if number == 0 else around(middle, rates):
                cells += [arm.cell("tune", budget, width, seed, rate) for seed in sweep.tuning.seeds]
    sizes = arm.sizes or sweep.sizes
    stages = [("fit", budget, sizes, sweep) for budget in sorted(map(float, sweep.budgets))]
    if sweep.holdout:
        stages.append(("holdout", float(sweep.holdout.budget), sweep.holdout.sizes, sweep.holdout))
    for kind, budget, sizes, settings in stages:
        for number, width in enumerate(arm.widths(arm.optimum(budget), sizes, settings.span)):
            seeds = own_seeds(settings.get("seeds") or sweep.seeds, budget, number)
            cells += [arm.cell(kind, budget, width, seed, None) for seed in seeds]
    return cells


def own_seeds(seeds: Iterable[int], budget: float, number: int) -> list[int]:
    """Seeds of one size's runs: of every budget and size its own, and the same for that size of every arm.

    Runs of one initialisation err alike at every budget, and runs of one order of the data in every size. With the same
    seeds everywhere an arm would be off as a whole, which no scatter of its runs about its surface shows; arms that
    share a size's seeds share its order of the data, which their comparison then does not feel.

    Args:
        seeds: as they stand in the settings, added to a thousand times the place of budget and size.
        number: of the size at this budget, from 0.
    """
    place = zlib.crc32(f"{budget:.6g} {number}".encode()) % PLACES
    return [1000 * place + seed for seed in seeds]


def around(rate: float, rates: Sequence[float]) -> list[float]:
    """A learning rate and those a step of the grid `rates` below and above, to three digits."""
    step = rates[-1] / rates[-2]
    return [float(f"{x:.3g}") for x in (rate / step, rate, rate * step)]


def known_first(cells: list[Cell], sweep: DictConfig) -> list[Cell]:
    """Those of the expected cells that do not wait for what others find: of tuning the smallest budget, and where
    sizes are laid anew (`recentre`) the two smallest fitted budgets."""
    first = {"tune": sorted(float(budget) for budget in sweep.tuning.budgets)[:1] if sweep.tuning else []}
    if sweep.recentre:
        first |= {"fit": sorted(map(float, sweep.budgets))[:LAID_BLINDLY], "holdout": []}
    return [cell for cell in cells if cell.kind not in first or cell.budget in first[cell.kind]]


def check(sweep: DictConfig) -> None:
    """Check settings against each other; each by itself is checked by `SweepSettings`.

    Raises:
        ValueError: for budgets, seeds or rates that stand twice, and a held-out budget that is not the largest.
    """
    lists = {name: sweep[name] for name in ("budgets", "seeds")}
    lists |= {f"tuning.{name}": sweep.tuning[name] for name in ("budgets", "learning_rates", "seeds") if sweep.tuning}
    lists |= {"holdout.seeds": sweep.holdout.get("seeds") or []} if sweep.holdout else {}
    for name, values in lists.items():
        if len(set(values)) < len(values):
            raise ValueError(f"sweep.{name}={list(values)} must be different")
    budgets = sorted(float(budget) for budget in sweep.budgets)
    if sweep.holdout and float(sweep.holdout.budget) <= budgets[-1]:
        raise ValueError(
            f"sweep.holdout.budget={float(sweep.holdout.budget):.3g} must lie above the largest fitted budget, "
            f"{budgets[-1]:.3g}"
        )


def make_plan(sweep: DictConfig, arms: list[Arm], data: TokenData, command: str) -> Plan:
    """The plan of a sweep before its first run.

    Raises:
        ValueError: as `check`, for two arms of one name, and whatever makes an expected cell impossible.
    """
    check(sweep)
    budgets = sorted(float(budget) for budget in sweep.budgets)
    holdout = float(sweep.holdout.budget) if sweep.holdout else None
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
        settings={name: value for name, value in plain(sweep).items() if name in SETTINGS},
        corpus=Corpus(data.name, data.digest, len(data.train), data.heldout_bytes),
        commands=[command],
        configs={arm.name: run_of(arm.config).id for arm in arms},
        cells=[cell for arm in arms for cell in known_first(make_cells(arm, sweep), sweep)],
        additions=[],
    )


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """Places where two plans as JSON differ, one line each; long lists are summed up. The commands and what was added
    on the way may differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in [*old, *(key for key in new if key not in old)] if path or key not in FREE]
        return [line for key in keys for line in difference(old.get(key), new.get(key), f"{path}.{key}".strip("."))]
    if isinstance(old, list) and isinstance(new, list) and old and isinstance((old + new)[0], dict):
        gone, come = [x for x in old if x not in new], [x for x in new if x not in old]
        return [f"{path}: {len(gone)} only on disk, {len(come)} only in the new plan"] if gone or come else []
    return [] if old == new else [f"{path}: {old} on disk, {new} in the new plan"]
