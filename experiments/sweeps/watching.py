"""A page to watch a sweep by: its report so far below what is running, done, failed and left, from its folder alone."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import pandas as pd
from filelock import Timeout
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from experiments.findings import number
from experiments.harness import ledger
from experiments.harness.files import locked, write_atomically
from experiments.harness.identity import load_config
from experiments.report import page, report
from experiments.scaling.design import Cell, read_plan
from experiments.sweeps.prices import ENOUGH, fitted, prices_so_far
from experiments.sweeps.progress import duration

TEMPLATE = Path(__file__).with_name("watching.html")
SHARE = 0.05  # of the time that the report may be made again in, since the runs want the cores


@dataclass(frozen=True)
class Running:
    """A run under way, by what a person knows it by, and the seconds since it was started."""

    id: str
    arm: str
    kind: str
    flops: float
    width: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """The page of a sweep's report, and when it was made, in seconds since 1970."""

    page: str
    made: float


@dataclass(frozen=True)
class State:
    """The state of a sweep.

    made: when that was found, in seconds since 1970. planned: cells, with those added so far. failed: those to be tried
    again, which are among those left. running: the longest first. seconds: until all these cells have ended, None where
    nothing tells it. ended: when the last run ended, as `made`. refresh: seconds until the page is made again, None for
    the last one.
    """

    name: str
    made: float
    planned: int
    done: int
    diverged: int
    failed: int
    running: list[Running]
    seconds: float | None
    ended: float | None
    refresh: float | None

    @property
    def left(self) -> int:
        return max(0, self.planned - self.done - self.diverged - len(self.running))


def watch(folder: Path, seconds: float) -> Iterator[State | None]:
    """Write <folder>/watch.html every so many seconds until the sweep has written its report, and yield what it says;
    None while no sweep has begun there. The page then leads to the report."""
    path, state, report, known, due = folder / "watch.html", None, Report("", 0.0), None, 0.0
    try:
        while True:
            if not (folder / "plan.json").exists():
                yield None
            else:
                state = look(folder, seconds)
                if finished(folder, state):
                    write_atomically(path, render(None, state.name))
                    state = None
                    return
                if known != changed(folder) and time.monotonic() >= due:
                    known, started = changed(folder), time.monotonic()
                    report = Report(report_so_far(folder), time.time())
                    due = time.monotonic() + (time.monotonic() - started) / SHARE
                write_atomically(path, render(state, state.name, report))
                yield state
            time.sleep(seconds)
    finally:
        if state is not None:  # stopped before the sweep was
            write_atomically(path, render(replace(state, refresh=None), state.name, report))


def look(folder: Path, seconds: float) -> State:
    """Return where the sweep in a folder is."""
    plan, rows = read_plan(folder / "plan.json"), ledger.read(folder / "ledger.jsonl")
    cells = [Cell(**cell) for cell in (*plan["cells"], *(cell for new in plan["additions"] for cell in new["cells"]))]
    status, running = rows.status.value_counts(), under_way(folder)
    ended = rows.finished.dropna().max() if len(rows) else None
    return State(
        name=plan["name"],
        made=time.time(),
        planned=len(cells),
        **{word: int(status.get(word, 0)) for word in ("done", "diverged", "failed")},
        running=running,
        seconds=time_left(cells, rows, running),
        ended=datetime.fromisoformat(ended).timestamp() if ended else None,
        refresh=seconds,
    )


def under_way(folder: Path) -> list[Running]:
    """Return the runs under way. A mark that a killed process has left behind does not count: nobody holds the lock."""
    found, now = [], time.time()
    for mark in folder.glob("cells/*/running"):
        try:
            since, config = mark.stat().st_mtime, load_config(mark.with_name("cell.yaml"))
        except FileNotFoundError:  # ended at this moment, or no cell of the sweep
            continue
        if held(mark.with_name("lock")):
            arm, kind, flops = config.session.arm, config.session.kind, config.budget.flops
            found.append(Running(mark.parent.name, arm, kind, flops, config.arch.width, now - since))
    return sorted(found, key=lambda run: -run.seconds)


def held(lock: Path) -> bool:
    """Return whether a process holds a lock."""
    try:
        with locked(lock, timeout=0):
            return False
    except Timeout:
        return True


def time_left(cells: list[Cell], rows: pd.DataFrame, running: list[Running]) -> float | None:
    """Return the seconds until all cells have ended if as many as now run at once, by what the finished ones took; None
    where nothing is running or too few are finished."""
    done = rows[rows.status == "done"]
    if len(done) < ENOUGH or not running:
        return None
    by_arm, price = prices_so_far(done), fitted(done)
    results = rows[rows.status != "failed"]
    ended = Counter(zip(results.kind, results.arm, results.budget_flops, results.width, results.seed, strict=True))
    seconds = -sum(run.seconds for run in running)
    for cell in cells:
        key = cell.kind, cell.arm, cell.budget, cell.width, cell.seed
        if ended[key]:
            ended[key] -= 1
        else:
            seconds += by_arm.get(cell.arm, price).of(cell)
    return max(0.0, float(seconds)) / len(running)


def finished(folder: Path, state: State) -> bool:
    """Return whether the sweep has written its report, after all else, and nothing is running."""
    report = folder / "report.html"
    return not state.running and report.exists() and report.stat().st_mtime_ns >= max(changed(folder))


def changed(folder: Path) -> tuple[int, int]:
    """Return when plan and ledger were last written."""
    plan, rows = (folder / name for name in ("plan.json", "ledger.jsonl"))
    return plan.stat().st_mtime_ns, rows.stat().st_mtime_ns if rows.exists() else 0


def report_so_far(folder: Path) -> str:
    """Return the page of the report on what is there, which writes no other file."""
    design, rows, prediction, analysis = report.so_far(folder)
    return page.render(design, design.losses(rows), analysis, prediction)


def render(state: State | None, name: str, report: Report = Report("", 0.0)) -> str:
    """Return the page: where the sweep is above its report so far; without a state the way to the report."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": duration, "number": number, "clock": clock}
    head, _, body = report.page.partition("<header>")
    return environment.from_string(TEMPLATE.read_text()).render(
        state=state, name=name, report=report, head=Markup(head), body=Markup(f"<header>{body}") if body else ""
    )


def clock(seconds: float) -> str:
    """The time of day here of seconds since 1970."""
    return datetime.fromtimestamp(seconds).strftime("%H:%M:%S")
