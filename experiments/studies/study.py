"""Studies: claims tested by runs. The cells, the settings and the rule of the verdict are written before the first run.

A study is one class in one file here and one config in configs/study: cells -> rows -> table -> figure -> verdict. Runs
and what is measured on them are kept by the run's id, so a study that is started again does only what is missing. Where
runs go on from others, the cells come in stages, and each stage is planned before its own first run.
"""

import hashlib
import itertools
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from joblib import Parallel, delayed
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from experiments.data.token_data import TokenData
from experiments.findings import Verdict, jsonable, write_json
from experiments.harness.identity import Run, plain, run_id, run_of
from experiments.harness.origin import code_digest, targets
from experiments.harness.parts import open_data
from experiments.harness.run import execute
from experiments.harness.weights import FinishedRun, load_run

Compose = Callable[[Sequence[str]], DictConfig]  # overrides -> the config of a run, with its session

# Columns of the ledger that every table has, behind the labels of the cell and before what is measured.
KEPT = ("id", "status", "error", "params_total", "flops", "tokens", "steps", "state_bytes", "bits_per_byte")
KEPT += ("bits_per_byte_se", "bits_per_byte_kind", "train_loss", "train_seconds", "device")
INTERVENTIONS = ("skipped_steps", "undone_steps", "clipped_logits")  # in the table where a run was asked for them
PLAN = "plan.json"  # in the folder of the runs


@dataclass(frozen=True)
class Cell:
    """One training, and the rows of the table that come of it. labels: columns that tell its rows from the others."""

    labels: dict
    run: Run


Stages = Generator[Iterable[Cell], list[Cell], None]


@dataclass(frozen=True)
class Study(ABC):
    """The part of a study that a contributor writes.

    claim: a sentence that holds or does not, as somebody would say it. source: who says so. rule: how the verdict
    follows from the table, in words.
    """

    claim: str
    source: str
    rule: str

    def cells(self, compose: Compose) -> Iterable[Cell]:
        """The cells, in the order of the table, of a study whose runs do not depend on each other; others give
        `stages` in its place.

        Raises:
            ValueError: for settings that cannot be run.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither cells nor stages")

    def stages(self, compose: Compose) -> Stages:
        """Yield the cells of each stage, in the order of the table. What a yield returns are those of its cells that
        are done, so that runs of the next stage can begin with their weights: `config.init_from = cell.run.id`. One
        that failed or diverged is left out, and its row says why.

        Raises:
            ValueError: for settings that cannot be run.
        """
        yield self.cells(compose)

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """Return what is found on a trained model besides its row in the ledger: one dict per row of the table."""
        return [{}]

    def table(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Return the table that figure and verdict are of, from the rows of all cells."""
        return rows

    @abstractmethod
    def figure(self, table: pd.DataFrame) -> Figure:
        """The table at a glance."""

    @abstractmethod
    def verdict(self, table: pd.DataFrame) -> Verdict:
        """The rule applied to the table."""


