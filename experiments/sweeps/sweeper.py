"""Runs a plan: stage by stage, only what is missing, through whatever launcher Hydra was given."""

import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from experiments.findings import jsonable, write_json
from experiments.harness import ledger
from experiments.harness.failures import shortened
from experiments.harness.files import locked, write_atomically
from experiments.harness.identity import plain, run_of
from experiments.harness.origin import commit, older_name
from experiments.harness.parts import build, open_data
from experiments.harness.run import finished, now
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
from experiments.sweeps.needs import needs_of
from experiments.sweeps.plan import Arm, Plan, difference, make_cells, make_plan
from experiments.sweeps.precision import further_precision, read_wish
from experiments.sweeps.prices import prices
from experiments.sweeps.progress import Progress
from experiments.sweeps.worker import Died, Preempted
from experiments.terminal import console

TRIES = 2  # of a cell that dies, in one start of the sweep


class Sweep:
    """A plan that is carried out.

    Args:
        config: the settings, checked, of which `sweep`, `until`, `limit` and `hardware` are the sweep's.
        compose: overrides -> the config of a run, with its session but without those.
        launch: runs configs of runs that lie in these files, numbered from `first`, with what each needs; returns for
            each None, or what it died of.
        arguments: of the command, for the plan to say what made it.

    Raises:
        ValueError: for a plan that cannot be made, or that differs from the one in the sweep's folder, and for runs
            there that other code made.
    """

    def __init__(
        self,
        config: DictConfig,
        compose: Callable[[list[str]], DictConfig],
        launch: Callable[[list[Path], list[dict], int], list[Exception | None]],
        arguments: list[str],
    ):
        self.launch, self.launched = launch, 0
        self.over: set[str] = set()  # ids of runs that have ended since the start, one way or another
        self.deaths: Counter[str] = Counter()
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
        with self.deciding():
            if not (self.folder / "plan.json").exists():
                write_json(self.folder / "plan.json", self.plan)
        watch = shlex.join(["python", "-m", "experiments.watch", f"root={self.folder}"])
        self.console.print(f"to watch it in a browser: {watch}", markup=False)
        self.carry_out("tune", "learning rates", further_rates)
        while self.decide(chosen_rates):
            pass
        self.report_untuned()
        self.carry_out("fit", "fitted budgets", further_sizes)
        if self.wish:
            self.carry_out("fit", "more precision", self.sharpen)
        while self.decide(held_out_sizes):
            pass
        self.predict()
        self.run_missing("held-out budget", self.plan.select("holdout"))
        if not self.launched:
            cells = sum(map(len, self.plan.groups))
            self.console.print(f"nothing to train: all {cells} cells of {self.folder} were finished before")
        with self.deciding():
            lines = report.write(self.folder)
        for line in lines:
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

    def deciding(self) -> AbstractContextManager[None]:
        """Held by one of several sweeps in the folder at a time."""
        return locked(self.folder / "plan.lock")

    def decide(self, further: Stage) -> bool:
        """Take over what another sweep in this folder has added to the plan, or add what a stage says, on disk before
        anything follows from it. Returns whether there was anything."""
        path = self.folder / "plan.json"
        with self.deciding():
            written = read_plan(path)
            if len(written["additions"]) > len(self.plan.additions):
                self.plan = self.plan.with_additions(written)
                return True
            addition = further(self.plan, self.arms, ledger.read(self.ledger))
            if addition is None:
                return False
            self.plan = replace(self.plan, additions=[*self.plan.additions, addition])
            write_json(path, written | {"additions": [*written["additions"], addition]})
        self.console.print(f"{addition.stage}: {addition.reason}", markup=False)
        return True

    def carry_out(self, kind: str, title: str, further: Stage) -> None:
        """Run the planned cells of a kind, and then what a stage adds to them until it adds nothing."""
        self.run_missing(title, self.plan.select(kind))
        while self.decide(further):
            self.run_missing(title, self.plan.select(kind))

    def sharpen(self, plan: Plan, arms: Mapping[str, Arm], rows: pd.DataFrame) -> Addition | None:
        """The runs that make the multiplier better known, until it is known as well as was asked."""
        assert self.wish is not None
        found = analyse(rows, plan.design, None, self.folder).comparisons
        price = prices(arms, plan.select("fit"), rows)
        addition = further_precision(plan, arms, rows, self.wish, found, price)
        if addition.cells:
            return addition
        self.console.print(f"{addition.stage}: {addition.reason}", markup=False)
        return None

    def run_missing(self, title: str, cells: list[Cell]) -> None:
        """Launch those cells that have no result yet. One that dies is tried again once; then its row says why, and it
        is tried again when the sweep is started again."""
        while missing := self.missing(cells):
            ends = self.launch_all(title, missing, done=len(cells) - len(missing))
            left = missing_cells(self.plan, self.arms, ledger.read(self.ledger), cells)
            for cell_id, death in ends.items():
                if death is None or cell_id not in left:  # it may have died after its row was written
                    self.over.add(cell_id)
                else:
                    self.note_death(cell_id, missing[cell_id], death)

    def missing(self, cells: list[Cell]) -> dict[str, Cell]:
        """The cells that are to be launched, by the ids of their runs."""
        left = missing_cells(self.plan, self.arms, ledger.read(self.ledger), cells)
        return {cell_id: cell for cell_id, cell in left.items() if cell_id not in self.over}

    def note_death(self, cell_id: str, cell: Cell, death: Exception) -> None:
        """Say that a cell has died, and write its row if it was its last try."""
        name = f"run {cell_id} ({cell.arm}, {cell.budget:.3g} FLOPs, width {cell.width}, seed {cell.seed})"
        if isinstance(death, Preempted):
            self.console.print(f"{name} was told to stop: it goes on from its checkpoint", markup=False)
            return
        self.deaths[cell_id] += 1
        said = str(death).strip().splitlines() or [""]
        why = shortened(said[0] if isinstance(death, Died) else f"{type(death).__name__}: {said[0]}")
        if self.deaths[cell_id] < TRIES:
            self.console.print(
                f"{name} died and is tried again, from its checkpoint if it has one ({why})", markup=False
            )
            return
        self.over.add(cell_id)
        run = run_of(self.arms[cell.arm].configure(cell))
        row = asdict(cell) | {"id": cell_id, "status": "failed", "error": why, "params_total": cell.params}
        row |= {"budget_flops": cell.budget, "code": run.code, "commit": commit(), "finished": now()}
        row |= {part: run.config[part].name for part in ("arch", "objective", "data")}
        with locked(run.folder / "lock"):  # another sweep may be running it
            if not finished(run):
                ledger.append(self.ledger, {column: row.get(column) for column in ledger.COLUMNS})
        self.console.print(f"{name} died again, which its row says; the sweep goes on without it ({why})", markup=False)

    def launch_all(self, title: str, missing: dict[str, Cell], done: int) -> dict[str, Exception | None]:
        """Launch cells by the ids of their runs, and show how far they are; returns what those died of that did."""
        for cell_id, cell in missing.items():
            folder = self.folder / "cells" / cell_id
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "running").unlink(missing_ok=True)  # left behind by a worker that was killed
            text, file = OmegaConf.to_yaml(self.arms[cell.arm].configure(cell), resolve=True), folder / "cell.yaml"
            with self.deciding():  # another sweep may be writing it
                if not (file.exists() and file.read_text() == text):
                    write_atomically(file, text)
        # The dearest first, so that no worker is left alone with a long run at the end.
        order = sorted(missing, key=lambda cell_id: -missing[cell_id].flops)
        files = [self.folder / "cells" / cell_id / "cell.yaml" for cell_id in order]
        needs = needs_of((missing[cell_id] for cell_id in order), self.settings.needs, ledger.read(self.ledger))
        with Progress(self.console, title, self.folder, missing, done):
            deaths = self.launch(files, [asdict(its) for its in needs], self.launched)
            self.launched += len(order)
        return dict(zip(order, deaths, strict=True))

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
        with self.deciding():
            if self.plan.holdout_budget and not path.exists():
                write_json(path, predict(ledger.read(self.ledger), self.plan.design, time.strftime("%FT%T%z")))
