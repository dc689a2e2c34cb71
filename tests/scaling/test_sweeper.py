"""A sweep: planned first, every cell once, whatever happens to it on the way.

Sweeps run in this process, through the command's own `main`, but where a process is to be killed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import sweep as command
from experiments.harness import ledger
from experiments.harness import run as run_module
from experiments.harness.telemetry import Telemetry
from experiments.scaling import sweeper as sweeper_module

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
ONE_ARM = "sweep.arms=[{arch:transformer,objective:next_token}]"
SMALL = [
    "sweep=quickstart", "hydra/launcher=basic", "sweep.budgets=[4e7,8e7]", "sweep.sizes=3", "sweep.span=4",
    "sweep.holdout={budget:1.6e8,sizes:2,span:2}", "sweep.tokens_per_parameter=0.5", "data.sequence_length=32",
    "sweep.tuning={budget:4e7,learning_rates:[0.01,0.02],seed:1000}", "data=hidden_markov",
    "data.tokens.train_tokens=65536", "data.tokens.heldout_tokens=512", "data.allow_repeats=true",
    "budget.batch_tokens=512",
    "sweep.arms=[{arch:transformer,objective:next_token},{arch:transformer,objective:masked_diffusion}]",
]  # fmt: skip
CELLS = 20


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys):
    """Runs the command in this process and returns what it printed."""

    def run(*overrides):
        argv = ["sweep", *SMALL, f"session.root={tmp_path}", *overrides]
        monkeypatch.setattr(sys, "argv", argv)
        command.main()
        return capsys.readouterr().out

    return run


def rows_of(folder):
    return ledger.read(folder / "ledger.jsonl")


class Killed(BaseException):
    """A kill, where one can be counted on."""


def killed_at(monkeypatch, module, name, call):
    """Kill at the call-th call of a function, before it does anything."""
    original, calls = getattr(module, name), []

    def dies(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, dies)


KILLS = {  # in the order in which they come
    "before the plan": (sweeper_module, "write_json", 1),
    "in a training step of the first cell": (Telemetry, "on_train_batch_start", 3),
    "in a training step of a later cell": (Telemetry, "on_train_batch_start", 20),
    "before a row lies beside its run": (ledger, "write_atomically", 2),
    "before a row is in the ledger": (ledger, "append", 2),
    "before the weights are written": (run_module, "save_weights", 2),
    "before the prediction": (sweeper_module, "write_json", 1),
    "before the report": (sweeper_module.report, "write", 1),
}


def test_a_sweep_killed_anywhere_trains_every_cell_exactly_once(sweep, tmp_path, monkeypatch):
    """One sweep, killed at every one of these places in turn."""
    ends, trained = {}, []
    original = run_module._train
    for module, name, call in KILLS.values():
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(patch, module, name, call)
            sweep(ONE_ARM, "session.checkpoint_seconds=0")
        for row in rows_of(tmp_path).itertuples():
            assert ends.setdefault(row.id, row.finished) == row.finished, "trained again"

    def watch(run, *rest):
        trained.append(run.id)
        return original(run, *rest)

    monkeypatch.setattr(run_module, "_train", watch)
    output = sweep(ONE_ARM, "session.checkpoint_seconds=0")
    rows, plan = rows_of(tmp_path), json.loads((tmp_path / "plan.json").read_text())
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines()
    assert len(rows) == len(lines) == len(plan["cells"]) == CELLS // 2
    assert set(rows.status) == {"done"} and "report.html" in output
    assert all(rows.set_index("id").finished[cell] == when for cell, when in ends.items())
    assert not trained, "all was trained before the last kill, which came before the report"
    assert "nothing to train: all 10 cells" in output
    assert (tmp_path / "ledger.jsonl").read_text().splitlines() == lines


def test_the_plan_is_written_before_all_runs_and_the_prediction_before_the_held_out_ones(sweep, tmp_path):
    output = sweep()
    rows = rows_of(tmp_path)
    plan, prediction = tmp_path / "plan.json", tmp_path / "prediction.json"
    started = {kind: min((tmp_path / "cells" / cell / "config.yaml").stat().st_mtime for cell in group.id)
               for kind, group in rows.groupby("kind")}  # fmt: skip
    assert plan.stat().st_mtime < min(started.values())
    assert prediction.stat().st_mtime < started["holdout"]
    for arm, group in rows.groupby("arm"):
        tuning = group[group.kind == "tune"]
        best = tuning.loc[tuning.bits_per_byte.idxmin()].learning_rate
        assert set(group[group.kind != "tune"].learning_rate) == {best}
        assert f"learning rate of {arm}: {best:g}" in output


def test_another_plan_is_refused_with_the_difference(sweep, tmp_path, capsys):
    settings = [ONE_ARM, "sweep.tuning=null", "sweep.holdout=null", "sweep.budgets=[4e7]"]
    sweep(*settings)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(SystemExit) as error:
        sweep(*settings, "sweep.sizes=4")
    said = str(error.value)
    assert "holds another plan" in said and "cells:" in said and "sweep.name" in said
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def test_a_dry_run_prints_the_cells_and_runs_nothing(sweep, tmp_path):
    output = sweep("sweep.dry_run=true")
    assert f"{CELLS} cells, nothing is run" in output and "FLOPs in all" in output
    assert not (tmp_path / "plan.json").exists() and not (tmp_path / "ledger.jsonl").exists()


def test_a_cell_that_diverges_or_crashes_does_not_stop_the_others(sweep, tmp_path, monkeypatch):
    original, crashed = run_module._train, []

    def crash_once(run, *rest):
        if run.session.kind == "fit" and not crashed:
            crashed.append(run.id)
            raise RuntimeError("out of memory")
        return original(run, *rest)

    settings = [
        ONE_ARM, "sweep.holdout=null", "sweep.tuning={budget:4e7,learning_rates:[0.01,1e30],seed:1000}",
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_train", crash_once)
        output = sweep(*settings)
    assert rows_of(tmp_path).status.value_counts().to_dict() == {"done": 6, "diverged": 1, "failed": 1}
    assert "1 diverged, 1 failed; start the same command again" in output
    sweep(*settings)
    assert rows_of(tmp_path).status.value_counts().to_dict() == {"done": 7, "diverged": 1}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sweep.budgets=[1e3]", "does not pay for one step"),
        ("sweep.holdout.budget=4e7", "must lie above the largest fitted budget"),
    ],
)
def test_bad_sweeps_end_with_a_sentence(sweep, tmp_path, override, words):
    with pytest.raises(SystemExit, match=words):
        sweep(override)
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(("override", "known"), [("arch=unknown", "gated_delta_hybrid"), ("data=no", "python_stdlib")])
def test_a_misspelt_name_is_answered_with_the_known_ones(sweep, capsys, override, known):
    with pytest.raises(SystemExit):
        sweep(override)
    assert known in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_sweep_runs_through_the_joblib_launcher(sweep, tmp_path):
    sweep("hydra/launcher=joblib")
    assert set(rows_of(tmp_path).status) == {"done"} and len(rows_of(tmp_path)) == CELLS


@pytest.mark.slow
def test_a_process_killed_at_random_moments_loses_nothing(tmp_path):
    """The same with real kills."""
    arguments = [sys.executable, "-m", "experiments.sweep", *SMALL, f"session.root={tmp_path}"]

    def start():
        return subprocess.Popen(
            [*arguments, "session.checkpoint_seconds=0"], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    rng, ends = random.Random(), {}
    delays = [rng.uniform(4, 12) for _ in range(3)]  # some kills come before the first cell, some after
    for delay in delays:
        process = start()
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        for row in rows_of(tmp_path).itertuples():
            assert ends.setdefault(row.id, row.finished) == row.finished, f"trained again, kills after {delays}"
    process = start()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    rows = rows_of(tmp_path)
    assert len(rows) == len((tmp_path / "ledger.jsonl").read_text().splitlines()) == CELLS, delays
    assert set(rows.status) == {"done"}
    assert all(rows.set_index("id").finished[cell] == when for cell, when in ends.items())