def check_named(verb: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a study that has to do with a name which there is not, such as "compares".

    Raises:
        ValueError: it names the first of them.
    """
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"study {verb} {unknown[0]!r}: choose from {', '.join(known)}")


def over_seeds(compose: Compose, architectures: dict[str, list[str]], seeds: Iterable[int]) -> Iterator[Cell]:
    """Yield a cell for each architecture, by its name and overrides, and seed."""
    for name, overrides in architectures.items():
        for seed in seeds:
            config = compose([*overrides, f"seed={seed}"])
            config.session.arm = name
            yield Cell({"architecture": name, "seed": seed}, run_of(config))


def carry_out(study: Study, stages: Stages, settings: DictConfig, root: Path, out: Path, jobs: int) -> Verdict:
    """Run what is missing of a study and write its table.csv, figure.png and verdict.json.

    Args:
        stages: of the study; one is composed when the runs of those before it are finished.
        settings: the study's node of the config, for the plan.
        root: folder of the runs. out: folder of what is written. jobs: runs at a time.

    Raises:
        ValueError: when the rule or the settings were changed after runs had begun.
    """
    cells, rows = list(next(stages)), {}
    written, stage = write_plan(study, cells, settings, root), cells
    for number in itertools.count(1):
        results = Parallel(n_jobs=jobs, return_as="generator")(delayed(execute)(cell.run) for cell in stage)
        rows |= {row["id"]: row for row in track(results, total=len(stage), description="runs")}
        try:
            stage = list(stages.send([cell for cell in stage if rows[cell.run.id]["status"] == "done"]))
        except StopIteration:
            break
        extend_plan(stage, number, root)
        cells += stage
    runs = {cell.run.id: cell.run for cell in cells}
    open_once: dict[str, TokenData] = {}
    lines = (
        line
        for cell in track(cells, description="measurements")
        for line in rows_of(study, cell, rows, runs, settings, open_once)
    )
    table = study.table(pd.DataFrame(lines))
    verdict = study.verdict(table)
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "table.csv", index=False, float_format="%.6g")
    study.figure(table).savefig(out / "figure.png", dpi=110)
    spent = sum(row["wall_seconds"] or 0.0 for row in rows.values())
    devices = sorted({row["device"] for row in rows.values() if row["device"]})
    write_json(
        out / "verdict.json",
        {"claim": study.claim, "source": study.source, "planned": written, "verdict": verdict}
        | {"runs": len(cells), "run_seconds": round(spent), "devices": devices},
    )
    return verdict


def write_plan(study: Study, cells: list[Cell], settings: DictConfig, root: Path) -> str:
    """Write <root>/plan.json, once, with the cells of the first stage; return when that was.

    Raises:
        ValueError: when another plan lies there and runs of it have begun.
    """
    path = root / PLAN
    plan = {
        "claim": study.claim,
        "rule": study.rule,
        "settings": OmegaConf.to_container(settings, resolve=True),
        "cells": [cell.labels | {"id": cell.run.id} for cell in cells],
    }
    plan = jsonable(plan)
    if path.exists():
        old = json.loads(path.read_text())
        written = old.pop("written")
        if {key: old.get(key) for key in plan} == plan:
            return written
        if (root / "ledger.jsonl").exists():
            raise changed(path, ", ".join(key for key in plan if old.get(key) != plan[key]))
    written = time.strftime("%FT%T%z")
    write_json(path, {"written": written} | plan)
    return written


def extend_plan(cells: list[Cell], stage: int, root: Path) -> None:
    """Add the cells of a later stage, 1 or above, to <root>/plan.json before they are run. Their ids there are those of
    their configs without the weights that they begin with: these may be made again, and the plan stays what it was.

    Raises:
        ValueError: when a cell of these labels was planned otherwise.
    """
    path = root / PLAN
    plan = json.loads(path.read_text())
    later = plan.setdefault("later", [])
    if len(later) < stage:
        later.append({"written": time.strftime("%FT%T%z"), "cells": []})
    planned = later[stage - 1]["cells"]
    for cell in cells:
        config = cell.run.config.copy()
        config.init_from = None
        for name in config.objective.get("models", {}):
            config.objective.models[name] = None
        identity = run_id(config)
        entry = jsonable(cell.labels | {"id": identity})
        if entry in planned:
            continue
        if any(entry == known | {"id": identity} for known in planned):
            raise changed(path, f"the settings of {cell.labels}")
        planned.append(entry)  # also where what it goes on from had failed before
    write_json(path, plan)


def changed(path: Path, what: str) -> ValueError:
    """The refusal of what differs from a plan whose runs have begun."""
    return ValueError(
        f"{path} was written before the runs in that folder, and {what} differ now: a rule is not changed "
        "after the runs; go back to the plan, or give the study another folder with session.root=..."
    )


def rows_of(
    study: Study,
    cell: Cell,
    rows: dict[str, dict],
    runs: dict[str, Run],
    settings: DictConfig,
    open_once: dict[str, TokenData],
) -> list[dict]:
    """The lines of the table that come of one cell; what is measured is kept in the run's folder. What its run goes on
    from has cost flops_before, and the models that it learns from (teachers, rewards) flops_others besides."""
    row = rows[cell.run.id]
    line = cell.labels | {column: row[column] for column in KEPT}
    line |= {column: row[column] for column in INTERVENTIONS if row.get(column) is not None}
    before = makers([cell.run.init_from] if cell.run.init_from else [], runs)
    others = makers(cell.run.others.values(), runs) - before
    for column, ids in (("flops_before", before), ("flops_others", others)):
        if ids:
            line[column] = sum(rows[i]["flops"] for i in ids)
    if row["status"] != "done":
        return [line]
    code = code_digest({}, type(study).__module__)
    text = json.dumps([jsonable(cell.labels), OmegaConf.to_container(settings, resolve=True), code], sort_keys=True)
    kept = cell.run.folder / f"measured-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    if not kept.exists():
        data_settings = json.dumps(OmegaConf.to_container(cell.run.config.data, resolve=True), sort_keys=True)
        if data_settings not in open_once:
            open_once[data_settings] = open_data(cell.run.config)
        own = {target.partition(".")[0] for target in targets(plain(cell.run.config))}
        write_json(kept, study.measure(cell, load_run(cell.run.folder, open_once[data_settings], own)))
    return [line | found for found in json.loads(kept.read_text())]


def makers(folders: Iterable[Path], runs: dict[str, Run]) -> set[str]:
    """Ids of all runs, among these by id, that the models in these folders were made by: those that trained them, and
    those that trained what these began with and learnt from."""
    found = set()
    for run in (runs[folder.name] for folder in folders if folder.name in runs):
        began_with = [run.init_from] if run.init_from else []
        found |= {run.id} | makers([*began_with, *run.others.values()], runs)
    return found
