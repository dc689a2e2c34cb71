"""Runs a plan: stage by stage, only what is missing, through whatever launcher Hydra was given."""

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from experiments.findings import jsonable, write_json
from experiments.harness import ledger
from experiments.harness.assembly import open_data
from experiments.scaling import report
from experiments.scaling.analysis import tuned_rate
from experiments.scaling.holdout import predict
from experiments.scaling.plan import Arm, difference, make_plan
from experiments.scaling.progress import Progress, duration, estimate_seconds

STAGES = {"tune": "learning rates", "fit": "fitted budgets", "holdout": "held-out budget"}


class Sweep:
    """A plan that is carried out.

    Args:
        settings: the node `sweep` of the config.
        compose: overrides -> the config of a run, with its session but without that node.
        launch: runs configs of runs that lie in these files, numbered from `first`.
        arguments: of the command, for the plan to say what made it.

    Raises:
        ValueError: for a plan that cannot be made, or that differs from the one in the sweep's folder.
    """

    def __init__(
        self,
        settings: DictConfig,
        compose: Callable[[list[str]], DictConfig],
        launch: Callable[[list[Path], int], None],
        arguments: list[str],
    ):
        self.launch, self.launched = launch, 0
        self.console = Console(soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = 150  # a table in a file need not fit a terminal of 80
        config = compose([])
        self.dry_run = settings.dry_run
        self.folder = Path(config.session.root)
        self.ledger = self.folder / "ledger.jsonl"
        self.console.print(f"corpus {config.data.name}: preparing, or opening what is cached")
        data = open_data(config)
        arms = [Arm(spec, settings.tokens_per_parameter, compose, data) for spec in settings.arms]
        self.arms = {arm.name: arm for arm in arms}
        arguments = [argument for argument in arguments if not argument.startswith("sweep.dry_run=")]
        command = shlex.join(["python", "-m", "experiments.sweep", *arguments])
        self.plan = make_plan(settings, arms, data, command)
        if not self.dry_run:
            self.check_plan()

    def run(self) -> None:
        """Run what is missing, stage by stage, and write the report; or, as a dry run, print the plan."""
        if self.dry_run:
            self.print_plan()
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "plan.json").exists():
            write_json(self.folder / "plan.json", self.plan)
        for kind, title in STAGES.items():
            if kind == "holdout":
                self.predict()
            self.run_stage(title, kind)
            if kind == "tune" and self.plan.tuning:
                self.report_tuning()
        if not self.launched:
            self.console.print(
                f"nothing to train: all {len(self.plan.cells)} cells of {self.folder} were finished before"
            )
        for line in report.write(self.folder):
            self.console.print(line, markup=False)

    def check_plan(self) -> None:
        """
        Raises:
            ValueError: when another plan lies in the folder.
        """
        path = self.folder / "plan.json"
        if path.exists():
            changes = difference(json.loads(path.read_text()), jsonable(self.plan))
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
        """Launch the cells of one kind that have no result yet."""
        rates = self.rates()
        cells = [cell.with_rate(rates[cell.arm]) for cell in self.plan.cells if cell.kind == kind]
        ids = {self.arms[cell.arm].cell_id(cell): cell for cell in cells}
        rows = ledger.read(self.ledger)
        finished = ids.keys() & set(rows[rows.status.isin(["done", "diverged"])].id)
        missing = {cell_id: cell for cell_id, cell in ids.items() if cell_id not in finished}
        if not missing:
            return
        files = {}
        for cell_id, cell in missing.items():
            folder = self.folder / "cells" / cell_id
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "running").unlink(missing_ok=True)  # left behind by a sweep that was killed
            files[cell_id] = folder / "cell.yaml"
            OmegaConf.save(self.arms[cell.arm].configure(cell), files[cell_id], resolve=True)
        with Progress(self.console, title, self.folder, missing, done=len(finished)):
            # The dearest first, so that no worker is left alone with a long run at the end.
            order = sorted(missing, key=lambda cell_id: -missing[cell_id].flops)
            self.launch([files[cell_id] for cell_id in order], self.launched)
            self.launched += len(order)

    def report_tuning(self) -> None:
        """Print the learning rate of each arm."""
        for name, rate in self.rates().items():
            untuned = self.arms[name].config.optim.learning_rate
            failed = f"no tuning run succeeded, so the untuned {untuned:g} is used"
            self.console.print(f"learning rate of {name}: {failed if rate is None else format(rate, 'g')}")

    def predict(self) -> None:
        """Write what the fitted budgets say of the held-out one, once, before any of its runs starts."""
        path = self.folder / "prediction.json"
        if self.plan.holdout_budget and not path.exists():
            write_json(path, predict(ledger.read(self.ledger), self.plan.design, time.strftime("%FT%T%z")))

    def print_plan(self) -> None:
        """Print every cell with its FLOPs and an estimate of its time."""
        cells = self.plan.cells
        table = Table(title=f"{self.plan.name}: {len(cells)} cells, nothing is run")
        for column in ("stage", "arm"):
            table.add_column(column)
        for column in ("budget", "width", "depth", "parameters", "tokens", "steps", "FLOPs", "seconds"):
            table.add_column(column, justify="right")
        rates = estimate_seconds(self.arms, cells, ledger.read(self.ledger))
        total = 0.0
        for cell in cells:
            seconds = cell.flops * rates[cell.arm]
            total += seconds
            numbers = (f"{cell.budget:.3g}", cell.width, cell.depth, f"{cell.params:,}", f"{cell.tokens:,}", cell.steps)
            table.add_row(cell.kind, cell.arm, *map(str, numbers), f"{cell.flops:.4g}", f"{seconds:.0f}")
        self.console.print(table)
        flops = sum(cell.flops for cell in cells)
        self.console.print(f"{flops:.3g} FLOPs in all, about {duration(total)} when cells run one after the other")
