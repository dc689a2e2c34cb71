"""A sweep through Hydra: planned first, every cell once, whatever happens to it on the way."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.harness import ledger

ROOT = Path(__file__).parents[2]
SMALL = [
    "sweep=quickstart", "hydra/launcher=basic", "sweep.budgets=[2e8,4e8,8e8]", "sweep.sizes=3", "sweep.span=4",
    "sweep.holdout={budget:1.6e9,sizes:2,span:2}", "sweep.tokens_per_parameter=0.5", "data.sequence_length=32",
    "sweep.tuning={budget:2e8,learning_rates:[0.01,0.02],seed:1000}", "data.tokens.heldout_bytes=4096",
    "sweep.arms=[{arch:transformer,objective:next_token},{arch:transformer,objective:masked_diffusion}]",
]  # fmt: skip


@pytest.fixture
def sweep(tmp_path):
    """Starts the command; `wait` gives its exit code and output."""

    def start(*overrides):
        command = [sys.executable, "-m", "experiments.sweep", *SMALL, f"root={tmp_path}", *overrides]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    return start


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def rows_of(folder):
    return ledger.read(folder / "ledger.jsonl")


def test_a_sweep_killed_at_random_moments_trains_every_cell_exactly_once(sweep, tmp_path):
    rng = random.Random()
    delays = [rng.uniform(4, 9) for _ in range(3)]  # some kills come before the first cell, some after
    ends = {}
    for delay in delays:
        process = sweep("trainer.checkpoint_seconds=0")
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        for row in rows_of(tmp_path).itertuples():
            assert ends.setdefault(row.id, row.finished) == row.finished, f"trained again, kills after {delays}"
    output = finish(sweep("trainer.checkpoint_seconds=0"))
    rows, plan = rows_of(tmp_path), json.loads((tmp_path / "plan.json").read_text())
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines()
    assert len(rows) == len(lines) == len(plan["cells"]) == 26, (delays, output)
    assert set(rows.status) == {"done"}
    assert all(rows.set_index("id").finished[cell] == when for cell, when in ends.items())
    assert "report.html" in output

    again = finish(sweep("trainer.checkpoint_seconds=0"))
    assert "nothing to train: all 26 cells" in again
    assert (tmp_path / "ledger.jsonl").read_text().splitlines() == lines


def test_the_prediction_is_written_before_the_held_out_runs_and_the_plan_before_all(sweep, tmp_path):
    finish(sweep())
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


def test_another_plan_is_refused_with_the_difference(sweep, tmp_path):
    finish(sweep("sweep.arms=[{arch:transformer,objective:next_token}]", "sweep.tuning=null", "sweep.holdout=null"))
    before = (tmp_path / "ledger.jsonl").read_bytes()
    process = sweep(
        "sweep.arms=[{arch:transformer,objective:next_token}]",
        "sweep.tuning=null",
        "sweep.holdout=null",
        "sweep.sizes=4",
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "holds another plan" in output and "cells:" in output and "sweep.name" in output
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def test_a_dry_run_prints_the_cells_and_runs_nothing(sweep, tmp_path):
    output = finish(sweep("dry_run=true"))
    assert "26 cells, nothing is run" in output and "FLOPs in all" in output
    assert not (tmp_path / "plan.json").exists() and not (tmp_path / "ledger.jsonl").exists()


def test_a_cell_that_diverges_or_crashes_does_not_stop_the_others(sweep, tmp_path):
    tuning = "sweep.tuning={budget:2e8,learning_rates:[0.01,1e30],seed:1000}"
    arms = ["sweep.arms=[{arch:transformer,objective:next_token}]", "sweep.holdout=null", tuning]
    finish(sweep(*arms))
    status = rows_of(tmp_path).status.value_counts().to_dict()
    assert status == {"done": 10, "diverged": 1}


@pytest.mark.slow
def test_the_same_sweep_runs_through_the_joblib_launcher(sweep, tmp_path):
    finish(sweep("hydra/launcher=joblib"))
    assert set(rows_of(tmp_path).status) == {"done"} and len(rows_of(tmp_path)) == 26


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sweep.budgets=[1e3]", "does not pay for one step"),
        ("arch=unknown", "gated_delta_hybrid"),
        ("data=unknown", "python_stdlib"),
    ],
)
def test_bad_sweeps_end_with_a_sentence(sweep, override, words):
    process = sweep(override)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and words in output
