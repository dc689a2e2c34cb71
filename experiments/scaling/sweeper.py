"""Runs a plan: stage by stage, only what is missing, through whatever launcher Hydra was given."""

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from experiments.harness import ledger
from experiments.harness.run import open_data
from experiments.scaling import compare, report
from experiments.scaling.plan import Arm, Cell, difference, make_plan, with_rate
from experiments.scaling.progress import Progress, duration, estimate_seconds

STAGES = {"tune": "learning rates", "fit": "fitted budgets", "holdout": "held-out budget"}


class Sweep:
    """compose: overrides -> config of a run. launch: runs lists of overrides, numbered from `first`.

    Raises:
        ValueError: for a plan that cannot be made, or that differs from the one in the sweep's folder.
    """

    def __init__(
        self,
        compose: Callable[[list[str]], DictConfig],
        launch: Callable[[list[list[str]], int], None],
        arguments: list[str],
    ):
        self.launch, self.launched = launch, 0
        self.console = Console(soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = 150  # a table in a file need not fit a terminal of 80
        config = compose([])
        self.dry_run = config.dry_run
        self.folder = Path(config.root)
        self.ledger = self.folder / "ledger.jsonl"
        self.console.print(f"corpus {config.data.name}: preparing, or opening what is cached")
        data = open_data(config)
        r = config.sweep.tokens_per_parameter
        arms = [Arm(spec, r, compose, data) for spec in config.sweep.arms]
        self.arms = {arm.name: arm for arm in arms}
        arguments = [argument for argument in arguments if not argument.startswith("dry_run=")]
        command = shlex.join(["python", "-m", "experiments.sweep", *arguments])
        self.plan = make_plan(config.sweep, arms, data, command)
        self.cells = [Cell(**cell) for cell in self.plan["cells"]]
        if not self.dry_run:
            self.check_plan()

    def run(self) -> None:
        if self.dry_run:
            self.print_plan()
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "plan.json").exists():
            ledger.write_atomically(self.folder / "plan.json", json.dumps(self.plan, indent=1))
        for kind, title in STAGES.items():
            if kind == "holdout":
                self.predict()
            self.run_stage(title, kind)
            if kind == "tune" and self.plan["tuning"]:
                self.report_tuning()
        if not self.launched:
            self.console.print(f"nothing to train: all {len(self.cells)} cells of {self.folder} were finished before")
        for line in report.write(self.folder):
            self.console.print(line, markup=False)

    def check_plan(self) -> None:
        """Raises ValueError when another plan lies in the folder."""
        path = self.folder / "plan.json"
        if path.exists():
            changes = difference(json.loads(path.read_text()), json.loads(json.dumps(self.plan)))
            changes = [change for change in changes if not change.startswith("commands")]
            if changes:
                raise ValueError(
                    f"{path} holds another plan than this command asks for:\n  "
                    + "\n  ".join(changes)
                    + "\nGive the sweep another name (sweep.name=...), or go back to the settings on disk"
                )

    def rates(self) -> dict[str, float | None]:
        """The learning rate that tuning chose for each arm; None while no tuning run of it is in."""
        rows = ledger.read(self.ledger)
        return {name: tuned_rate(rows[(rows.kind == "tune") & (rows.arm == name)]) for name in self.arms}

    def run_stage(self, title: str, kind: str) -> None:
        rates = self.rates()
        cells = [with_rate(cell, rates[cell.arm]) for cell in self.cells if cell.kind == kind]
        ids = {self.arms[cell.arm].cell_id(cell): cell for cell in cells}
        rows = ledger.read(self.ledger)
        finished = ids.keys() & set(rows[rows.status.isin(["done", "diverged"])].id)
        missing = {cell_id: cell for cell_id, cell in ids.items() if cell_id not in finished}
        if not missing:
            return
        for cell_id in missing:  # left behind by a sweep that was killed
            (self.folder / "cells" / cell_id / "running").unlink(missing_ok=True)
        with Progress(self.console, title, self.folder, missing, done=len(finished)):
            # The dearest first, so that no worker is left alone with a long run at the end.
            order = sorted(missing.values(), key=lambda cell: -cell.flops)
            self.launch([[*self.arms[cell.arm].overrides, *cell.overrides] for cell in order], self.launched)
            self.launched += len(order)

    def report_tuning(self) -> None:
        for name, rate in self.rates().items():
            untuned = self.arms[name].config.optim.learning_rate
            failed = f"no tuning run succeeded, so the untuned {untuned:g} is used"
            self.console.print(f"learning rate of {name}: {failed if rate is None else format(rate, 'g')}")

    def predict(self) -> None:
        """Write what the fitted budgets say of the held-out one, once, before any of its runs starts."""
        path = self.folder / "prediction.json"
        if self.plan["holdout_budget"] and not path.exists():
            prediction = compare.predict(ledger.read(self.ledger), self.plan)
            ledger.write_atomically(path, json.dumps({"written": time.strftime("%FT%T%z"), **prediction}, indent=1))

    def print_plan(self) -> None:
        table = Table(title=f"{self.plan['name']}: {len(self.cells)} cells, nothing is run")
        for column in ("stage", "arm"):
            table.add_column(column)
        for column in ("budget", "width", "depth", "parameters", "tokens", "steps", "FLOPs", "seconds"):
            table.add_column(column, justify="right")
        rates = estimate_seconds(self.arms, self.cells, ledger.read(self.ledger))
        total = 0.0
        for cell in self.cells:
            seconds = cell.flops * rates[cell.arm]
            total += seconds
            numbers = (f"{cell.budget:.3g}", cell.width, cell.depth, f"{cell.params:,}", f"{cell.tokens:,}", cell.steps)
            table.add_row(cell.kind, cell.arm, *map(str, numbers), f"{cell.flops:.4g}", f"{seconds:.0f}")
        self.console.print(table)
        flops = sum(cell.flops for cell in self.cells)
        self.console.print(f"{flops:.3g} FLOPs in all, about {duration(total)} when cells run one after the other")


def tuned_rate(rows: pd.DataFrame) -> float | None:
    """The learning rate of the lowest bits per byte among an arm's tuning runs; None while there are none."""
    rows = rows[rows.status == "done"]
    return None if rows.empty else float(rows.loc[rows.bits_per_byte.idxmin()].learning_rate)
