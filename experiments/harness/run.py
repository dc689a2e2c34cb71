"""One run: a pure function of its identity, done once and found again by its hash."""

import json
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from experiments.data.token_data import TokenData
from experiments.harness import checkpoints, ledger
from experiments.harness.files import locked, write_atomically
from experiments.harness.identity import Run, plain
from experiments.harness.memory import reset_peak_memory
from experiments.harness.origin import Origin, commit, older_name
from experiments.harness.parts import build, open_data
from experiments.harness.settings import check_parts

ORIGIN = "origin.json"  # by what a run was begun


def execute(run: Run, data: TokenData | None = None) -> dict:
    """Train and evaluate one run in its folder, or find that it is done; return its ledger row.

    A second process with the same run waits for the first and then finds its row. A run that was stopped goes on from
    its last checkpoint. Divergence and crashes give a row that says so.

    Raises:
        ValueError: for a config that cannot be run (see `prepare_run`); nothing is written. For a result, or a
            checkpoint, that other code or other data made, unless session.older says what to do with it.
    """
    if not _spread(run):
        return _execute(run, data)
    from experiments.harness import launch

    if not launch.started(run):
        return _execute(run, data)
    return launch.together(run, data, build(run.config.trainer).device(), lambda: _execute(run, data))


def _spread(run: Run) -> bool:
    """Returns whether a run takes processes of its own, or was started in several."""
    several = run.processes > 1 or int(os.environ.get("WORLD_SIZE", 1)) > 1
    return several or run.spread.get("strategy") == "fsdp"


def _execute(run: Run, given: TokenData | None) -> dict:
    reset_peak_memory()
    run.folder.mkdir(parents=True, exist_ok=True)
    with locked(run.folder / "lock"), running(run.folder / "running"):
        config, data = run.config, given
        if data is None:
            say(run, f"data {config.data.name}: opening, or preparing for the first time")
            data = open_data(config)
        origin = Origin(run.code, commit(), data.digest)
        row, begun = _found(run, origin)
        if row:
            checkpoints.remove(run.folder)  # where a kill came between its row and this
            say(run, f"run {run.id}: found in {run.folder}, {row['status']} at {row['finished']}")
            return row
        say(run, f"run {run.id}: {config.arch.name} of width {config.arch.width} under {config.objective.name}")
        from experiments.harness.assembly import prepare_run  # torch, for which a run that is found need not wait

        check_parts(plain(config))  # again, since `run_of` trusts those of a row that did not count
        prepared = prepare_run(run, data)
        say(run, f"run {run.id}: {prepared}")
        from experiments.harness import training  # Lightning, for which a mistake need not wait

        threads = (begun.threads if begun else None) or training.choose_threads(run, prepared)
        if begun is None:
            begun = replace(origin, threads=threads)
            begun.write(run.folder / ORIGIN)
        row = {
            "id": run.id,
            "kind": run.session.kind,
            "arm": run.session.arm,
            "started": now(),
            "seed": config.seed,
            "init_from": config.init_from,
            "budget_flops": config.budget.flops,
            "width": config.arch.width,
            "learning_rate": prepared.measured.optimiser.learning_rate,
            "code": begun.code,  # that of its beginning, where an older one was accepted
            "commit": begun.commit,
        }
        row |= {name: config[name].name for name in ("arch", "objective", "data")}
        if _spread(run):
            from experiments.harness import launch

            row = launch.train(run, given, prepared, row, threads)
        else:
            row = training.train(run, data, prepared, row, threads)
        row = {column: row.get(column) for column in ledger.COLUMNS} | {"finished": now()}
        # First beside the run, then in the ledger: a kill between the two loses nothing.
        write_atomically(run.folder / "row.json", json.dumps(row))
        ledger.append(run.ledger, row)
        if row["status"] == "done":
            checkpoints.remove(run.folder)
        return row


def say(run: Run, text: str) -> None:
    """Print on stderr what the run is doing, unless its session is a quiet one."""
    if run.session.progress:
        print(text, file=sys.stderr, flush=True)


def _found(run: Run, origin: Origin) -> tuple[dict | None, Origin | None]:
    """The row that is there already, or what the checkpoints that are there were begun by, as far as the session takes
    what the present code and data did not make."""
    row = finished(run)
    begun = Origin.read(run.folder / ORIGIN) if checkpoints.generations(run.folder) else None
    if row and begun and Origin.of_row(row).differences(begun):
        row = None  # it was put aside, and what replaces it was stopped
    made = Origin.of_row(row) if row else begun
    other = made.differences(origin) if made else ""
    if other and run.session.older == "refuse":
        raise ValueError(
            f"run {run.id} in {run.folder} was {'made' if row else 'begun'} by {other}: session.older=accept takes it "
            "as it is, session.older=replace puts it aside and makes it again"
        )
    if other and run.session.older == "replace":
        put_aside(run)
        return None, None
    return row, begun


@contextmanager
def running(marker: Path):
    """Lets whoever watches the folder count the runs under way."""
    marker.touch()
    try:
        yield
    finally:
        marker.unlink(missing_ok=True)


def put_aside(run: Run) -> None:
    """Move what lies in the run's folder, of other code or data, into a folder of its own beside it. The row stays in
    the ledger until another of the same id follows it."""
    aside = older_name(run.folder)
    aside.mkdir()
    for path in run.folder.iterdir():
        if path.name not in ("lock", "running", "cell.yaml"):
            path.rename(aside / path.name)


def finished(run: Run) -> dict | None:
    """The row of a run that is done or diverged, which is its result; a failed one is tried again, and so is one whose
    result is no number."""
    rows = ledger.read(run.ledger)
    rows = rows[rows.id == run.id]
    known = rows.astype(object).mask(rows.isna(), None).to_dict("records")
    beside = run.folder / "row.json"
    if not known and beside.exists():
        row = json.loads(beside.read_text())
        if row["status"] != "failed":
            ledger.append(run.ledger, row)
            known = [row]
    if not known or known[0]["status"] == "failed":
        return None
    bits = known[0]["bits_per_byte"]
    return None if known[0]["status"] == "done" and not (bits and math.isfinite(bits)) else known[0]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
