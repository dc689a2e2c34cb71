"""Runs a plan: stage by stage, only what is missing, through whatever launcher Hydra was given."""

import shlex
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from experiments.findings import jsonable, write_json
from experiments.harness import ledger
from experiments.harness.identity import plain, run_of
from experiments.harness.origin import commit, older_name
from experiments.harness.parts import build, open_data
from experiments.harness.settings import check_run
from experiments.report import report
from experiments.scaling.analysis import analyse
from experiments.scaling.design import Addition, Cell, read_plan
from experiments.scaling.holdout import predict
from experiments.sweeps.adaptive import (
    Stage,
    chosen_rates,
    further_rates,
    further_sizes,
    held_out_sizes,
    missing_cells,
)
from experiments.sweeps.dry_run import describe
from experiments.sweeps.plan import Arm, difference, make_cells, make_plan
from experiments.sweeps.precision import further_precision, read_wish
from experiments.sweeps.prices import prices
from experiments.sweeps.progress import Progress
from experiments.terminal import console

TRIES = 3  # launches of the same cells, where workers are killed


class Sweep:
    """A plan that is carried out.

    Args:
        config: the settings, checked, of which `sweep`, `until`, `limit` and `hardware` are the sweep's.
        compose: overrides -> the config of a run, with its session but without those.
        launch: runs configs of runs that lie in these files, numbered from `first`.
        arguments: of the command, for the plan to say what made it.

    Raises:
        ValueError: for a plan that cannot be made, or that differs from the one in the sweep's folder, and for runs
            there that other code made.
    """

    def __init__(
        self,
        config: DictConfig,
        compose: Callable[[list[str]], DictConfig],
        launch: Callable[[list[Path], int], None],
        arguments: list[str],
    ):
        self.launch, self.launched = launch, 0
        self.console = console()
        self.settings, run = config.sweep, compose([])
        self.hardware = build(config.hardware) if config.hardware else None
        if self.hardware and not self.settings.dry_run:
            raise ValueError(f"hardware={self.hardware.name!r} prices a dry run: add --dry-run, or leave hardware out")
        check_run(plain(run))
        self.wish = read_wish(config.until, config.limit)
        self.folder = Path(run.session.root)
        self.ledger = self.folder / "ledger.jsonl"
        self.console.print(f"corpus {run.data.name}: preparing, or opening what is cached")
        data = open_data(run)
        arms = [Arm(spec, self.settings.tokens_per_parameter, compose, data) for spec in self.settings.arms]
        self.arms = {arm.name: arm for arm in arms}
        arguments = [argument for argument in arguments if not argument.startswith("sweep.dry_run=")]
        command = shlex.join(["python", "-m", "experiments.sweep", *arguments])
        self.console.print(f"plan: measuring the models of {len(arms)} arms at {len(self.settings.budgets)} budgets")
        self.plan = make_plan(self.settings, arms, data, command)
        if not self.settings.dry_run:
            self.check_code(run.session.older)
            self.read_plan()

    def run(self) -> None:
        """Run what is missing, stage by stage, and write the report; or, as a dry run, print the plan."""
        if self.settings.dry_run:
            cells = [cell for arm in self.arms.values() for cell in make_cells(arm, self.settings)]
            for line in describe(
                self.plan, self.arms, cells, ledger.read(self.ledger), self.settings.noise, self.hardware
            ):
                self.console.print(line)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "plan.json").exists():
            write_json(self.folder / "plan.json", self.plan)
        self.carry_out("tune", "learning rates", further_rates)
        self.add(chosen_rates(self.plan, self.arms, ledger.read(self.ledger)))
        self.report_untuned()
        self.carry_out("fit", "fitted budgets", further_sizes)
        self.sharpen()
        self.add(held_out_sizes(self.plan, self.arms, ledger.read(self.ledger)))
        self.predict()
        self.run_missing("held-out budget", self.plan.select("holdout"))
        if not self.launched:
            cells = sum(map(len, self.plan.groups))
            self.console.print(f"nothing to train: all {cells} cells of {self.folder} were finished before")
        for line in report.write(self.folder):
            self.console.print(line, markup=False)

    def check_code(self, older: str) -> None:
        """Refuse what other code made in the sweep's folder, accept it, or put the whole folder aside.

        Raises:
            ValueError: where it is refused.
        """
        now = {name: run_of(arm.config).code for name, arm in self.arms.items()}
        rows = ledger.read(self.ledger)
        rows = rows[rows.status.isin(["done", "diverged"]) & rows.arm.isin(list(now))]
        others = rows[rows.code != rows.arm.map(now)]
        if others.empty or older == "accept":
            return
        if older == "refuse":
            raise ValueError(
                f"{len(others)} of {len(rows)} runs in {self.folder} were made by other code "
                f"({ledger.commits(others)}; now {commit() or 'no commit'}): session.older=accept goes on with them, "
                "session.older=replace puts the folder aside and begins anew"
            )
        self.folder.rename(older_name(self.folder))

    def read_plan(self) -> None:
        """Take over what was added to the plan in the folder.

        Raises:
            ValueError: when that is another plan.
        """
        path = self.folder / "plan.json"
        if path.exists():
            written = read_plan(path)
            if changes := difference(written, jsonable(self.plan)):
                raise ValueError(
                    f"{path} holds another plan than this command asks for:\n  "
                    + "\n  ".join(changes)
                    + "\nGive the sweep another name (sweep.name=...), or go back to the settings on disk"
                )
            self.plan = self.plan.with_additions(written)

    def add(self, addition: Addition | None) -> None:
        """Write an addition to the plan on disk, before anything follows from it."""
        if addition:
            self.plan = replace(self.plan, additions=[*self.plan.additions, addition])
            path = self.folder / "plan.json"
            written = read_plan(path)
            write_json(path, written | {"additions": [*written["additions"], addition]})
            self.console.print(f"{addition.stage}: {addition.reason}", markup=False)

    def carry_out(self, kind: str, title: str, further: Stage) -> None:
        """Run the planned cells of a kind, and then what a stage adds to them until it adds nothing."""
        while True:
            self.run_missing(title, self.plan.select(kind))
            addition = further(self.plan, self.arms, ledger.read(self.ledger))
            if addition is None:
                return
            self.add(addition)

    def sharpen(self) -> None:
        """Add runs until the multiplier is known as well as was asked, if anything was."""
        while self.wish:
            rows = ledger.read(self.ledger)
            found = analyse(rows, self.plan.design, None, self.folder).comparisons
            price = prices(self.arms, self.plan.select("fit"), rows)
            addition = further_precision(self.plan, self.arms, rows, self.wish, found, price)
            if not addition.cells:
                self.console.print(f"{addition.stage}: {addition.reason}", markup=False)
                return
            self.add(addition)
            self.run_missing("more precision", self.plan.select("fit"))

    def run_missing(self, title: str, cells: list[Cell]) -> None:
        """Launch those cells that have no result yet, again where a worker was killed.

        Raises:
            ValueError: where workers are killed again and again.
        """
        for _ in range(TRIES):
            missing = missing_cells(self.plan, self.arms, ledger.read(self.ledger), cells)
            if not missing:
                return
            try:
                self.launch_all(title, missing, done=len(cells) - len(missing))
                return
            except BrokenProcessPool:
                self.console.print("a worker was killed: what was running goes on from its checkpoints")
        raise ValueError(
            f"workers were killed {TRIES} times, for want of memory perhaps: finished runs are kept; start the same "
            "command again with hydra.launcher.n_jobs=1 to go on with one at a time"
        )

    def launch_all(self, title: str, missing: dict[str, Cell], done: int) -> None:
        """Launch cells by the ids of their runs, and show how far they are."""
        files = {}
        for cell_id, cell in missing.items():
            folder = self.folder / "cells" / cell_id
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "running").unlink(missing_ok=True)  # left behind by a sweep that was killed
            files[cell_id] = folder / "cell.yaml"
            OmegaConf.save(self.arms[cell.arm].configure(cell), files[cell_id], resolve=True)
        with Progress(self.console, title, self.folder, missing, done):
            # The dearest first, so that no worker is left alone with a long run at the end.
            order = sorted(missing, key=lambda cell_id: -missing[cell_id].flops)
            self.launch([files[cell_id] for cell_id in order], self.launched)
            self.launched += len(order)

    def report_untuned(self) -> None:
        """Print which arms keep the learning rate of their config though tuning was asked for."""
        for name in self.plan.arms if self.plan.settings["tuning"] else ():
            if name not in self.plan.rates:
                rate = self.arms[name].config.optim.learning_rate
                self.console.print(
                    f"learning rates: no tuning run of {name} succeeded, so the untuned {rate:g} is used"
                )

    def predict(self) -> None:
        """Write what the fitted budgets say of the held-out one, once, before any of its runs starts."""
        path = self.folder / "prediction.json"
        if self.plan.holdout_budget and not path.exists():
            write_json(path, predict(ledger.read(self.ledger), self.plan.design, time.strftime("%FT%T%z")))
